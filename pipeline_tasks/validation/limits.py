"""How much bad data a step accepts, and the sentence it stops with when there is more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.data.near_duplicates import NEAR_BITS
from pipeline_tasks.errors import ParameterError
from pipeline_tasks.validation.rules import RULE_NAMES, Rule
from pipeline_tasks.validation.warning_rules import ADJUSTABLE


@dataclass(frozen=True)
class ValidationLimits:
    """Limits of `validate`; fractions are of one set's images or boxes and lie in [0, 1]."""

    maximum_bad_images_fraction: float = 0.01
    maximum_bad_boxes_fraction: float = 0.01
    box_tolerance_pixels: float = 1.0
    """How far a box may reach over the border. Exports round to whole pixels, and some count the last pixel's far
    edge, so that a box of a clean set may reach one pixel too far; what is published is clipped to the image."""
    maximum_target_test_leaks: int = 0
    """Test images of the target that may also be in its training or validation split."""
    rule_fractions: Mapping[str, float] = field(default_factory=dict)
    """Limits for single rules by name, in place of the two fractions above."""
    tiny_box_pixels: float = 3.0
    whole_image_fraction: float = 0.99
    near_identical_iou: float = 0.85
    class_size_ratio: float = 2.5
    near_duplicate_bits: int = NEAR_BITS
    near_duplicate_images: int = 100_000
    maximum_image_megapixels: float = 178.0
    maximum_image_megabytes: float = 512.0
    drift_class_distance: float = 0.1
    drift_size_index: float = 0.25
    severities: Mapping[str, str] = field(default_factory=dict)
    """Severity of warning rules by name: "error", "warning" or "ignore"."""

    def __post_init__(self) -> None:
        fractions = {
            "maximum_bad_image_fraction": self.maximum_bad_images_fraction,
            "maximum_bad_box_fraction": self.maximum_bad_boxes_fraction,
            **{f"rule_fractions.{name}": value for name, value in self.rule_fractions.items()},
        }
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ParameterError(f"validate_data.{name} must lie between 0 and 1, got {value}")
        if unknown := sorted(set(self.rule_fractions) - set(RULE_NAMES)):
            raise ParameterError(
                f"validate_data.rule_fractions names the unknown rule {unknown[0]!r}; rules are {', '.join(RULE_NAMES)}"
            )
        for name, severity in self.severities.items():
            if name not in ADJUSTABLE:
                raise ParameterError(
                    f"validate_data.severities names {name!r}, whose severity is fixed or which is unknown; the others "
                    f"are {', '.join(ADJUSTABLE)}"
                )
            if severity not in ("error", "warning", "ignore"):
                raise ParameterError(f"validate_data.severities.{name} must be error, warning or ignore: {severity!r}")
        for name in ("box_tolerance_pixels", "maximum_target_test_leaks"):
            if not getattr(self, name) >= 0:
                raise ParameterError(f"validate_data.{name} must not be negative, got {getattr(self, name)}")

    def allowed_fraction(self, rule: Rule, kind: str) -> float:
        """Share of a set's images or boxes (`kind`) that may break the rule; 1 for what counts as no defect."""
        if not rule.counts or rule.severity == "warning" or kind == "files":
            return 1.0
        return self.rule_fractions.get(rule.name, self.total_fraction(kind))

    def total_fraction(self, kind: str) -> float:
        """Share of a set's images or boxes (`kind`) that may be bad in all."""
        return self.maximum_bad_images_fraction if kind == "images" else self.maximum_bad_boxes_fraction
