"""What the pinned champion was trained on, as far as later data are compared with it.

`start` pins the digests of the champion's target set and of its statistics in run.json, so that the key of
`validate_data` follows from the run alone. Where the run has the champion's own data nothing is compared and the key
knows nothing of the champion: accepting an engine does not make its data be validated again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_tasks import digests
from pipeline_tasks.dataset_statistics import DatasetStatistics, from_json
from pipeline_tasks.seen_images import LINEAGE_FILE

STATISTICS = "target_statistics"
"""Field of a bundle's lineage.json; releases before it left it out."""
FIELD = "data"
"""Of the champion's entry in run.json."""


def pin(bundle: Path) -> dict[str, str | None]:
    """Digests of the target set that a registered engine was made of, and of its statistics (None: not recorded)."""
    lineage = _lineage(bundle)
    recorded = lineage.get(STATISTICS)
    known = None if from_json(recorded) is None else digests.of_json(recorded)
    return {"target": lineage.get("datasets", {}).get("target"), "statistics": known}


def differs(frozen: Mapping[str, Any]) -> bool:
    """Whether a run has a champion whose target set has another content than the run's."""
    pinned = (frozen["champion"] or {}).get(FIELD)
    return pinned is not None and pinned["target"] != frozen["datasets"]["target"]["digest"]


def key_inputs(frozen: Mapping[str, Any]) -> dict[str, str | None]:
    """What the drift rules read, for the key of `validate_data`."""
    return {"champion_statistics": frozen["champion"][FIELD]["statistics"]} if differs(frozen) else {}


def name(frozen: Mapping[str, Any]) -> str:
    """The champion's name and version."""
    return f"{frozen['champion']['name']} v{frozen['champion']['version']}"


def statistics(bundle: Path) -> DatasetStatistics | None:
    """Statistics of the target set that a registered engine was made of; None where they were not recorded."""
    return from_json(_lineage(bundle).get(STATISTICS))


def _lineage(bundle: Path) -> dict[str, Any]:
    if not (bundle / LINEAGE_FILE).is_file():
        return {}
    content: dict[str, Any] = json.loads((bundle / LINEAGE_FILE).read_text(encoding="utf-8"))
    return content
