"""`nasline bench`: engines side by side, their latency taken in turns and their accuracy where it is known."""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.bench_picture import Point, draw_bench, frontiers
from pipeline_tasks.engine_table import EngineRow, engine_table
from pipeline_tasks.errors import ParameterError, TemporaryError
from pipeline_tasks.gate_latency import GPU_REPEATS
from pipeline_tasks.gate_parameters import GateParameters
from pipeline_tasks.output_place import require_folder
from pipeline_tasks.params import StartParameters
from pipeline_tasks.published_latency import PUBLISHED, published_table
from pipeline_tasks.workspace import open_workspace, write_json

if TYPE_CHECKING:
    from model.engines import Runtime
    from model.engines.latency import LatencyRecord
    from pipeline_tasks.bench_subjects import Subject
    from pipeline_tasks.evaluation_set import EvaluationSet
    from pipeline_tasks.tracking.bench_run import BenchRun
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

RESULT_FILE, TABLE_FILE, PICTURE_FILE = "bench.json", "table.txt", "frontier.png"
DEFAULTS = GateParameters()
RECORDED = "its gate"
FEWEST_REPEATS, MOST_REPEATS = 10, 100_000


@dataclass(frozen=True)
class Measuring:
    """How latency is taken; the defaults are the gate's."""

    threads: int = DEFAULTS.latency_threads
    repeats: int = DEFAULTS.latency_repeats
    warmup_seconds: float = DEFAULTS.latency_warmup_seconds
    maximum_spread: float = DEFAULTS.maximum_spread
    attempts: int = DEFAULTS.latency_attempts

    def check(self) -> None:
        """Raise ParameterError for a number out of its range."""
        limits = {
            "--threads": (self.threads, 0, 1024),
            "--repeats": (self.repeats, FEWEST_REPEATS, MOST_REPEATS),
            "--warmup-seconds": (self.warmup_seconds, 0, 600),
            "--attempts": (self.attempts, 1, 20),
        }
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise ParameterError(f"{name} must lie in {least} to {most}, got {value:g}")
        if not self.maximum_spread > 0:
            raise ParameterError(f"--maximum-spread must be positive, got {self.maximum_spread:g}")


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Measure the latency of engines against each other, with their accuracy, as table, picture and MLflow run."
    command = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    command.add_argument(
        "engines", nargs="+", metavar="[RUNTIME:]ENGINE", help="engine folder, .onnx, .xml or .plan file, checkpoint "
        "folder, or models:/NAME@champion; a runtime before the colon wins over --runtime",
    )  # fmt: skip
    command.add_argument(
        "--runtime", choices=("openvino", "onnxruntime", "tensorrt"), default="openvino", help="default openvino"
    )
    command.add_argument(
        "--dataset", type=Path, metavar="DIR", help="measure accuracy on this COCO folder or published dataset"
    )
    command.add_argument("--split", default="test", help="of the dataset: train, val or test (default test)")
    command.add_argument("--images", type=Path, metavar="DIR", help="where a published dataset's pictures lie")
    command.add_argument(
        "--published", action="store_true", help="show beside them what is published for other detectors on a T4"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help=f"keep {RESULT_FILE}, {TABLE_FILE}, {PICTURE_FILE}")
    _add_measuring(command)
    command.add_argument("--experiment", default=StartParameters().experiment, help="in MLflow (default %(default)s)")
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.set_defaults(command_function=_run)


def _add_measuring(command: argparse.ArgumentParser) -> None:
    own = Measuring()
    texts: dict[str, tuple[type, float, str]] = {
        "threads": (int, own.threads, "threads of engines on the CPU; 0 takes every core"),
        "repeats": (int, own.repeats, f"timed runs of each engine; on a GPU at least {GPU_REPEATS}"),
        "warmup-seconds": (float, own.warmup_seconds, "untimed running of each engine before"),
        "maximum-spread": (float, own.maximum_spread, "largest (p90 - min) / min; above it is repeated, then refused"),
        "attempts": (int, own.attempts, "how often a measurement that spreads too much is made"),
    }
    for name, (kind, default, text) in texts.items():
        command.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default {default})")


