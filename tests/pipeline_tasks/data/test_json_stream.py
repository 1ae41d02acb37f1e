"""Reading in parts gives the rows that reading as a whole gives, wherever the parts are cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline_tasks.data import json_stream
from pipeline_tasks.data.json_records import read_json_object
from pipeline_tasks.data.json_stream import NotStreamableError, stream_json_object
from pipeline_tasks.data.record_parts import annotation_parts, image_parts
from pipeline_tasks.data.records import AnnotationRecords, ImageRecords

IMAGE = {"id": 7, "file_name": "a/b.jpg", "width": 48, "height": 32, "license": 1}
BOX = {"id": 3, "image_id": 7, "category_id": 1, "bbox": [1, 2.5, 3, 4], "area": 12.0, "iscrowd": 0}
IMAGES: list[Any] = [
    {"file_name": '}, {"x": "}]'}, {"file_name": "ünïcode/猫.jpg"}, {"file_name": "a//b.jpg"}, {"file_name": "../x"},
    {"file_name": "./c.jpg"}, {"file_name": "d/"}, {"file_name": "q\\"}, {"license": None}, {"license": "MIT"},
    {"license": 1.5}, {"width": 0}, {"width": 2**70}, {"height": "32"}, {"id": "text"}, {"id": 2**80}, {"id": 5.0},
    {"id": None}, {"more": {"a": [{"b": 1}, {"c": 2}]}}, {"file_name": "e..f/.g.jpg"},
]  # fmt: skip
BOXES: list[Any] = [
    {"bbox": [1, 2, 3]}, {"bbox": None}, {"bbox": [1, 2, 3, "4"]}, {"bbox": [True, 2, 3, 4]},
    {"bbox": [1e999, 0, 1, 1]},
    {"bbox": [float("nan"), 0, 1, 1]}, {"bbox": [10**400, 0, 1, 1]}, {"area": None}, {"area": "big"}, {"iscrowd": 1},
    {"iscrowd": True}, {"iscrowd": 2}, {"iscrowd": None}, {"segmentation": []}, {"segmentation": [[1, 2, 3, 4, 5, 6]]},
    {"segmentation": {"counts": [1, 2], "size": [3, 4]}}, {"segments": [{"id": 1}, {"id": 2}]}, {"image_id": "x"},
    {"category_id": 3.0}, {"category_id": 2.5}, {"id": -(2**63)}, {"note": "],[{}]}, {"},
    {"id": 2**53 - 1}, {"id": 2**53}, {"id": 2**53 + 1}, {"id": True}, {"image_id": -0.0}, {"image_id": 0.5},
    {"iscrowd": 1.0}, {"iscrowd": False}, {"iscrowd": 0.5}, {"bbox": [1, 2, 3, 4, 5]}, {"bbox": {"x": 1}},
]  # fmt: skip


FORMS: list[dict[str, Any]] = [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}]


def document(**separators: Any) -> bytes:
    images = [IMAGE, *({**IMAGE, **change} for change in IMAGES), "text", IMAGE]
    boxes = [BOX, *({**BOX, **change} for change in BOXES), 5, BOX, {}]
    boxes += [{key: BOX[key] for key in BOX if key != left_out} for left_out in BOX]
    content = {
        "info": {"description": "}]"}, "images": images, "licenses": [], "annotations": boxes,
        "categories": [{"id": 1, "name": "c"}], "count": 17,
    }  # fmt: skip
    return json.dumps(content, **separators).encode()


def streamed(file: Path, block_bytes: int) -> tuple[pa.Table, pa.Table, int, dict[str, Any]]:
    images, boxes = ImageRecords("f.json", "val"), AnnotationRecords("f.json", "val")
    sinks = {"images": image_parts(images), "annotations": annotation_parts(boxes)}
    members, sha256 = stream_json_object(file, sinks, block_bytes)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    return images.table(), boxes.table(), boxes.empty_segmentations, members


def as_rows(table: pa.Table) -> list[str]:
    return [repr(row) for row in table.to_pylist()]  # NaN differs from itself


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 7, 64, 500, 5000, 1 << 20])
@pytest.mark.parametrize("separators", FORMS, ids=["plain", "indented", "compact", "utf-8"])
def test_equals_reading_as_a_whole(tmp_path: Path, block_bytes: int, separators: dict[str, Any]) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(document(**separators))
    images, boxes = ImageRecords("f.json", "val"), AnnotationRecords("f.json", "val")
    members = read_json_object(file.read_bytes(), file, {"images": images.add, "annotations": boxes.add})
    found = streamed(file, block_bytes)
    assert as_rows(found[0]) == as_rows(images.table()) and as_rows(found[1]) == as_rows(boxes.table())
    assert found[2] == boxes.empty_segmentations == 1 and found[3] == members


def test_clean_records_need_no_python_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"images": [IMAGE] * 50, "annotations": [BOX] * 500}))
    seen: list[int] = []
    monkeypatch.setattr(AnnotationRecords, "add", lambda self, position, record: seen.append(position))
    assert streamed(file, 999)[1]["source_record"][499].as_py() == "f.json#/annotations/499" and seen == []


def test_empty_arrays_byte_order_mark_and_no_members(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(b'\xef\xbb\xbf {"images" : [ ] , "annotations":[]}\n ')
    assert streamed(file, 5)[3] == {"images": 0, "annotations": 0}
    file.write_bytes(b"{}")
    assert streamed(file, 5)[3] == {}


BROKEN = [
    b"", b"[1]", b'{"images": [{"id": 1}', b'{"images": {}}', b'{"images": [1 2]}', b'{"a": 1,}', b'{"a": 1} x',
    b'{"images": [{}],}', b'{a: 1}', b'{"a" 1}', b'{"a":\n"\xff', b'{"a": ' + b"[" * 100_000, b'{"images": [{},]}',
    b'{"annotations": [{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}]}",
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_what_is_broken_is_left_to_the_exact_reader(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content)
    for block_bytes in (3 if len(content) < 100 else 5000, 1 << 20):
        with pytest.raises(NotStreamableError):
            streamed(file, block_bytes)


def test_a_disk_that_fails_in_the_reading_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read, calls = tmp_path / "f.json", json_stream._Stream._read, list[int]()
    file.write_bytes(document())

    def failing(stream: Any) -> bytes:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(stream)

    monkeypatch.setattr(json_stream._Stream, "_read", failing)
    with pytest.raises(OSError, match="Input/output error"):
        streamed(file, 64)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("digest")]


@pytest.mark.parametrize("separators", FORMS, ids=["plain", "indented", "compact", "utf-8"])
def test_records_with_lists_of_objects_are_read_in_parts(tmp_path: Path, separators: dict[str, Any]) -> None:
    """Panoptic files: the ends of records look like those of the objects in them."""
    segments = [{"id": place, "bbox": [1, 2, 3, 4], "note": 'a "}]" \\'} for place in range(30)]
    records = [{**BOX, "id": number, "segments_info": segments, "more": [[{"a": []}]]} for number in range(40)]
    file = tmp_path / "f.json"
    file.write_text(json.dumps({"annotations": records, "images": [IMAGE] * 3, "info": {}}, **separators))
    boxes, parts = AnnotationRecords("f.json", "val"), list[int]()

    def sink(position: int, part: bytes) -> int | None:
        count = annotation_parts(boxes)(position, part)
        parts.append(len(part))
        return count

    members, _ = stream_json_object(file, {"annotations": sink}, 4096)
    assert boxes.table()["annotation_id"].to_pylist() == [str(number) for number in range(40)]
    assert members == {"annotations": 40, "images": [IMAGE] * 3, "info": {}}
    assert len(parts) > 10 and max(parts) < 4 * 4096
