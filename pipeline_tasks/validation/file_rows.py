"""Findings on files as a whole, as rows: one for each note, with a column for each rule of `FILE_RULES`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline_tasks.data.raw import UNSPLIT, Problem, RawDataset
from pipeline_tasks.validation.warning_rules import FILE_RULES

_NOT_PLAIN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff<>]|^\s|\s$")
"""Control and direction characters, markup, and blanks at the ends."""


def file_rows(raw: RawDataset) -> pa.Table:
    """One row for each note on a file, with a column for each of `FILE_RULES`."""
    notes = [*raw.notes, *_picture_notes(raw), *_class_notes(raw), *_split_notes(raw)]
    columns: dict[str, Any] = {
        "path": pa.array([note.file for note in notes], pa.string()),
        "split": pa.array([""] * len(notes), pa.string()),
        "source_record": pa.array([_place(note) for note in notes], pa.string()),
        "note": pa.array([note.detail for note in notes], pa.string()),
    }
    for rule in FILE_RULES:
        values = [note.detail if note.rule == rule.name else None for note in notes]
        columns[rule.column] = pa.array(values, pa.string())
    return pa.table(columns)


def _place(note: Problem) -> str:
    return f"{note.file}#{note.record}" if note.record else note.file


def _picture_notes(raw: RawDataset) -> Iterator[Problem]:
    for path in raw.unlisted_files:
        yield Problem("picture_listed", path, "", "no record names the picture: it is left out")


def _class_notes(raw: RawDataset) -> Iterator[Problem]:
    """Class names that cannot be shown as they are; named at the first box of the class."""
    for index, name in enumerate(raw.metadata.class_names):
        if _NOT_PLAIN.search(name):
            row = pc.index(raw.boxes["category"], pa.scalar(index, pa.int32())).as_py()
            record = raw.boxes["source_record"][row].as_py() if row >= 0 else next(iter(raw.metadata.digests), "")
            file, _, place = record.partition("#")
            yield Problem(
                "class_name_plain", file, place, f"the class {name!r} has markup, blanks or control characters"
            )


def _split_notes(raw: RawDataset) -> Iterator[Problem]:
    if raw.labelled and pc.unique(raw.images["split"]).to_pylist() == [UNSPLIT]:
        file = raw.images["source_record"][0].as_py().partition("#")[0]
        detail = "neither folders nor lists tell training, validation and test images apart; run `nasline data split`"
        yield Problem("splits_given", file, "", detail)