def _run(arguments: argparse.Namespace) -> int:
    given = arguments
    bench(
        given.engines,
        runtime=given.runtime,
        dataset=given.dataset,
        split=given.split,
        pictures=given.images,
        published=given.published,
        out=given.out,
        measuring=Measuring(
            given.threads, given.repeats, given.warmup_seconds, given.maximum_spread, given.attempts
        ),
        experiment=given.experiment,
        workspace=given.workspace,
    )  # fmt: skip
    return 0


def bench(
    engines: Sequence[str],
    *,
    runtime: Runtime = "openvino",
    dataset: Path | None = None,
    split: str = "test",
    pictures: Path | None = None,
    published: bool = False,
    out: Path | None = None,
    measuring: Measuring | None = None,
    experiment: str = "nasline",
    workspace: str = ".nasline",
) -> list[EngineRow]:
    """Print the table of engines and log it to MLflow; with `out` also write bench.json, table.txt and frontier.png.

    Raises:
        UsageError: an engine is given twice, or GPU and CPU are mixed.
        DataError: a set or an engine cannot be understood.
        ParameterError: a number is out of range, the set has no such split, or `out` is no possible place.
        ConfigurationError: a runtime or its device is not there.
        TemporaryError: the latency spreads too much in every attempt.
        ValueError: there is no engine at a place.
    """
    from pipeline_tasks.bench_subjects import open_subjects
    from pipeline_tasks.evaluation_set import read_evaluation_set

    how = measuring or Measuring()
    how.check()
    if out is not None:
        require_folder("--out", out)
    place = open_workspace(workspace)
    subjects = open_subjects(list(engines), runtime, how.threads, place)
    measured_on = read_evaluation_set(dataset, split, pictures) if dataset else None
    records = _latency(subjects, how)
    where = f"{dataset.resolve().name} {split}" if dataset else ""
    rows = [_row(subject, records[subject.name], measured_on, where) for subject in subjects]
    lines = engine_table(rows) + (["", *published_table()] if published else [])
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="nasline-bench-") as scratch:
        folder = out or Path(scratch)
        _write(folder, rows, lines, published)
        run = _mlflow_run(folder, rows, how, {"dataset": str(dataset), "split": split} if dataset else {})
        _log(place, experiment, run)
    if out:
        log.info("%s, %s and %s are in %s", RESULT_FILE, TABLE_FILE, PICTURE_FILE, out)
    return rows


def _latency(subjects: Sequence[Subject], how: Measuring) -> dict[str, LatencyRecord]:
    """Batch one, or an engine's fixed batch; engines in turns, as the gate does; noise is refused."""
    import numpy as np

    from model.engines.latency import measure_latency, require_quiet

    random, on_gpu = np.random.default_rng(0), subjects[0].engine.name == "tensorrt"
    sizes = {subject.name: subject.preprocessing.input_size for subject in subjects}
    records = measure_latency(
        {subject.name: subject.engine for subject in subjects},
        {name: random.integers(0, 256, (1, 3, size, size), dtype=np.uint8) for name, size in sizes.items()},
        warmup_seconds=how.warmup_seconds,
        repeats=max(how.repeats, GPU_REPEATS) if on_gpu else how.repeats,
        spread_limit=how.maximum_spread,
        attempts=how.attempts,
        kind="gpu" if on_gpu else "cpu",
    )
    try:
        require_quiet(records.values())
    except ValueError as error:
        raise TemporaryError(f"{error} (--maximum-spread)") from None
    return records


