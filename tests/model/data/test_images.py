"""Files to RGB arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.data.images import decode_image, read_image, write_image


def picture(height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: NDArray[np.uint8], kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def test_colours_come_as_red_green_blue() -> None:
    np.testing.assert_array_equal(decode_image(encoded(picture(), "PNG"), "a.png"), picture())


def test_jpeg_pixels_equal_pillows(shared: Path) -> None:
    for path in sorted((shared / "data" / "bccd" / "images").iterdir())[:3]:
        np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))


def test_greyscale_is_spread_over_three_channels() -> None:
    grey = picture()[:, :, 0]
    image = decode_image(encoded(grey, "PNG"), "grey.png")
    np.testing.assert_array_equal(image, np.repeat(grey[:, :, None], 3, axis=2))


def test_picture_is_turned_upright_by_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    image = decode_image(encoded(picture(), "JPEG", exif=exif), "turned.jpg")
    assert image.shape == (60, 40, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.97])
def test_truncated_file_is_named(kind: str, fraction: float) -> None:
    content = encoded(picture(), kind)
    with pytest.raises(ValueError, match=r"image street\.x cannot be decoded"):
        decode_image(content[: int(len(content) * fraction)], "street.x")


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.jpg cannot be opened: No such file"):
        read_image(tmp_path / "no.jpg")


def test_text_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.jpg cannot be decoded"):
        read_image(tmp_path / "notes.jpg")


def test_written_picture_comes_back(tmp_path: Path) -> None:
    write_image(tmp_path / "new" / "a.png", picture())
    np.testing.assert_array_equal(read_image(tmp_path / "new" / "a.png"), picture())


def test_unknown_suffix_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xyz"):
        write_image(tmp_path / "a.xyz", picture())


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_jpeg_comes_reduced_upright_and_close_to_the_mean_of_its_pixels(denominator: int) -> None:
    rows, columns = np.mgrid[0:64, 0:96]
    smooth = np.stack([rows * 3, columns * 2, 128 + 0 * rows], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    for content, upright in (
        (encoded(smooth, "JPEG", quality=95), smooth),
        (encoded(smooth, "JPEG", quality=95, exif=exif), np.rot90(smooth, -1)),
    ):
        image = decode_image(content, "a.jpg", denominator)
        height, width = upright.shape[0] // denominator, upright.shape[1] // denominator
        mean = upright.reshape(height, denominator, width, denominator, 3).mean(axis=(1, 3))
        assert image.shape == (height, width, 3)
        assert np.abs(image - mean).mean() < 2  # grey levels: JPEG's own error, and rounding


def test_reduced_sides_are_rounded_up_and_other_formats_come_whole() -> None:
    assert decode_image(encoded(picture(41, 61), "JPEG"), "a.jpg", 4).shape == (11, 16, 3)
    np.testing.assert_array_equal(decode_image(encoded(picture(), "PNG"), "a.png", 4), picture())


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.97])
def test_truncated_jpeg_is_named_when_reduced_too(fraction: float) -> None:
    content = encoded(picture(), "JPEG")
    with pytest.raises(ValueError, match=r"image street\.jpg cannot be decoded"):
        decode_image(content[: int(len(content) * fraction)], "street.jpg", 2)
