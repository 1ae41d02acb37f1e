from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.data.images import read_image
from model.data.near_duplicates import perceptual_hash
from pipeline_tasks.images import make_open_image
from pipeline_tasks.validation.images import inspect_images

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def save(path: Path, orientation: int | None = None, **options: object) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif, **options)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tiff"])
def test_sound_picture(tmp_path: Path, name: str) -> None:
    content = save(tmp_path / name)
    (row,) = inspect_images(tmp_path, [name]).to_pylist()
    hashed = perceptual_hash(read_image(tmp_path / name))
    assert (row.pop("perceptual_hash") ^ hashed).bit_count() <= 4  # two decoders, two ways to turn grey
    assert row == {
        "file_present": True,
        "decodable": True,
        "decode_error": None,
        "real_width": 30,
        "real_height": 20,
        "sha256": hashlib.sha256(content).hexdigest(),
        "format": {"jpg": "JPEG"}.get(name[2:], name[2:].upper()),
        "mode": "RGB",
        "orientation": None,
    }


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_truncated_picture_is_found(tmp_path: Path, name: str, kept: float) -> None:
    content = save(tmp_path / name)
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    (row,) = inspect_images(tmp_path, [name]).to_pylist()
    assert row["file_present"] and not row["decodable"] and row["decode_error"]
    assert row["real_width"] is None and row["sha256"] is not None


def test_jpeg_that_lacks_only_its_last_bytes_is_found(tmp_path: Path) -> None:
    content = save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(content[:-20])
    assert inspect_images(tmp_path, ["a.jpg"])["decodable"].to_pylist() == [False]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_opened_picture_whatever_its_orientation(
    tmp_path: Path, name: str, orientation: int
) -> None:
    save(tmp_path / name, orientation)
    (row,) = inspect_images(tmp_path, [name]).to_pylist()
    picture = make_open_image({"r": tmp_path})(f"r/{name}")
    assert picture.shape[:2] == (row["real_height"], row["real_width"])
    assert (perceptual_hash(picture) ^ row["perceptual_hash"]).bit_count() <= 4


def test_every_colour_mode_opens(tmp_path: Path) -> None:
    picture = Image.fromarray(PIXELS)
    for mode, suffix in (("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("I;16", "png")):
        name = f"{mode[0]}.{suffix}"
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / name)
        assert inspect_images(tmp_path, [name])["decodable"].to_pylist() == [True], mode
        assert make_open_image({"r": tmp_path})(f"r/{name}").shape == (20, 30, 3), mode


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "gif.jpg", format="GIF")
    rows = inspect_images(tmp_path, ["empty.jpg", "text.jpg", "folder.jpg", "gif.jpg", "gone.jpg", None]).to_pylist()
    assert [row["file_present"] for row in rows] == [True, True, True, True, False, None]
    assert [row["decodable"] for row in rows] == [False, False, False, False, None, None]
    assert rows[0]["decode_error"] == "the file is empty"
    assert rows[1]["decode_error"].startswith("not a picture in one of the formats JPEG")
    assert rows[2]["decode_error"] == "Is a directory"


def test_order_does_not_depend_on_threads(tmp_path: Path) -> None:
    for index in range(100):
        (tmp_path / f"{index}.jpg").write_bytes(bytes([index]))
    names = [f"{index}.jpg" for index in range(100)]
    assert inspect_images(tmp_path, names, threads=1) == inspect_images(tmp_path, names, threads=7)


def test_nothing_to_inspect(tmp_path: Path) -> None:
    assert len(inspect_images(tmp_path, [])) == 0
