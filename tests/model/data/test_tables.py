"""The dataset contract on disk and the views of it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.data.tables import (
    BOXES_SCHEMA,
    IMAGES_SCHEMA,
    DatasetMetadata,
    ImageSet,
    concatenate,
    read_dataset,
    write_dataset,
)

METADATA = DatasetMetadata(
    name="yard",
    class_names=("cat", "dog"),
    category_ids=(17, 18),
    roots=("target", "extra"),
    licences={"images": {"CC0-1.0": 3}, "annotations": "MIT"},
    quarantined={"test": 1},
)


def image(image_id: int, split: str = "train", **changes: object) -> dict[str, object]:
    row = {"image_id": image_id, "original_id": f"o{image_id}", "root": image_id % 2, "path": f"images/{image_id}.jpg"}
    return {**row, "width": 100 + image_id, "height": 50, "split": split, "sha256": None, "licence": None, **changes}


def box(image_id: int, category: int, x: float, **changes: object) -> dict[str, object]:
    row = {"image_id": image_id, "category": category, "x": x, "y": 1.25, "w": 10.0, "h": 4.0, "area": 33.0}
    extra = {"iscrowd": False, "score": 1.0, "source": "label", "annotation_id": f"a{x}", "source_record": "file:1"}
    return {**row, **extra, **changes}


IMAGES = [image(3, "val"), image(1), image(2, sha256="ff"), image(7)]
BOXES = [box(3, 0, 5.5), box(1, 1, 2.0), box(3, 1, 4.0, iscrowd=True), box(7, 0, 6.0, score=0.5, source="pseudo")]


def tables(
    images: list[dict[str, object]] = IMAGES, boxes: list[dict[str, object]] = BOXES
) -> tuple[pa.Table, pa.Table]:
    return pa.Table.from_pylist(images, schema=IMAGES_SCHEMA), pa.Table.from_pylist(boxes, schema=BOXES_SCHEMA)


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", *tables(), METADATA)
    return tmp_path / "set"


def test_rows_come_back_sorted_with_their_metadata(dataset_folder: Path) -> None:
    dataset = read_dataset(dataset_folder)
    assert dataset.metadata == METADATA
    assert dataset.images["image_id"].to_pylist() == [1, 2, 3, 7]
    assert dataset.boxes["x"].to_pylist() == [2.0, 5.5, 4.0, 6.0]  # two boxes of image 3 keep their order
    assert dataset.split_names == ["train", "val"]


def test_bytes_do_not_depend_on_the_order_of_images(tmp_path: Path, dataset_folder: Path) -> None:
    write_dataset(tmp_path / "other", *tables(IMAGES[::-1]), METADATA)
    for name in ("images.parquet", "boxes.parquet", "dataset.json"):
        assert (tmp_path / "other" / name).read_bytes() == (dataset_folder / name).read_bytes()


def test_image_set_gives_paths_sizes_and_boxes(dataset_folder: Path) -> None:
    train = read_dataset(dataset_folder).split("train")
    assert [train.path(index) for index in range(3)] == [
        "extra/images/1.jpg",
        "target/images/2.jpg",
        "extra/images/7.jpg",
    ]
    assert train.size(2) == (107, 50)
    assert [train.sha256(index) for index in range(3)] == [None, "ff", None]
    np.testing.assert_array_equal(train.box_counts, [1, 0, 1])
    found = train.boxes(2)
    np.testing.assert_array_equal(found.boxes_xyxy, np.array([[6.0, 1.25, 16.0, 5.25]], np.float32))
    assert (found.labels.tolist(), found.weights.tolist(), found.area.tolist()) == ([0], [0.5], [33.0])
    assert found.annotation_id == ["a6.0"]
    assert len(train.boxes(1)) == 0
    assert train.class_counts() == {"cat": 1, "dog": 1}


def test_crowds_are_kept_and_not_counted(dataset_folder: Path) -> None:
    val = read_dataset(dataset_folder).split("val")
    assert val.boxes(0).is_crowd.tolist() == [False, True]
    assert val.class_counts() == {"cat": 1, "dog": 0}


def naive_boxes(image_set: ImageSet) -> list[tuple[int, float, int]]:
    return [
        (index, float(corner), int(label))
        for index in range(len(image_set))
        for corner, label in zip(image_set.boxes(index).boxes_xyxy[:, 0], image_set.boxes(index).labels, strict=True)
    ]


@pytest.mark.parametrize("rows", [[2, 0, 3, 2], [1], [], [True, False, False, True]])
def test_all_boxes_of_a_subset_are_those_of_its_images(dataset_folder: Path, rows: list[int]) -> None:
    chosen = read_dataset(dataset_folder).image_set().subset(rows)
    flat = chosen.all_boxes()
    listed = list(zip(flat.image_index.tolist(), flat.boxes_xyxy[:, 0].tolist(), flat.labels.tolist(), strict=True))
    assert listed == naive_boxes(chosen)


def test_concatenate_keeps_images_boxes_and_order(dataset_folder: Path) -> None:
    whole = read_dataset(dataset_folder).image_set()
    parts = [whole.subset([3, 1]), whole.subset([2]), whole.subset([])]
    joined = concatenate(parts)
    assert joined.image_ids.tolist() == [7, 2, 3]
    assert [joined.path(index) for index in range(3)] == [whole.path(3), whole.path(1), whole.path(2)]
    assert joined.boxes(2).annotation_id == ["a5.5", "a4.0"]
    assert naive_boxes(joined) == [(0, 6.0, 0), (2, 5.5, 0), (2, 4.0, 1)]
    assert joined.sha256(1) == "ff"


def test_concatenate_refuses_other_classes(dataset_folder: Path) -> None:
    whole = read_dataset(dataset_folder).image_set()
    other = ImageSet.from_arrays(("dog", "cat"), ["target/a.jpg"], [(5, 5)])
    with pytest.raises(ValueError, match=r"\['dog', 'cat'\].*\['cat', 'dog'\]"):
        concatenate([whole, other])


def test_set_from_arrays_equals_the_set_from_tables(dataset_folder: Path) -> None:
    whole = read_dataset(dataset_folder).image_set()
    flat = whole.all_boxes()
    shuffled = np.array([3, 0, 2, 1])
    paths = [whole.path(index) for index in range(len(whole))]
    made = ImageSet.from_arrays(
        whole.class_names,
        paths,
        whole.sizes,
        flat.image_index[shuffled],
        flat.boxes_xywh[shuffled],
        flat.labels[shuffled],
        scores=flat.scores[shuffled],
        is_crowd=flat.is_crowd[shuffled],
    )
    assert sorted(naive_boxes(made)) == sorted(naive_boxes(whole))
    assert made.boxes(3).weights.tolist() == [0.5]


def test_image_set_survives_the_way_to_a_process(dataset_folder: Path) -> None:
    val = read_dataset(dataset_folder).split("val")
    copy = pickle.loads(pickle.dumps(val))
    assert (copy.path(0), naive_boxes(copy)) == (val.path(0), naive_boxes(val))


def test_a_set_without_any_box_or_image_works(tmp_path: Path) -> None:
    write_dataset(tmp_path / "none", *tables([], []), METADATA)
    assert len(read_dataset(tmp_path / "none").image_set()) == 0
    write_dataset(tmp_path / "images", *tables(IMAGES, []), METADATA)
    assert read_dataset(tmp_path / "images").image_set().box_counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("images", "boxes", "message"),
    [
        ([*IMAGES, image(1)], BOXES, "image_id 1 occurs more than once"),
        (IMAGES, [box(9, 0, 1.0)], "1 boxes belong to no image, the first to image_id 9"),
        (IMAGES, [box(1, 2, 1.0)], "boxes.category holds 2, but there are only 2 class names"),
        ([image(1, root=2)], [], "images.root holds 2, but there are only 2 roots"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, images: list[dict[str, object]], boxes: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "set", *tables(images, boxes), METADATA)
    assert not (tmp_path / "set").exists()


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    images, boxes = tables()
    with pytest.raises(ValueError, match=r"boxes.parquet lacks the columns \['h'\]"):
        write_dataset(tmp_path, images, boxes.drop_columns(["h"]), METADATA)
    with pytest.raises(ValueError, match=r"images.parquet has unknown columns \['mood'\]"):
        write_dataset(tmp_path, images.append_column("mood", pa.array(["x"] * 4)), boxes, METADATA)
    empty = images.set_column(3, "path", pa.array(["a", None, "b", "c"]))
    with pytest.raises(ValueError, match="column 'path' has 1 empty values"):
        write_dataset(tmp_path, empty, boxes, METADATA)


def test_metadata_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="2 class names but 1 category ids"):
        DatasetMetadata("x", ("a", "b"), (1,), ("target",))
    with pytest.raises(ValueError, match="lists a class name twice"):
        DatasetMetadata("x", ("a", "a"), (1, 2), ("target",))


def test_unknown_split_is_named(dataset_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val'\]"):
        read_dataset(dataset_folder).split("test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.parquet", b"PAR1 not really", "boxes.parquet cannot be read as Parquet"),
        ("dataset.json", b"{", "dataset.json is not valid JSON"),
        ("dataset.json", b'{"schema_version": 99}', "schema version 99"),
        ("dataset.json", b'{"schema_version": 1, "mood": 2}', "fields that do not fit"),
    ],
)
def test_damaged_files_are_named(dataset_folder: Path, name: str, content: bytes, message: str) -> None:
    (dataset_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_dataset(dataset_folder)


def test_missing_file_is_named(dataset_folder: Path) -> None:
    (dataset_folder / "images.parquet").unlink()
    with pytest.raises(ValueError, match=r"images\.parquet does not exist"):
        read_dataset(dataset_folder)


def test_metadata_file_is_plain_json(dataset_folder: Path) -> None:
    content = json.loads((dataset_folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["class_names"] == ["cat", "dog"]
    assert content["licences"]["images"] == {"CC0-1.0": 3}
