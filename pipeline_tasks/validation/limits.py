"""How much bad data a step accepts, and the sentence it stops with when there is more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline_tasks.errors import ParameterError
from pipeline_tasks.validation.rules import RULE_NAMES, Rule


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
        for name in ("box_tolerance_pixels", "maximum_target_test_leaks"):
            if not getattr(self, name) >= 0:
                raise ParameterError(f"validate_data.{name} must not be negative, got {getattr(self, name)}")

    def allowed_fraction(self, rule: Rule, kind: str) -> float:
        """Share of a set's images or boxes (`kind`) that may break the rule; 1 for rules that count as no defect."""
        if not rule.counts:
            return 1.0
        return self.rule_fractions.get(rule.name, self.total_fraction(kind))

    def total_fraction(self, kind: str) -> float:
        """Share of a set's images or boxes (`kind`) that may be bad in all."""
        return self.maximum_bad_images_fraction if kind == "images" else self.maximum_bad_boxes_fraction
