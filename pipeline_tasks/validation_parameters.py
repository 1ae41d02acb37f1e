"""The parameters of `validate_data`: how many bad rows may be left out, and the thresholds of its rules."""

from __future__ import annotations

from typing import Literal

from pipeline_tasks.schema import Section, parameter


class ValidateDataParameters(Section):
    """Limits of the data validation."""

    maximum_bad_image_fraction: float = parameter(
        0.01, "Share of a set's images that may be quarantined before the step stops", ge=0, le=1
    )
    maximum_bad_box_fraction: float = parameter(
        0.01, "Share of a set's boxes that may be quarantined before the step stops", ge=0, le=1
    )
    box_tolerance_pixels: float = parameter(
        1.0, "How far a box may reach over the image border; it is clipped", unit="pixels", ge=0
    )
    tiny_box_pixels: float = parameter(3.0, "Boxes with a shorter side are listed as warnings", unit="pixels", ge=0)
    whole_image_fraction: float = parameter(
        0.99, "Boxes that cover this share of their image are listed as warnings", gt=0, le=1
    )
    near_identical_iou: float = parameter(
        0.85, "Two boxes of one image that overlap so much (IoU) are listed as warnings", gt=0, le=1
    )
    class_size_ratio: float = parameter(
        2.5, "Boxes so many times larger or smaller than others of their class, and as large as those of another one, "
        "are listed as warnings", gt=1,
    )  # fmt: skip
    near_duplicate_bits: int = parameter(
        8, "Pictures whose 64-bit perceptual hashes differ in no more bits are listed as warnings", unit="bits",
        ge=0, le=63,
    )  # fmt: skip
    near_duplicate_images: int = parameter(
        100_000, "Largest set that is searched for pictures that look alike; the time grows with its square", ge=0
    )
    maximum_image_megapixels: float = parameter(
        178.0, "Larger pictures are not decoded but quarantined", unit="megapixels", gt=0
    )
    maximum_image_megabytes: float = parameter(
        512.0, "Larger picture files are not read but quarantined", unit="MB", gt=0
    )
    drift_class_distance: float = parameter(
        0.1, "Share of the training boxes that may have to change class to have the class shares of the champion's "
        "data, beyond chance; more is a warning", in_key=False, ge=0, le=1,
    )  # fmt: skip
    drift_size_index: float = parameter(
        0.25, "Population stability index that box sizes and picture sizes may have against the champion's data, "
        "beyond chance; more is a warning", in_key=False, ge=0,
    )  # fmt: skip
    allow_links: bool = parameter(False, "Follow links that lead out of a dataset folder")
    severities: dict[str, Literal["error", "warning", "ignore"]] = parameter(
        {}, "Severity of single warning rules by name: error (rows are quarantined), warning or ignore"
    )
