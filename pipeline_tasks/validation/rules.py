"""The rules as data: which derived column each looks at, what it must hold, and what to do about a bad row.

One rule is one Great Expectations expectation (`suites.py`) and one row mask for the quarantine (`bad_rows`).
Both are made from the same fields, and `suites.py` checks that they find the same number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Check = Literal["is_null", "is_unique", "is_true", "at_most", "above"]
Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One requirement on the rows of a derived table; rows where the column is null are not judged by it."""

    name: str
    column: str
    check: Check
    meaning: str
    detail: str
    """Text of a quarantine entry; names in braces are columns of the derived table."""
    remedy: str
    bound: float | None = None
    counts: bool = True
    """Whether bad rows count against the limits; rows taken out to keep a test honest are no defect."""
    severity: Severity = "error"
    """An error's rows are quarantined; a warning's rows are published and listed."""


IMAGE_RECORD = Rule(
    "image_record", "fault", "is_null",
    "image records are complete: id, file_name inside images/, width, height",
    "the record {fault}", "correct the record in the annotation file",
)  # fmt: skip
IMAGE_ID_UNIQUE = Rule(
    "image_id_unique", "record_key", "is_unique",
    "no two image records of a file share an id",
    "the id {original_id} is used by more than one image record of this file",
    "give every image an id of its own",
)  # fmt: skip
IMAGE_FILE_PRESENT = Rule(
    "image_file_present", "file_present", "is_true",
    "every listed picture exists",
    "the file does not exist{file_hint}", "add the file or remove its record",
)  # fmt: skip
IMAGE_DECODABLE = Rule(
    "image_decodable", "decodable", "is_true",
    "every picture can be decoded to its last row",
    "the file cannot be decoded: {decode_error}", "replace the file or remove it and its record",
)  # fmt: skip
IMAGE_SIZE = Rule(
    "image_size", "size_difference_px", "at_most",
    "recorded width and height are those of the picture, upright after its EXIF orientation",
    "recorded as {width}x{height}, the picture is {real_width}x{real_height}{size_hint}",
    "correct width and height, and check that the boxes fit", bound=0,
)  # fmt: skip
IMAGE_IN_ONE_SPLIT = Rule(
    "image_in_one_split", "also_in_split", "is_null",
    "no picture is in two splits (by the content of its file)",
    "the same picture is in the split {also_in_split}, which keeps it", "leave the picture in one split",
)  # fmt: skip
NO_TARGET_TEST_IMAGE = Rule(
    "no_target_test_image", "target_test_image", "is_null",
    "no test picture of the target is in this set (by the content of its file)",
    "the same picture is in the target's test split as {target_test_image}",
    "nothing to do: it is left out so that the test stays honest", counts=False,
)  # fmt: skip

BOX_RECORD = Rule(
    "box_record", "fault", "is_null",
    "annotation records are complete: id, image_id, category_id, bbox of four numbers",
    "the record {fault}", "correct the record in the annotation file",
)  # fmt: skip
ANNOTATION_ID_UNIQUE = Rule(
    "annotation_id_unique", "record_key", "is_unique",
    "no two annotations of a file share an id",
    "the id {annotation_id} is used by more than one annotation of this file",
    "give every annotation an id of its own",
)  # fmt: skip
BOX_IMAGE_KNOWN = Rule(
    "box_image_known", "image_known", "is_true",
    "every annotation belongs to an image of its file",
    "annotation {annotation_id} belongs to image id {image_reference}, which the file does not list",
    "add the image or remove the annotation",
)  # fmt: skip
BOX_CATEGORY_KNOWN = Rule(
    "box_category_known", "category_known", "is_true",
    "every annotation has a category of the list",
    "annotation {annotation_id} has category id {category_reference}, which is not in the list of categories",
    "add the category or correct the annotation",
)  # fmt: skip
BOX_NUMBERS_FINITE = Rule(
    "box_numbers_finite", "finite", "is_true",
    "x, y, width, height and area are finite numbers",
    "annotation {annotation_id} has x {x}, y {y}, width {w}, height {h}, area {area}", "correct the numbers",
)  # fmt: skip
BOX_POSITIVE_AREA = Rule(
    "box_positive_area", "shortest_side_px", "above",
    "boxes have a positive width and height inside the image",
    "annotation {annotation_id} has width {w:g} and height {h:g} at x {x:g}, y {y:g}",
    "correct or remove the annotation", bound=0,
)  # fmt: skip
BOX_INSIDE_IMAGE = Rule(
    "box_inside_image", "overhang_px", "at_most",
    "boxes lie inside the image, up to the tolerance",
    "annotation {annotation_id} (x {x:g}, y {y:g}, width {w:g}, height {h:g}) reaches {overhang_px:g} pixels "
    "over the border of the {image_width}x{image_height} image", "correct or remove the annotation", bound=0,
)  # fmt: skip

IMAGE_RULES = (
    IMAGE_RECORD, IMAGE_ID_UNIQUE, IMAGE_FILE_PRESENT, IMAGE_DECODABLE, IMAGE_SIZE, IMAGE_IN_ONE_SPLIT,
)  # fmt: skip
BOX_RULES = (
    BOX_RECORD, ANNOTATION_ID_UNIQUE, BOX_IMAGE_KNOWN, BOX_CATEGORY_KNOWN, BOX_NUMBERS_FINITE,
    BOX_POSITIVE_AREA, BOX_INSIDE_IMAGE,
)  # fmt: skip
"""`BOX_INSIDE_IMAGE` here allows nothing; `box_rules` gives it a tolerance."""
RULE_NAMES = tuple(rule.name for rule in (*IMAGE_RULES, NO_TARGET_TEST_IMAGE, *BOX_RULES))


def box_rules(tolerance_pixels: float) -> tuple[Rule, ...]:
    """The rules for boxes that may reach so far over the border of their image."""
    tolerant = replace(BOX_INSIDE_IMAGE, bound=tolerance_pixels)
    return tuple(tolerant if rule is BOX_INSIDE_IMAGE else rule for rule in BOX_RULES)


def bad_rows(rule: Rule, table: pa.Table) -> NDArray[np.bool_]:
    """Mask of the rows that break the rule."""
    column = table[rule.column]
    if rule.check == "is_null":
        bad = pc.is_valid(column)
    elif rule.check == "is_unique":
        return _repeated(column)
    elif rule.check == "is_true":
        bad = pc.invert(column)
    elif rule.check == "at_most":
        bad = pc.greater(column, rule.bound)
    else:
        bad = pc.less_equal(column, rule.bound)
    if not pc.any(bad).as_py():
        return np.broadcast_to(np.False_, len(table))  # a byte, however many rows
    mask: NDArray[np.bool_] = pc.fill_null(bad, False).to_numpy().astype(np.bool_)
    return mask


def _repeated(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Rows whose value, not null, occurs more than once."""
    if pa.types.is_integer(column.type) and not column.null_count:
        values = np.sort(column.to_numpy())
        if not (values[1:] == values[:-1]).any():
            return np.broadcast_to(np.False_, len(column))
    codes = pc.dictionary_encode(column).combine_chunks().indices
    values = codes.fill_null(-1).to_numpy(zero_copy_only=False)
    counts = np.bincount(values[values >= 0], minlength=1)
    repeated: NDArray[np.bool_] = (values >= 0) & (counts[values] > 1)
    return repeated


def describe(rule: Rule, row: Mapping[str, Any]) -> str:
    """The rule's detail text for one bad row."""
    return rule.detail.format_map(row)
