"""Rules for what is usual enough to go on with, yet seldom meant: their rows are published and listed as warnings.

`validate_data.severities` makes any of them an error, whose rows are quarantined, or ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pipeline_tasks.validation.rules import Rule, Severity


def _warning(name: str, column: str, meaning: str, detail: str, remedy: str, severity: Severity = "warning") -> Rule:
    """A rule over a column that is null wherever nothing is odd."""
    return Rule(name, column, "is_null", meaning, detail, remedy, severity=severity)


IMAGE_WARNINGS = (
    _warning(
        "image_colour", "colour_mode", "pictures have three colour channels of eight bits",
        "the picture is {colour_mode}", "nothing, if its colours are meant; it is spread over three channels of 8 bits",
    ),
    _warning(
        "image_suffix", "other_format", "a picture's suffix tells its format",
        "the file is {other_format} by its content", "rename the file and its record",
    ),
    _warning(
        "image_upright", "turned_by", "pictures are stored upright",
        "the file is stored turned ({turned_by}); it is read upright, and boxes must fit that",
        "turn it and drop the tag",
    ),
    _warning(
        "image_listed_once", "listed_again", "no two records name one picture",
        "the picture is also in the record {listed_again}", "join the two records",
    ),
    _warning(
        "image_boxes_agree", "conflicting_copy", "copies of one picture have the same boxes",
        "{conflicting_copy} has the same content but other boxes", "keep the right boxes and remove the other copy",
    ),
    _warning(
        "image_not_repeated", "similar_image", "no two pictures look alike",
        "it looks like {similar_image} ({similar_bits} of 64 bits of their hashes differ)",
        "keep one of them, or both in one split",
    ),
)  # fmt: skip
BOX_WARNINGS = (
    _warning(
        "box_not_tiny", "tiny_side_px", "boxes are not tiny",
        "annotation {annotation_id} has width {w:g} and height {h:g}", "remove it if nothing can be seen there",
    ),
    _warning(
        "box_not_whole_image", "whole_image_share", "boxes do not cover their whole image",
        "annotation {annotation_id} covers {whole_image_share:.1%} of the image", "draw the box around the object",
    ),
    _warning(
        "box_not_repeated", "repeats", "no two boxes of a class lie on each other",
        "annotation {annotation_id} lies on annotation {repeats} of the same class", "remove one of them",
    ),
    _warning(
        "box_one_class", "conflicts_with", "no two boxes of different classes lie on each other",
        "annotation {annotation_id} ({class_name}) lies on annotation {conflicts_with}", "keep the right class",
    ),
    _warning(
        "class_spelling", "similar_class", "class names are no misspellings of others",
        "the class {class_name!r} looks like {similar_class!r}", "correct the class name",
    ),
    _warning(
        "box_size_of_class", "sized_like", "boxes have about the size of their class",
        "annotation {annotation_id} of class {class_name!r} has {w:g}x{h:g} pixels, others of it have a side of about "
        "{usual_side:.0f}; its size is that of {sized_like!r}", "correct the class if it is wrong",
    ),
    _warning(
        "box_no_crowd", "crowd_region", "boxes are of single objects",
        "annotation {annotation_id} is a crowd region: the metric ignores it, training leaves it out",
        "nothing, if a crowd is meant",
    ),
    _warning(
        "box_area", "odd_area", "the recorded area is positive and no larger than the box",
        "annotation {annotation_id} has the area {area:g}, its box has {w:g}x{h:g} pixels", "correct the area",
    ),
)  # fmt: skip
FILE_RULES = (
    _warning("picture_listed", "picture_listed", "every picture has a record", "{note}",
             "add its record or annotation file, or remove the picture"),
    _warning("splits_given", "splits_given", "the set tells training, validation and test images apart", "{note}",
             "divide it with `nasline data split`"),
    _warning("file_name_matches", "file_name_matches", "recorded file names are those of the pictures", "{note}",
             "correct the file name"),
    _warning("label_file_present", "label_file_present", "every picture has a label file", "{note}",
             "add an empty label file if the picture shows no object"),
    _warning("label_file_filled", "label_file_filled", "label files hold boxes", "{note}",
             "nothing, if the picture shows no object"),
    _warning("class_names_given", "class_names_given", "the classes have names", "{note}",
             "add data.yaml with names: [...]"),
    _warning("class_name_plain", "class_name_plain", "class names are plain text", "{note}", "rename the class"),
    _warning("category_used", "category_used", "no category is a mere heading", "{note}", "remove the category"),
    _warning("coco_keys", "coco_keys", "COCO files have info and licenses", "{note}",
             "add them: without them licences are unknown"),
    _warning("segmentation_filled", "segmentation_filled", "segmentations are filled or absent", "{note}",
             "nothing: only boxes are used"),
    _warning("objects365_class", "objects365_class", "the classes are those of Objects365 v2", "{note}",
             "compare the class list with that of the second release"),
    _warning("categories_agree", "categories_agree", "all files have the same categories", "{note}",
             "export all splits with one class list", severity="error"),
    _warning("class_count", "class_count", "the class list is as long as it says", "{note}",
             "correct nc or names in data.yaml", severity="error"),
)  # fmt: skip
_DRIFT_REMEDY = "look at both with `nasline data diff`; nothing, if the change is meant"
DRIFT_RULES = (
    _warning("drift_class_shares", "drift_class_shares", "classes are as frequent as in the champion's data",
             "{note}", _DRIFT_REMEDY),
    _warning("drift_new_class", "drift_new_class", "the champion was trained on every class", "{note}", _DRIFT_REMEDY),
    _warning("drift_vanished_class", "drift_vanished_class", "every class of the champion's data has boxes",
             "{note}", _DRIFT_REMEDY),
    _warning("drift_box_sizes", "drift_box_sizes", "boxes are as large as in the champion's data",
             "{note}", _DRIFT_REMEDY),
    _warning("drift_image_sizes", "drift_image_sizes", "pictures are as large as in the champion's data",
             "{note}", _DRIFT_REMEDY),
)  # fmt: skip
"""Judged on the target where there is a champion that was trained on other data."""
ADJUSTABLE = tuple(rule.name for rule in (*IMAGE_WARNINGS, *BOX_WARNINGS, *FILE_RULES, *DRIFT_RULES))
"""The rules whose severity may be set."""


def adjusted(rules: tuple[Rule, ...], severities: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules with the severities that were asked for; ignored ones are left out."""
    wanted = [(rule, severities.get(rule.name, rule.severity)) for rule in rules]
    return tuple(
        replace(rule, severity="error" if severity == "error" else "warning")
        for rule, severity in wanted
        if severity != "ignore"
    )
