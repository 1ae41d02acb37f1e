"""`nasline pseudo_label`: the teacher labels the unlabelled images, in shards that are then merged."""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks import pinned_files
from pipeline_tasks.errors import ParameterError, UsageError
from pipeline_tasks.execution import StepContext, StepResult, execute
from pipeline_tasks.label_quality import label_quality
from pipeline_tasks.process import Stopper
from pipeline_tasks.teach import SHUT_OUT, THRESHOLDS
from pipeline_tasks.validate_data import is_absent
from pipeline_tasks.workspace import Workspace, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from model.data.image_set import ImageSet
    from model.evaluation import Detections

log = logging.getLogger(__name__)

TABLES = "tables"
QUALITIES = ("precision", "recall")


def run_shard(workspace: Workspace, run: str, index: int, count: int, stopper: Stopper) -> StepResult:
    """Label the images of one shard; it has a lease of its own and is published beside the step's output."""

    def body(context: StepContext) -> dict[str, Any]:
        return _label_shard(context, index, count)

    return execute(workspace, run, "pseudo_label", body, stopper, shard=f"{index}-of-{count}")


def pseudo_label(context: StepContext) -> dict[str, Any]:
    """Merge all shards; the tables are the same bytes for every number of shards.

    Raises:
        UsageError: a shard has not finished.
    """
    import pyarrow as pa

    folder = context.output / TABLES
    if is_absent(context.inputs["unlabeled"]):
        folder.mkdir()
        (folder / "absent.json").write_text('{"absent": true}\n', encoding="utf-8")
        return {"boxes": 0, "images": 0}
    shards = _finished_shards(context)
    boxes = pa.concat_tables([_read_boxes(shard) for shard in shards])
    _write(context, folder, boxes)
    if not boxes.num_rows:
        _warn_of_no_labels(context)
    return {**_summary(folder), **_expected_quality(context), **_measured_quality(context, folder)}


def _finished_shards(context: StepContext) -> list[Path]:
    count = context.parameters.pseudo_label.shards
    base = context.published.with_name(context.published.name + ".shards")
    shards = [base / f"{index}-of-{count}" for index in range(count)]
    missing = [str(index) for index, shard in enumerate(shards) if not (shard / "manifest.json").exists()]
    if missing:
        raise UsageError(
            f"pseudo_label --merge needs all {count} shards; missing: {', '.join(missing)}; "
            f"run `nasline pseudo_label --shard {missing[0]}/{count}` first"
        )
    return shards


def _label_shard(context: StepContext, index: int, count: int) -> dict[str, Any]:
    import numpy as np
    import pyarrow.parquet as pq

    from model.data.tables import BOXES_SCHEMA, read_dataset

    if is_absent(context.inputs["unlabeled"]):
        pq.write_table(BOXES_SCHEMA.empty_table(), context.output / "boxes.parquet")
        return {"boxes": 0, "images": 0}
    images = read_dataset(context.inputs["unlabeled"]).image_set()
    members = images.subset(np.flatnonzero(shard_of(images.image_ids, count) == index))
    boxes = _label(context, members) if len(members) else BOXES_SCHEMA.empty_table()
    pq.write_table(boxes, context.output / "boxes.parquet")
    return {"boxes": boxes.num_rows, "images": len(members)}


