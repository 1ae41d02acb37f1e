"""Sets made to do harm: refused with a sentence, or shown escaped."""

from __future__ import annotations

import csv
import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from foreign_sets import write_picture, write_voc, write_yolo

from pipeline_tasks.data.readers import read_folder
from pipeline_tasks.errors import DataError
from pipeline_tasks.validation import ValidationLimits
from pipeline_tasks.validation.folder import validate_folder
from pipeline_tasks.validation.images import inspect_images

LONGEST_S = 10  # what would expand takes minutes or all memory
LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
XML = [
    (f'<!DOCTYPE annotation [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>', "declares the entity 'l0'"),
    ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "declares the entity 'x'"),
    ('<!DOCTYPE a [<!ENTITY % x SYSTEM "http://localhost/x">%x;]><annotation/>', "declares the entity 'x'"),
    ("<annotation>" + "<a>" * 10_000, "nests elements more than 32 deep"),
    ("<html><annotation></annotation></html>", "begins with <html> in place of <annotation>"),
    ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "is broken XML"),
    ("<annotation>\x00</annotation>", "is broken XML at line 1"),
]


@pytest.mark.parametrize(("text", "sentence"), XML, ids=range(len(XML)))
def test_xml_that_expands_reads_files_or_never_ends(tmp_path: Path, text: str, sentence: str) -> None:
    for stem in ("good", "bad"):
        write_picture(tmp_path / f"JPEGImages/{stem}.jpg", len(stem))
        write_voc(tmp_path, stem, ("x", 1, 2, 3, 4))
    (tmp_path / "Annotations/bad.xml").write_text(text)
    began = time.monotonic()
    raw = read_folder(tmp_path)
    assert time.monotonic() - began < LONGEST_S
    (problem,) = raw.problems
    assert problem.file == "Annotations/bad.xml" and problem.detail.startswith(sentence)
    assert len(raw.boxes) == 1


def test_voc_file_names_stay_in_the_folder(tmp_path: Path) -> None:
    write_picture(tmp_path / "outside.jpg", 0)
    write_picture(tmp_path / "set/JPEGImages/b.jpg", 1)
    write_voc(tmp_path / "set", "a", ("x", 1, 2, 3, 4), filename="../../outside.jpg")
    write_voc(tmp_path / "set", "c", ("x", 1, 2, 3, 4), filename="/etc/passwd")
    assert read_folder(tmp_path / "set").images["path"].to_pylist() == ["JPEGImages/outside.jpg", "JPEGImages/passwd"]


def test_yaml_that_expands_is_refused(tmp_path: Path) -> None:
    write_yolo(tmp_path, "a", "0 0.5 0.5 0.1 0.1\n")
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "names: [x]"]))
    with pytest.raises(DataError, match=r"data.yaml is not valid YAML: line 2: aliases \(\*name\) are not accepted"):
        read_folder(tmp_path)
    (tmp_path / "data.yaml").write_text("names: !!python/object/apply:os.system ['true']")
    with pytest.raises(DataError, match="could not determine a constructor for the tag"):
        read_folder(tmp_path)
    (tmp_path / "data.yaml").write_text("names: " + "[" * 100_000)
    with pytest.raises(DataError, match="is not valid YAML"):
        read_folder(tmp_path)


