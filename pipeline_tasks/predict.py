"""`nasline predict`: pictures with boxes and a JSON of detections."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline_tasks.errors import ParameterError
from pipeline_tasks.output_place import require_folder
from pipeline_tasks.workspace import write_json

log = logging.getLogger(__name__)


def predict(engine: str, source: str, out: Path, score_threshold: float | None, workspace: Path) -> None:
    """Detect in an image, a folder or a glob pattern; write pictures and detections.json into `out`.

    Raises:
        ParameterError: the score threshold is outside [0, 1], or `out` is no possible place.
        ValueError: no image, an unreadable image, or no engine at that place.
    """
    import nasline
    from model.detector import unique_file_name

    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ParameterError(f"--score-threshold must lie in 0 to 1, got {score_threshold}")
    require_folder("--out", out)
    options: dict[str, Any] = {} if score_threshold is None else {"score_threshold": score_threshold}
    results = nasline.load(engine, workspace=workspace).stream(source, **options)
    entries, used = [], dict[str, int]()
    for result in results:
        out.mkdir(parents=True, exist_ok=True)
        result.save(out / unique_file_name(result.name, used))
        entries.append(result.to_json())
    write_json(out / "detections.json", entries)
    log.info("%d images, %d objects; pictures and detections.json are in %s", len(entries), _count(entries), out)


def _count(entries: list[dict[str, Any]]) -> int:
    return sum(len(entry["detections"]) for entry in entries)
