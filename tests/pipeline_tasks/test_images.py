from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline_tasks.errors import DataError
from pipeline_tasks.images import make_open_image


def test_colours_are_rgb_and_grey_becomes_three_channels(tmp_path: Path) -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(tmp_path / "grey.png")
    open_image = make_open_image({"target": tmp_path})
    assert np.array_equal(open_image("target/red.png"), red)
    grey = open_image("target/grey.png")
    assert grey.shape == (4, 6, 3) and (grey[..., 0] == grey[..., 2]).all()


def test_every_root_has_its_folder_and_the_opener_can_be_sent_to_a_process(tmp_path: Path) -> None:
    for name, value in (("one", 10), ("two", 200)):
        (tmp_path / name).mkdir()
        assert cv2.imwrite(str(tmp_path / name / "a.png"), np.full((2, 2, 3), value, np.uint8))
    open_image = pickle.loads(pickle.dumps(make_open_image({"a": tmp_path / "one", "b": tmp_path / "two"})))
    assert open_image("a/a.png")[0, 0, 0] == 10
    assert open_image("b/a.png")[0, 0, 0] == 200


@pytest.mark.parametrize(
    ("path", "error", "sentence"),
    [
        ("other/a.png", DataError, "unknown image root 'other'; known are: target"),
        ("target/gone.png", ValueError, r"gone.png cannot be opened: No such file or directory"),
        ("target/empty.png", ValueError, "empty.png cannot be decoded"),
        ("target/text.png", ValueError, "text.png cannot be decoded"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path: Path, path: str, error: type[Exception], sentence: str) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(error, match=sentence):
        make_open_image({"target": tmp_path})(path)
