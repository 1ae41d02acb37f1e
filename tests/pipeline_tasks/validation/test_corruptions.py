"""Random corruptions of a clean set: each is told, at its record and by the rule that is meant for it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_sets import write_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation.datasets import judge_set

WIDTH, HEIGHT = 96, 64
CLASSES = ("platelets", "white cells")
SPLITS = {"train": 6, "val": 3, "test": 3}
EXAMPLES = 6
REFUSED = "the file is refused"

Draw = Callable[[Any], Any]
FOUND: Counter[str] = Counter()
MADE: Counter[str] = Counter()


class CleanSet:
    """A set of noise with two small boxes and a large one in each picture; corruptions are drawn at random."""

    def __init__(self, folder: Path, draw: Draw) -> None:
        self.folder, self.draw, self.rule = folder, draw, ""
        self.split = draw(st.sampled_from(sorted(SPLITS)))
        self.content = {split: self._content(split) for split in SPLITS}
        self.row = draw(st.integers(0, SPLITS[self.split] - 1))
        self.box_row = draw(st.integers(0, 3 * SPLITS[self.split] - 1))

    @staticmethod
    def _content(split: str) -> dict[str, Any]:
        images = [
            {"id": i, "file_name": f"{split}_{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(SPLITS[split])
        ]
        boxes = [
            {"id": 3 * i + k, "image_id": i, "category_id": k // 2, "bbox": [*place, side, side], "area": side * side}
            for i in range(SPLITS[split])
            for k, (place, side) in enumerate((((4, 4), 8 + i % 2), ((20, 8), 9), ((40, 10), 40 + i % 3)))
        ]
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
        return {"info": {}, "licenses": [], "images": images, "annotations": boxes, "categories": categories}

    @property
    def image(self) -> dict[str, Any]:
        return self.content[self.split]["images"][self.row]

    @property
    def box(self) -> dict[str, Any]:
        return self.content[self.split]["annotations"][self.box_row]

    @property
    def picture(self) -> Path:
        return self.folder / "images" / self.image["file_name"]

    def write(self) -> None:
        for split, content in self.content.items():
            (self.folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))

    def add_class(self, name: str) -> None:
        for content in self.content.values():
            content["categories"].append({"id": 7, "name": name})
        self.box["category_id"] = 7


def missing_picture(given: CleanSet) -> str:
    given.picture.unlink()
    return "image_file_present"


def truncated_picture(given: CleanSet) -> str:
    content = given.picture.read_bytes()
    given.picture.write_bytes(content[: given.draw(st.integers(0, len(content) - 40))])
    return "image_decodable"


def other_bytes(given: CleanSet) -> str:
    given.picture.write_bytes(given.draw(st.binary(max_size=300)))
    return "image_decodable"


def wrong_size(given: CleanSet) -> str:
    given.image[given.draw(st.sampled_from(["width", "height"]))] += given.draw(st.integers(1, 500))
    return "image_size"


def exchanged_size(given: CleanSet) -> str:
    given.image["width"], given.image["height"] = HEIGHT, WIDTH
    return "image_size"


def turned_by_exif(given: CleanSet) -> str:
    exif = Image.Exif()
    exif[0x0112] = given.draw(st.sampled_from([5, 6, 7, 8]))
    Image.open(given.picture).save(given.picture, "JPEG", exif=exif)
    return "image_size"


def misspelt_file_name(given: CleanSet) -> str:
    given.image["file_name"] = given.draw(st.text("abcxyz", min_size=1, max_size=9)) + ".jpg"
    return "image_file_present"


def path_out_of_the_folder(given: CleanSet) -> str:
    given.image["file_name"] = "../" * given.draw(st.integers(1, 4)) + "a.jpg"
    return "image_record"


def lost_field_of_image(given: CleanSet) -> str:
    del given.image[given.draw(st.sampled_from(["id", "file_name", "width", "height"]))]
    return "image_record"


def repeated_image_id(given: CleanSet) -> str:
    given.image["id"] = (given.image["id"] + 1) % SPLITS[given.split]
    return "image_id_unique"


def leaked_picture(given: CleanSet) -> str:
    given.split = "train"
    other = given.draw(st.sampled_from(["test", "val"]))
    shutil.copy(given.folder / f"images/{other}_0.jpg", given.picture)
    return "image_in_one_split"


def lost_field_of_box(given: CleanSet) -> str:
    del given.box[given.draw(st.sampled_from(["id", "image_id", "category_id", "bbox"]))]
    return "box_record"


def field_of_another_type(given: CleanSet) -> str:
    odd = st.sampled_from([None, [], {}, True, "x", [1, 2, 3], ["1", 2, 3, 4]])
    given.box["bbox"] = given.draw(odd)
    return "box_record"


def repeated_annotation_id(given: CleanSet) -> str:
    given.box["id"] = (given.box["id"] + given.draw(st.integers(1, 8))) % (3 * SPLITS[given.split])
    return "annotation_id_unique"


def unknown_image(given: CleanSet) -> str:
    given.box["image_id"] = given.draw(st.integers(100, 10**12))
    return "box_image_known"


def unknown_category(given: CleanSet) -> str:
    given.box["category_id"] = given.draw(st.integers(2, 10**12))
    return "box_category_known"


def number_that_is_none(given: CleanSet) -> str:
    place = given.draw(st.integers(0, 3))
    given.box["bbox"][place] = given.draw(st.sampled_from([float("nan"), float("inf"), float("-inf"), 10**400]))
    return "box_numbers_finite"


def no_extent(given: CleanSet) -> str:
    given.box["bbox"][given.draw(st.integers(2, 3))] = given.draw(st.floats(-50, 0))
    return "box_positive_area"


def over_the_border(given: CleanSet) -> str:
    place, border = given.draw(st.sampled_from([(0, WIDTH), (1, HEIGHT)]))
    side = given.box["bbox"][place + 2]
    given.box["bbox"][place] = border - side + given.draw(st.floats(1.01, side - 0.01))
    return "box_inside_image"


def tiny(given: CleanSet) -> str:
    given.box["bbox"][given.draw(st.integers(2, 3))] = given.draw(st.floats(0.01, 2.99))
    return "box_not_tiny"


def whole_image(given: CleanSet) -> str:
    given.box["bbox"] = [0, 0, WIDTH, HEIGHT - given.draw(st.floats(0, 0.5))]
    return "box_not_whole_image"


def nearly_the_same_box(given: CleanSet) -> str:
    x, y, w, h = given.box["bbox"]
    shift = given.draw(st.floats(0, 0.05)) * w
    boxes = given.content[given.split]["annotations"]
    boxes.append({**given.box, "id": 999, "bbox": [x + shift, y, w, h]})
    given.box_row = len(boxes) - 1
    return "box_not_repeated"


def the_same_box_as_another_class(given: CleanSet) -> str:
    boxes = given.content[given.split]["annotations"]
    boxes.append({**given.box, "id": 999, "category_id": 1 - given.box["category_id"]})
    given.box_row = len(boxes) - 1
    return "box_one_class"


def swapped_class(given: CleanSet) -> str:
    given.box["category_id"] = 1 - given.box["category_id"]
    return "box_size_of_class"


def misspelt_class(given: CleanSet) -> str:
    name = CLASSES[given.box["category_id"]]
    place = given.draw(st.integers(0, len(name) - 1))
    letter = given.draw(st.sampled_from(["", "q", name[place] * 2]))
    given.add_class(name[:place] + letter + name[place + 1 :])
    return "class_spelling"


def crowd(given: CleanSet) -> str:
    given.box["iscrowd"] = 1
    return "box_no_crowd"


def too_large_area(given: CleanSet) -> str:
    given.box["area"] *= given.draw(st.floats(1.2, 100))
    return "box_area"


def odd_class_name(given: CleanSet) -> str:
    given.add_class(given.draw(st.sampled_from(["<b>", "a\x00b", " c", "d\u202e", "e\n"])))
    return "class_name_plain"


def grey_picture(given: CleanSet) -> str:
    Image.open(given.picture).convert("L").save(given.picture, "JPEG")
    return "image_colour"


def wrong_suffix(given: CleanSet) -> str:
    form = given.draw(st.sampled_from(["PNG", "BMP", "WEBP"]))
    Image.open(given.picture).save(given.picture, form)
    return "image_suffix"


def picture_without_record(given: CleanSet) -> str:
    write_picture(given.folder / "images/extra.jpg", 77)
    return "picture_listed"


def copy_with_other_boxes(given: CleanSet) -> str:
    first = f"{given.split}_0.jpg"
    given.row = given.row or 1
    shutil.copy(given.folder / "images" / first, given.picture)
    given.content[given.split]["annotations"][3 * given.row]["bbox"][0] += given.draw(st.floats(0.5, 2))
    return "image_boxes_agree"


def lost_head(given: CleanSet) -> str:
    del given.content[given.split][given.draw(st.sampled_from(["info", "licenses"]))]
    return "coco_keys"


def other_class_list(given: CleanSet) -> str:
    given.content[given.split]["categories"][given.draw(st.integers(0, 1))]["name"] = "another"
    return "categories_agree"


def torn_file(given: CleanSet) -> str:
    given.write()
    file = given.folder / f"annotations/instances_{given.split}.json"
    text = file.read_text()
    file.write_text(text[: given.draw(st.integers(0, len(text) - 1))])
    return REFUSED


KINDS = [
    missing_picture, truncated_picture, other_bytes, wrong_size, exchanged_size, turned_by_exif, misspelt_file_name,
    path_out_of_the_folder, lost_field_of_image, repeated_image_id, leaked_picture, lost_field_of_box,
    field_of_another_type, repeated_annotation_id, unknown_image, unknown_category, number_that_is_none, no_extent,
    over_the_border, tiny, whole_image, nearly_the_same_box, the_same_box_as_another_class, swapped_class,
    misspelt_class, crowd, too_large_area, odd_class_name, grey_picture, wrong_suffix, picture_without_record,
    copy_with_other_boxes, lost_head, other_class_list, torn_file,
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(f"{split}_{i}.jpg" for split, count in SPLITS.items() for i in range(count)):
        write_picture(folder / name, seed, WIDTH, HEIGHT)
    return folder


def told(folder: Path) -> list[tuple[str, str]]:
    """(rule, record) of everything that is told of a folder."""
    try:
        judged = judge_set("target", read_folder(folder), folder, ValidationLimits(), threads=1)
    except DataError as error:
        assert "\n" not in str(error)
        return [(REFUSED, str(error))]
    entries = [*judged.entries("error"), *judged.entries("warning")]
    return [(entry["rule"], f"{entry['file']} {entry['record']}") for entry in entries]


def place_of(given: CleanSet) -> str:
    """Text that an entry about the corruption must have in its file or record."""
    rule = given.rule
    if rule == "picture_listed":
        return "images/extra.jpg"
    if rule in (REFUSED, "coco_keys", "categories_agree", "class_name_plain"):
        return ""
    row, key = (given.row, "images") if rule.startswith("image") else (given.box_row, "annotations")
    return f"instances_{given.split}.json#/{key}/{row}"


def corrupted(folder: Path, pictures: Path, draw: Draw, kind: Callable[[CleanSet], str]) -> CleanSet:
    """A set in a folder, with one corruption."""
    shutil.copytree(pictures, folder / "images")
    (folder / "annotations").mkdir()
    made = CleanSet(folder, draw)
    made.rule = kind(made)
    if made.rule != REFUSED:
        made.write()
    return made


def untouched(given: CleanSet) -> str:
    return ""


def test_nothing_is_told_of_the_set_before(pictures: Path) -> None:
    @settings(max_examples=1, deadline=None, database=None)
    @given(st.data())
    def judge(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            assert told(corrupted(Path(scratch), pictures, data.draw, untouched).folder) == []

    judge()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_random_corruptions_are_told(pictures: Path, kind: Callable[[CleanSet], str]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def corrupt(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            given = corrupted(Path(scratch), pictures, data.draw, kind)
            found = told(given.folder)
        MADE[kind.__name__] += 1
        rule, where = given.rule, place_of(given)
        caught = any(r == rule and where in place for r, place in found)
        FOUND[kind.__name__] += caught
        assert caught, f"{rule} at {where} is not among {found}"

    corrupt()


@pytest.mark.slow
def test_recall_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the table (pytest -s shows it); the tests before it have asserted every single case."""
    with capsys.disabled():
        print("\nkind of defect                 made  told  recall")
        for kind in MADE:
            print(f"{kind:30} {MADE[kind]:4} {FOUND[kind]:5} {FOUND[kind] / MADE[kind]:7.1%}")
    assert FOUND == MADE
