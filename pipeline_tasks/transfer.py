"""What a network took over from a checkpoint with other classes or of another variant, told and written down."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.checkpoint import TransferReport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfer:
    """The report of `transfer_weights` with the source's variant and the network's classes."""

    source_variant: str
    class_names: tuple[str, ...]
    report: TransferReport

    def tell(self, variant: str) -> None:
        """Log what fitted and what did not, in one line."""
        report = self.report
        if self.source_variant != variant:
            text = "the weights are of variant %s, the network is %s: little of them fits"
            log.warning(text, self.source_variant, variant)
        log.info(
            "weights of %s: %d tensors kept, %d start afresh%s, %d of the checkpoint fit nowhere%s; "
            "%d of %d classes known%s",
            *(self.source_variant, len(report.kept), len(report.reinitialised), _in_brackets(by_layer(self._new))),
            *(len(report.unused), _in_brackets(by_layer(report.unused))),
            *(len(report.classes_kept), len(self.class_names), _in_brackets(", ".join(self._new_classes), "new: ")),
        )

    def summary(self) -> dict[str, Any]:
        """Counts, and the layers that start afresh, for the step's manifest."""
        report = self.report
        return {
            "kept": len(report.kept),
            "new": len(report.reinitialised),
            "unused": len(report.unused),
            "classes_kept": len(report.classes_kept),
            "classes_new": len(self._new_classes),
            "new_layers": by_layer(self._new),
        }

    def to_json(self) -> dict[str, Any]:
        """Every name."""
        return {"source_variant": self.source_variant, "classes_new": self._new_classes, **self.report._asdict()}

    @property
    def _new(self) -> list[str]:
        return self.report.reinitialised

    @property
    def _new_classes(self) -> list[str]:
        return [name for name in self.class_names if name not in self.report.classes_kept]


def by_layer(names: Iterable[str]) -> str:
    """Tensors by the outer two parts of their names, such as `backbone.stage1 12, heads.head1 2`."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{layer} {count}" for layer, count in counts.items())


def _in_brackets(text: str, title: str = "") -> str:
    return f" ({title}{textwrap.shorten(text, 300, placeholder=' …')})" if text else ""