def shard_of(image_ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Shard of each image: a hash of its id, so that membership does not depend on the order of the table."""
    import numpy as np

    return np.array([zlib.crc32(str(image_id).encode()) % count for image_id in image_ids.tolist()], dtype=np.int64)


def _label(context: StepContext, images: ImageSet) -> pa.Table:
    """Boxes above the thresholds. Every batch is filled up: a result must not depend on its neighbours' number."""
    from model.evaluation import torch_predictor
    from model.pseudo_labels import detect_for_labels
    from pipeline_tasks.teacher_checkpoint import load_teacher
    from pipeline_tasks.training_task import open_images, prepare_torch

    device = prepare_torch(context.parameters.start)
    teacher, metadata = load_teacher(context.inputs["teacher"] / "checkpoint")
    thresholds = _thresholds(context)
    given = context.parameters.pseudo_label
    found = detect_for_labels(
        _in_full_batches(torch_predictor(teacher.to(device), device), given.batch_size),
        images,
        open_images(context),
        metadata.preprocessing,
        [given.flip_consistency],
        batch_size=given.batch_size,
        score_threshold=min(thresholds.values()),
    )[given.flip_consistency]
    return _boxes_table(found, images, [thresholds[name] for name in metadata.class_names])


def _in_full_batches(predict: Any, batch_size: int) -> Any:
    import numpy as np

    def padded(batch: NDArray[np.uint8]) -> tuple[Any, Any]:
        missing = batch_size - len(batch)
        filler = np.zeros((missing, *batch.shape[1:]), dtype=batch.dtype)
        boxes_xyxy, scores = predict(np.concatenate([batch, filler]))
        return boxes_xyxy[: len(batch)], scores[: len(batch)]

    return padded


def _thresholds(context: StepContext) -> dict[str, float]:
    """Those of `teach`, moved by the offset; a class that `teach` shut out stays so, whatever the offset."""
    offset = context.parameters.pseudo_label.threshold_offset
    chosen = _chosen_by_teach(context)["thresholds"]
    return {
        name: value if value >= SHUT_OUT else min(SHUT_OUT, max(0.0, value + offset)) for name, value in chosen.items()
    }


def _chosen_by_teach(context: StepContext) -> dict[str, Any]:
    """Thresholds, and what they were worth on the validation split, for the run's mode of flip consistency."""
    content = json.loads((context.inputs["teacher"] / THRESHOLDS).read_text(encoding="utf-8"))
    mode = context.parameters.pseudo_label.flip_consistency
    if mode not in content["flip_consistency"]:
        raise ParameterError(
            f"pseudo_label.flip_consistency is {mode!r}, but with teach.flip 0 the teacher knows no mirrored images; "
            "set it to none"
        )
    chosen: dict[str, Any] = content["flip_consistency"][mode]
    return chosen


def _boxes_table(found: Detections, images: ImageSet, thresholds: list[float]) -> pa.Table:
    """Detections above their class's threshold, clipped to their image, as rows of the dataset contract."""
    import numpy as np
    import pyarrow as pa

    from model.data.tables import BOXES_SCHEMA

    sizes = images.sizes[found.image_index].astype(np.float64)  # (N, 2) width, height
    corners = np.clip(found.boxes_xyxy.astype(np.float64), 0.0, np.tile(sizes, 2))
    width_height = corners[:, 2:] - corners[:, :2]
    keep = (found.scores >= np.asarray(thresholds)[found.labels]) & (width_height.min(axis=1) > 1.0)
    corners, width_height = corners[keep], width_height[keep]
    count = int(keep.sum())
    columns = {
        "image_id": images.image_ids[found.image_index[keep]],
        "category": found.labels[keep],
        "x": corners[:, 0],
        "y": corners[:, 1],
        "w": width_height[:, 0],
        "h": width_height[:, 1],
        "area": width_height.prod(axis=1),
        "iscrowd": np.zeros(count, dtype=bool),
        "score": found.scores[keep],
        "source": ["pseudo"] * count,
        "annotation_id": [""] * count,
        "source_record": ["teacher"] * count,
    }
    return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in BOXES_SCHEMA}, schema=BOXES_SCHEMA)


def _read_boxes(shard: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(shard / "boxes.parquet")


def _write(context: StepContext, folder: Path, boxes: pa.Table) -> None:
    """The unlabelled set's images with their pseudo-boxes, as a dataset of the target's classes."""
    from dataclasses import replace

    from model.checkpoint import read_metadata
    from model.data.tables import read_dataset, write_dataset

    teacher, _ = read_metadata(context.inputs["teacher"] / "checkpoint")
    unlabeled = read_dataset(context.inputs["unlabeled"])
    names = teacher.class_names
    metadata = replace(
        unlabeled.metadata,
        name="pseudo-labels",
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        licences={**unlabeled.metadata.licences, "annotations": "pseudo-labels"},
    )
    order = [("image_id", "ascending"), ("score", "descending"), ("x", "ascending"), ("y", "ascending")]
    ordered = boxes.sort_by(order)
    write_dataset(folder, unlabeled.images, ordered, metadata)


def _warn_of_no_labels(context: StepContext) -> None:
    """The student would learn from labels alone, and nothing else would say so."""
    teach, own = context.parameters.teach, context.parameters.pseudo_label
    log.warning(
        "no pseudo-label came out: the teacher finds nothing above the classes' thresholds, and the unlabelled images "
        "teach nothing; lower teach.minimum_precision (%s), teach.minimum_threshold (%s) or "
        "pseudo_label.threshold_offset (%s), or train the teacher longer",
        teach.minimum_precision, teach.minimum_threshold, own.threshold_offset,
    )  # fmt: skip


def _expected_quality(context: StepContext) -> dict[str, float]:
    """What the same thresholds were worth on the validation split; nothing where an offset makes them other ones."""
    if context.parameters.pseudo_label.threshold_offset:
        return {}
    quality = _chosen_by_teach(context)["validation_quality"]
    return {f"validation_{name}": quality[name] for name in QUALITIES if quality[name] is not None}


def _measured_quality(context: StepContext, folder: Path) -> dict[str, float]:
    """What the labels themselves are worth, where the true boxes were given."""
    if pinned_files.TRUE_BOXES not in context.inputs:
        return {}
    from model.label_quality_plot import draw_label_quality

    true_boxes = context.inputs[pinned_files.TRUE_BOXES]
    field, digest = "pseudo_label.true_boxes", context.input_digests[pinned_files.TRUE_BOXES]
    pinned_files.require_unchanged(field, true_boxes, digest)
    quality = label_quality(folder, true_boxes).to_json()
    write_json(context.output / "label_quality.json", quality)
    draw_label_quality({"pseudo-labels": quality}, context.output / "plots" / "label_quality.png")
    return {name: quality[name] for name in (*QUALITIES, "truth") if quality[name] is not None}


def _summary(folder: Path) -> dict[str, Any]:
    from model.data.tables import read_dataset

    images = read_dataset(folder).image_set()
    counts = images.class_counts()
    labelled = int((images.box_counts > 0).sum())
    return {"images": len(images), "labelled_images": labelled, "boxes": sum(counts.values()), "classes": counts}
