"""`nasline data show`."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_tasks.data.page.document import write_page
from pipeline_tasks.data.page.pictures import choose
from pipeline_tasks.data.page.statistics import statistics
from pipeline_tasks.data.sets import open_set
from pipeline_tasks.errors import UsageError

MARKUP = "<script>alert('x')</script>\x07\"&"


class Tags(HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_shows_counts_and_every_box_of_the_pictures(coco_folder: Any, tmp_path: Path) -> None:
    with open_set(str(coco_folder.path)) as opened:
        page = write_page(opened, tmp_path / "page", pictures=5)
        counted = statistics(opened.raw)
    text = page.read_text(encoding="utf-8")
    assert "12 images, 24 boxes, 2 classes" in text
    assert text.count('class="box"') == 2 * 5
    assert sorted(file.name for file in (tmp_path / "page/pictures").iterdir()) == [f"{n:04d}.jpg" for n in range(5)]
    assert [(split.name, split.images, split.boxes) for split in counted.splits] == [
        ("train", 6, 12), ("val", 3, 6), ("test", 3, 6)
    ]  # fmt: skip
    for found in (counted.sizes, counted.shares, counted.aspects):
        assert found.counts.sum() == 24
    assert counted.boxes_per_image.counts.sum() == 12 and counted.centres.sum() == 24
    x, y = (4.5 + 10.5 / 2) / 48, (5 + 4) / 32
    row, column = np.argwhere(counted.centres)[0]
    assert (row, column) == (int(y * 48), pytest.approx(int(x * 48), abs=1))


def test_names_are_shown_as_text_and_nothing_leads_out(coco_folder: Any, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            content["categories"][0]["name"] = MARKUP
            content["info"]["description"] = MARKUP
            content["licenses"][0]["name"] = MARKUP
    with open_set(str(coco_folder.path)) as opened:
        page = Tags(write_page(opened, tmp_path / "page", pictures=3).read_text(encoding="utf-8"))
    assert MARKUP in "".join(page.texts)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "a", "link"}
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses and all(re.match(r"pictures/\d{4}\.jpg$|data:image/png;base64,", str(a)) for a in addresses)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)


def test_rare_classes_are_among_the_pictures(coco_folder: Any) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"] = content["annotations"][:1]
    for split in ("train", "test"):
        with coco_folder.edit(split) as content:
            content["annotations"] = [one for one in content["annotations"] if one["category_id"] == 7]
    with open_set(str(coco_folder.path)) as opened:
        (first, *_) = choose(opened.raw, 2)
        assert opened.raw.images["path"][first].as_py() == "images/val_0.jpg"


def test_page_is_whole_or_absent(coco_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_tasks.data.page import document

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    with open_set(str(coco_folder.path)) as opened:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(document, "_page", killed)
            write_page(opened, tmp_path / "page", pictures=3)
        assert not list(tmp_path.glob("*page*"))
        write_page(opened, tmp_path / "page", pictures=3)
        with pytest.raises(UsageError, match="exists; choose a folder that does not"):
            write_page(opened, tmp_path / "page", pictures=3)


def test_a_set_without_boxes(coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    shutil.rmtree(coco_folder.path / "annotations")
    output = nasline("data", "show", coco_folder.path, "--out", tmp_path / "page", code=0)
    assert f"open {tmp_path / 'page/index.html'}" in output
    assert "12 images, 0 boxes, 0 classes" in (tmp_path / "page/index.html").read_text()


def test_negative_number_of_pictures_is_refused(coco_folder: Any, tmp_path: Path, nasline: Any) -> None:
    options = ("--out", tmp_path / "page", "--pictures", -1)
    assert "--pictures -1 must not be negative" in nasline("data", "show", coco_folder.path, *options, code=2)


def test_pictures_that_cannot_be_read_are_left_out(coco_folder: Any, tmp_path: Path) -> None:
    coco_folder.image("train", 1).unlink()
    coco_folder.image("train", 2).write_bytes(b"no picture")
    with open_set(str(coco_folder.path)) as opened:
        write_page(opened, tmp_path / "page", pictures=12)
    assert len(list((tmp_path / "page/pictures").iterdir())) == 10
