"""Mapped columns are those that are read from Parquet."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.data import mapped_tables, tables
from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, read_dataset, write_dataset

METADATA = DatasetMetadata("yard", ("cat", "dog"), (17, 18), ("target", "extra"))


def content() -> tuple[pa.Table, pa.Table]:
    """Six images in disorder, one of them without boxes; ids have gaps."""
    random = np.random.default_rng(3)
    ids = [11, 2, 7, 4, 9, 30]
    images = [
        {"image_id": i, "original_id": str(i), "root": i % 2, "path": f"{i}.jpg", "width": 90 + i, "height": 50,
         "split": "val" if i == 7 else "train", "sha256": None if i == 4 else "ff", "licence": None}
        for i in ids
    ]  # fmt: skip
    boxes = [
        {"image_id": int(random.choice(ids[:5])), "category": number % 2, "x": random.random(), "y": 1.0, "w": 5.0,
         "h": 2.0, "area": 9.0, "iscrowd": number % 5 == 0, "score": 0.5, "source": "label",
         "annotation_id": f"a{number}", "source_record": "f"}
        for number in range(50)
    ]  # fmt: skip
    return pa.Table.from_pylist(images, schema=IMAGES_SCHEMA), pa.Table.from_pylist(boxes, schema=BOXES_SCHEMA)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The same set without and with mapped columns, the latter written in several parts."""
    write_dataset(tmp_path / "plain", *content(), METADATA)
    monkeypatch.setattr(mapped_tables, "FROM_BOXES", 1)
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 13)
    write_dataset(tmp_path / "large", *content(), METADATA)
    return tmp_path / "plain", tmp_path / "large"


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray) and type(one) is type(other) is np.ndarray
        return one.dtype == other.dtype and np.array_equal(one, other)
    return isinstance(one, pa.ChunkedArray) and one.equals(other)


def test_mapped_columns_equal_those_that_are_read(folders: tuple[Path, Path]) -> None:
    plain, mapped = (read_dataset(folder) for folder in folders)
    assert not (folders[0] / "mapped").exists() and (folders[1] / "mapped").is_dir()
    for field in fields(plain.columns):
        assert same(getattr(plain.columns, field.name), getattr(mapped.columns, field.name)), field.name
    assert mapped.images.equals(plain.images) and mapped.boxes.equals(plain.boxes)
    for index in range(6):
        ours, theirs = mapped.image_set().boxes(index), plain.image_set().boxes(index)
        assert np.array_equal(ours.boxes_xyxy, theirs.boxes_xyxy) and ours.annotation_id == theirs.annotation_id
    ours, theirs = mapped.split("val").all_boxes(), plain.split("val").all_boxes()
    assert np.array_equal(ours.boxes_xywh, theirs.boxes_xywh) and len(ours.labels)


def test_opening_reads_no_box(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_read_table", lambda *arguments: pytest.fail("Parquet was read"))
    assert read_dataset(folders[1]).split("train").class_counts().keys() == {"cat", "dog"}


def test_boxes_in_order_of_their_images_are_written_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, boxes = content()
    order = np.argsort(boxes["image_id"].to_numpy(), kind="stable")
    monkeypatch.setattr(mapped_tables, "FROM_BOXES", 1)
    write_dataset(tmp_path / "disorder", images, boxes, METADATA)
    write_dataset(tmp_path / "order", images, boxes.take(pa.array(order)), METADATA)
    for file in (tmp_path / "order").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "disorder" / file.relative_to(tmp_path / "order")).read_bytes()


def test_what_does_not_belong_to_the_tables_is_refused(folders: tuple[Path, Path]) -> None:
    plain, large = folders
    images, boxes = content()
    shutil.copytree(large / "mapped", plain.parent / "kept")
    write_dataset(large, images, boxes.slice(0, 20), METADATA)
    shutil.rmtree(large / "mapped")
    shutil.copytree(plain.parent / "kept", large / "mapped")
    with pytest.raises(ValueError, match="large/mapped does not belong to the tables beside it; remove it"):
        read_dataset(large)
    (large / "mapped/labels.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"large/mapped cannot be read .*; remove it, or write the dataset again"):
        read_dataset(large)
    shutil.rmtree(large / "mapped")
    assert read_dataset(large).image_set().box_counts.sum() == 20


def test_a_small_set_in_its_place_has_no_mapped_columns(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_tables, "FROM_BOXES", 1000)
    write_dataset(folders[1], *content(), METADATA)
    assert not (folders[1] / "mapped").exists()


@pytest.mark.parametrize("name", ["images.parquet", "boxes.parquet"])
def test_a_damaged_table_beside_mapped_columns_is_named(folders: tuple[Path, Path], name: str) -> None:
    (folders[1] / name).write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=f"large/{name} cannot be read as Parquet"):
        read_dataset(folders[1])
    (folders[1] / name).unlink()
    with pytest.raises(ValueError, match=f"large/{name} does not exist"):
        read_dataset(folders[1])


@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_parts_are_the_rows_in_the_wanted_order(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_tables, "ROWS_PER_BATCH", 6)
    numbers = pa.chunked_array([np.arange(0, 15), np.arange(15, 40)])
    texts = pa.chunked_array(
        [[f"text {i}" if i % 3 else None for i in range(first, first + 10)] for first in range(0, 40, 10)]
    )
    table = pa.table({"number": numbers, "text": texts})
    order = np.random.default_rng(0).permutation(40)
    found = list(mapped_tables.parts(table, order, rows))
    assert [len(part) for part in found[:-1]] == [rows] * (len(found) - 1)
    assert pa.concat_tables(found).to_pydict() == table.take(pa.array(order)).to_pydict()
    assert pa.concat_tables(mapped_tables.parts(table, None, rows)).to_pydict() == table.to_pydict()
    for empty in (order[:0], None):
        assert [len(part) for part in mapped_tables.parts(table.slice(0, 0), empty, rows)] == [0]