def test_yaml_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_picture(tmp_path / "images/secret.jpg", 0)
    write_yolo(tmp_path / "set", "a", "0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "list.txt").write_text("secret.jpg\n")
    (tmp_path / "set/data.yaml").write_text(f"path: ..\ntrain: [../images, {tmp_path}/list.txt]\nnames: [x]\n")
    raw = read_folder(tmp_path / "set")
    assert raw.images["path"].to_pylist() == ["images/a.jpg"] and raw.images["split"].to_pylist() == ["train"]


NUMBERS = ["1" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "true", '"5"', "[[[[[]]]]]", "{}", "null"]


@pytest.mark.parametrize("text", NUMBERS)
def test_json_number_tricks_are_told_and_crash_nothing(coco_folder: Any, text: str) -> None:
    file = coco_folder.annotation_file("val")
    file.write_text(file.read_text().replace('"bbox": [4, 5, 10.5, 8]', f'"bbox": [4, {text}, 10.5, 8]', 1))
    try:
        report = validate_without_suites(coco_folder.path)
    except DataError as error:
        assert "instances_val.json: broken JSON" in str(error)
    else:
        assert len(report) == 1 and report[0]["record"] == "annotations/instances_val.json#/annotations/0"


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "area", "iscrowd", "bbox", "segmentation"])
@pytest.mark.parametrize("value", ["[" * 900 + "]" * 900, "1" * 4000, '{"a": {"b": []}}'])
def test_any_value_in_any_field_of_a_record_is_judged(coco_folder: Any, key: str, value: str) -> None:
    with coco_folder.edit("val") as content:
        content["annotations"][0][key] = "PLACE"
    file = coco_folder.annotation_file("val")
    file.write_text(file.read_text().replace('"PLACE"', value))
    read_folder(coco_folder.path)


def validate_without_suites(folder: Path) -> list[dict[str, Any]]:
    from pipeline_tasks.validation.datasets import judge_set

    return list(judge_set("target", read_folder(folder), folder, ValidationLimits()).entries("error"))


def png_of(width: int, height: int) -> bytes:
    """A PNG of one colour, a thousand times smaller than its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * 8), 9)  # too few rows: nothing may get as far as to notice
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


OTHER_FILES = [
    (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "not a picture in one of the formats"),
    (b"#!/bin/sh\nrm -rf /\n", "not a picture in one of the formats"),
    (b"<html><script>alert(1)</script></html>", "not a picture in one of the formats"),
    (b"GIF89a" + bytes(100), "not a picture in one of the formats"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a picture in one of the formats"),
    (png_of(60_000, 60_000), "it has 3600.0 megapixels, more than the 178 of"),
    (png_of(2**31 - 1, 2**31 - 1), "megapixels"),
]


@pytest.mark.parametrize(("content", "reason"), OTHER_FILES, ids=range(len(OTHER_FILES)))
def test_what_only_calls_itself_a_picture(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    began = time.monotonic()
    (row,) = inspect_images(tmp_path, ["a.jpg"]).to_pylist()
    assert row["decodable"] is False and reason in row["decode_error"]
    assert time.monotonic() - began < LONGEST_S


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    rows = inspect_images(tmp_path, ["a.jpg", "b.jpg"]).to_pylist()
    assert [row["decode_error"] for row in rows] == ["it is no regular file"] * 2


MARKUP = "<svg onload=alert(1)>&\x1b[31m\u202e"


def test_markup_and_control_characters_reach_no_report(coco_folder: Any, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        with coco_folder.edit(split) as content:
            content["categories"][0]["name"] = MARKUP
            content["info"]["description"] = MARKUP
            content["licenses"][0]["name"] = MARKUP
    with coco_folder.edit("train") as content:
        content["images"][1]["file_name"] = f"{MARKUP}.jpg"
        content["images"][2]["file_name"] = "=cmd|' /C calc'!A0.jpg"
        content["annotations"][0]["category_id"] = MARKUP
        content["annotations"][1]["iscrowd"] = MARKUP
        content["annotations"][4]["id"] = content["annotations"][5]["id"] = MARKUP
    report = validate_folder(coco_folder.path, tmp_path / "report", ValidationLimits())
    pages = list((tmp_path / "report/data_docs").rglob("*.html"))
    assert len(pages) >= 5
    for page in pages:
        text = page.read_text()
        assert "<svg" not in text and "\x1b" not in text and "\u202e" not in text, page
    for line in [*report.lines(), *report.content["violations"]]:
        assert line.isprintable()
    for name in ("quarantine", "warnings"):
        with (tmp_path / f"report/{name}.csv").open(newline="") as sheet:
            cells = [cell for row in csv.reader(sheet) for cell in row]
        assert all(cell.isprintable() and cell[:1] not in ("=", "+", "-", "@") for cell in cells)
    entries = [json.loads(line) for line in (tmp_path / "report/quarantine.jsonl").read_text().splitlines()]
    assert any(MARKUP in entry["file"] for entry in entries)  # JSON escapes by itself and keeps what is there
