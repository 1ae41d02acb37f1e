"""`nasline evaluate`: the accuracy of a checkpoint or an engine on a labelled set, as table, JSON and pictures."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.errors import ConfigurationError, DataError, ParameterError
from pipeline_tasks.output_place import require_folder
from pipeline_tasks.text_table import some
from pipeline_tasks.workspace import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.detections import Detections
    from model.engines import Runtime
    from model.evaluation import DetectionMetrics, Predict
    from model.preprocessing import Preprocessing

log = logging.getLogger(__name__)

CHECKPOINT_BATCH = 8


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Measure a checkpoint or an engine on a labelled set: COCO's numbers, per class, calibration, error kinds."
    command = commands.add_parser("evaluate", help=text, description=text, allow_abbrev=False)
    command.add_argument("model", metavar="MODEL", help="checkpoint or engine folder, or models:/NAME@champion")
    command.add_argument(
        "--dataset", type=Path, required=True, metavar="DIR", help="folder in any format, or a published dataset"
    )
    command.add_argument("--split", default="test", help="train, val or test (default test)")
    command.add_argument("--out", type=Path, metavar="DIR", help="write metrics.json, tables and pictures there")
    command.add_argument("--images", type=Path, metavar="DIR", help="where a published dataset's pictures lie")
    command.add_argument(
        "--runtime", choices=("openvino", "onnxruntime"), default="openvino", help="of an engine (default openvino)"
    )
    command.add_argument("--device", default="cpu", help="of a checkpoint: cpu or cuda (default cpu)")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    evaluate(
        arguments.model,
        arguments.dataset,
        arguments.split,
        arguments.out,
        pictures=arguments.images,
        runtime=arguments.runtime,
        device=arguments.device,
        workspace=arguments.workspace,
    )
    return 0


def evaluate(
    place: str,
    dataset: Path,
    split: str,
    out: Path | None,
    *,
    pictures: Path | None = None,
    runtime: Runtime = "openvino",
    device: str = "cpu",
    workspace: str = ".nasline",
) -> DetectionMetrics:
    """Print the table of accuracy; with `out` also write metrics.json, and plots and tables in plots/.

    Raises:
        DataError: the set cannot be understood, or shares no class name with the model.
        ParameterError: the set has no such split, its pictures' folder is not told, or `out` is no possible place.
        ConfigurationError: the device is not there.
        ValueError: there is neither a checkpoint nor an engine at that place, or a picture cannot be read.
    """
    from model import evaluation
    from pipeline_tasks.accuracy_report import write_accuracy_report
    from pipeline_tasks.evaluation_set import read_evaluation_set

    if out is not None:
        require_folder("--out", out)
    subject = _open_model(place, runtime, device, workspace)
    measured_on = read_evaluation_set(dataset, split, pictures)
    images = measured_on.images
    labels = label_mapping(subject.class_names, images.class_names)
    log.info("%s on %d images of %s, split %s", subject.description, len(images), dataset, split)
    found = evaluation.detect(
        subject.predict, images, measured_on.open_image, subject.preprocessing, batch_size=subject.batch_size
    )
    found = with_labels(found, labels)
    metrics = evaluation.evaluate(found, images)
    print("\n".join(table(metrics)), flush=True)
    if out is not None:
        write_json(out / "metrics.json", {"model": subject.description, "split": split, **metrics.to_json()})
        write_accuracy_report(out / "plots", metrics, found, images, measured_on.open_image)
        log.info("metrics.json, and tables and pictures in plots/, are in %s", out)
    return metrics


@dataclass(frozen=True)
class _Subject:
    """What is measured."""

    predict: Predict
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    batch_size: int
    description: str


def _open_model(place: str, runtime: Runtime, device: str, workspace: str) -> _Subject:
    from model.checkpoint import METADATA_FILE
    from model.quantization.storage import is_quantized

    folder = Path(place)
    if (folder / METADATA_FILE).is_file() or is_quantized(folder):
        return _open_checkpoint(folder, device)
    import nasline
    from model.detector import ENGINE_FILE

    if not place.startswith("models:/") and not (folder / ENGINE_FILE).is_file():
        raise DataError(f"{place} is neither a checkpoint ({METADATA_FILE}) nor an engine ({ENGINE_FILE})")
    detector = nasline.load(place, runtime=runtime, workspace=workspace)
    engine = detector.engine
    return _Subject(engine.run, detector.class_names, detector.preprocessing, 1, f"engine {place} ({runtime})")


def _open_checkpoint(folder: Path, device: str) -> _Subject:
    from model.checkpoint import load_checkpoint
    from model.evaluation import torch_predictor
    from model.quantization.storage import is_quantized, load_quantized

    _require_device(device)
    quantized = is_quantized(folder)
    network, metadata = load_quantized(folder) if quantized else load_checkpoint(folder)
    network = network if quantized else network.fused_copy()
    kind = "quantized checkpoint" if quantized else "checkpoint"
    description = f"{kind} {folder} (YOLO-NAS {metadata.variant}, {metadata.preprocessing.input_size} px)"
    predict = torch_predictor(network.to(device), device)
    return _Subject(predict, metadata.class_names, metadata.preprocessing, CHECKPOINT_BATCH, description)


def _require_device(device: str) -> None:
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ParameterError(f"--device {device!r} is no device; use cpu, cuda or cuda:1") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"--device is {device!r}, but torch finds no such CUDA device; use cpu")


def label_mapping(class_names: Sequence[str], wanted: Sequence[str]) -> NDArray[np.int64]:
    """For each of the model's classes its place in the list `wanted`, -1 where it is not there.

    Raises:
        DataError: no name is in both lists.
    """
    import numpy as np

    places = {name: label for label, name in enumerate(wanted)}
    mapping = np.array([places.get(name, -1) for name in class_names], np.int64)
    if (mapping < 0).all():
        raise DataError(
            f"the model's classes ({some(class_names)}) and the set's ({some(wanted)}) have no name in common; "
            "classes are matched by name"
        )
    if unknown := [name for name in class_names if name not in places]:
        log.warning("the set lacks the classes %s; detections of them are left out", some(unknown))
    if unseen := [name for name in wanted if name not in class_names]:
        log.warning("the model lacks the classes %s; they count as never found", some(unseen))
    return mapping


def with_labels(found: Detections, mapping: NDArray[np.int64]) -> Detections:
    """The detections with their labels mapped; those mapped to -1 are left out."""
    from model.detections import Detections

    labels = mapping[found.labels]
    known = labels >= 0
    return Detections(found.image_index[known], found.boxes_xyxy[known], found.scores[known], labels[known])


def table(metrics: DetectionMetrics) -> list[str]:
    """The lines to print: all boxes, by size, and a row for each class."""
    heading = ("AP50-95", "AP50", "AP75", "AR50-95")
    width = max(10, *(len(name) for name in metrics.per_class), 0) + 2
    overall = {
        "all": (metrics.map50_95, metrics.map50, metrics.map75, metrics.recall50_95),
        "small": (metrics.map_small, None, None, metrics.recall_small),
        "medium": (metrics.map_medium, None, None, metrics.recall_medium),
        "large": (metrics.map_large, None, None, metrics.recall_large),
    }
    by_size = ("small", "medium", "large")
    lines = [f"{metrics.image_count} images, {metrics.box_count} boxes", "", _row("", width, heading)]
    lines += [_row(name, width, values) for name, values in overall.items()]
    lines += ["", _row("class", width, ("boxes", *heading, *by_size))]
    for name, row in metrics.per_class.items():
        values = (row.ap50_95, row.ap50, row.ap75, row.recall50_95, row.ap_small, row.ap_medium, row.ap_large)
        lines.append(_row(name, width, (str(row.boxes), *values)))
    return [line.rstrip() for line in lines]


def _row(name: str, width: int, cells: Sequence[str | float | None]) -> str:
    return f"{name:<{width}}" + "".join(f"{_cell(cell):>9}" for cell in cells)


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else f"{value:.3f}"