def _row(subject: Subject, record: LatencyRecord, measured_on: EvaluationSet | None, where: str) -> EngineRow:
    """A dataset that was given wins over what a gate wrote down."""
    if measured_on is None:
        return EngineRow(record, subject.recorded_map, RECORDED if subject.recorded_map is not None else "")
    from model.evaluation import detect, evaluate
    from pipeline_tasks.commands.evaluate import label_mapping, with_labels

    images = measured_on.images
    labels = label_mapping(subject.class_names, images.class_names)
    found = detect(subject.engine.run, images, measured_on.open_image, subject.preprocessing, batch_size=1)
    value = evaluate(with_labels(found, labels), images).map50_95
    return EngineRow(record, None if math.isnan(value) else value, where)  # a set may be without boxes


def _write(folder: Path, rows: Sequence[EngineRow], lines: Sequence[str], published: bool) -> None:
    points = [_point(row) for row in rows]
    best = [point for line in frontiers(points) for point in line]
    shown = PUBLISHED if published else ()
    engines = [
        {
            "name": row.record.name,
            "map50_95": row.map50_95,
            "map_of": row.map_of,
            "on_frontier": point in best,
            "latency": row.record.to_json(),
        }
        for row, point in zip(rows, points, strict=True)
    ]
    write_json(folder / RESULT_FILE, {"engines": engines, "published": [row.to_json() for row in shown]})
    (folder / TABLE_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_bench(points, shown, _drawn_latency(rows[0]), rows[0].record.device.device, folder / PICTURE_FILE)


def _point(row: EngineRow) -> Point:
    """On a GPU the network's own time, which is what publishers tell."""
    record = row.record
    latency_ms = record.p50_ms if record.gpu_p50_ms is None else record.gpu_p50_ms
    return Point(f"{record.name} ({record.runtime})", latency_ms, row.map50_95, record.batch)


def _drawn_latency(row: EngineRow) -> str:
    return "median latency" if row.record.gpu_p50_ms is None else "median time of the network on the GPU"


METRICS = ("min_ms", "p50_ms", "p90_ms", "p99_ms", "cpu_min_ms", "gpu_min_ms", "gpu_p50_ms", "gpu_p99_ms")


def _mlflow_run(folder: Path, rows: Sequence[EngineRow], how: Measuring, on: dict[str, str]) -> BenchRun:
    from pipeline_tasks.tracking.bench_run import BenchRun

    first = rows[0].record
    metrics = {}
    for row in rows:
        times = {f"latency_{name}": getattr(row.record, name) for name in METRICS}
        told = {**times, "map50_95": row.map50_95}
        metrics[row.record.name] = {name: float(value) for name, value in told.items() if value is not None}
    parameters = {
        "engines": ", ".join(row.record.name for row in rows), "repeats": str(first.repeats),
        "batch": ", ".join(map(str, sorted({row.record.batch for row in rows}))),
        "threads": str(how.threads), "warmup_seconds": f"{how.warmup_seconds:g}",
        "maximum_spread": f"{how.maximum_spread:g}", **on,
    }  # fmt: skip
    columns = ("name", "runtime", "runtime_version", "precision", "batch", "input_size", *METRICS, "spread")
    table: dict[str, list[Any]] = {name: [getattr(row.record, name) for row in rows] for name in columns}
    table = {name: values for name, values in table.items() if any(value is not None for value in values)}
    return BenchRun(
        name=f"bench {datetime.now():%Y-%m-%d %H:%M:%S}",
        parameters=parameters,
        tags={"nasline.device": first.device.device},
        metrics=metrics,
        table={**table, "map50_95": [row.map50_95 for row in rows], "map_of": [row.map_of for row in rows]},
        files=[folder / name for name in (RESULT_FILE, TABLE_FILE, PICTURE_FILE)],
    )


def _log(workspace: Workspace, experiment: str, run: BenchRun) -> None:
    from pipeline_tasks.tracking.bench_run import log_bench

    if where := log_bench(workspace, experiment, run):
        log.info("MLflow run %s", where)
