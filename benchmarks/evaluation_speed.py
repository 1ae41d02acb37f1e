"""COCO's twelve numbers from detections in memory: Nasline, pycocotools, faster-coco-eval and hotcoco.

    pip install --target PEERS --no-deps faster-coco-eval hotcoco
    python benchmarks/evaluation_speed.py [--peers PEERS] [--set NAME ...]

Peers are optional and are looked for in the folder given. A row per set is kept in results/evaluation_speed.json; only
missing ones are run. The libraries take turns in one process, and the median of the repeats is kept: CPU time, which
a busy machine hardly changes, and wall time. Every library starts from detections in the form it takes (columns here,
a list of dictionaries there); "without loading" leaves out what the others spend on reading that list. Nasline's time
includes the figures per class, the curves and the confusion matrix.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import Rows
from model.data.image_set import ImageSet
from model.detections import Detections
from model.evaluation import DetectionMetrics, evaluate
from pipeline_tasks.evaluation_set import read_evaluation_set

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = {
    "bccd": "test", "aquarium": "test", "playing_cards": "test", "pretrain_general": "val",
    "pretrain_general, training": "train",
}  # fmt: skip
SYNTHETIC = "synthetic, as large as COCO's validation set"
SYNTHETIC_IMAGES, SYNTHETIC_CLASSES = 5000, 80
DETECTIONS_PER_IMAGE = 100  # as many as the metric regards
SEED = 0
STATS = (
    *("map50_95", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("recall50_95_at_1", "recall50_95_at_10", "recall50_95", "recall_small", "recall_medium", "recall_large"),
)
"""Our names in the order of pycocotools' `stats`."""
PEERS = ("pycocotools", "faster_coco_eval", "hotcoco")


@dataclass(frozen=True)
class Timing:
    """One repeat of one library, in milliseconds."""

    cpu_ms: float
    wall_ms: float
    loading_cpu_ms: float


def main() -> None:
    """Measure the sets that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="folder with faster-coco-eval and hotcoco")
    parser.add_argument("--set", choices=[*REAL, SYNTHETIC], action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.insert(0, str(arguments.peers.resolve()))
    libraries = ["nasline", *(name for name in PEERS if find_spec(name))]
    rows = Rows("evaluation_speed")
    wanted = [
        {"set": name, "detections_per_image": DETECTIONS_PER_IMAGE, "libraries": libraries}
        for name in arguments.set or [*REAL, SYNTHETIC]
    ]
    for configuration in rows.missing(wanted):
        row = rows.add(configuration, measure(configuration["set"], libraries, arguments.repeats))
        print(describe(row), flush=True)


def measure(name: str, libraries: list[str], repeats: int) -> dict[str, Any]:
    """Medians of every library on one set, and how far its numbers are from pycocotools'."""
    images = load(name)
    found = detections(images, DETECTIONS_PER_IMAGE, SEED)
    if name == SYNTHETIC:
        repeats = min(repeats, 3)
    run = {library: runner(library, images, found) for library in libraries}
    timings: dict[str, list[Timing]] = {library: [] for library in libraries}
    stats: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(repeats):
        for library in libraries:
            timing, stats[library] = run[library]()
            timings[library].append(timing)
    reference = stats["pycocotools"]
    figures: dict[str, Any] = {"images": len(images), "boxes": len(images.all_boxes().labels), "repeats": repeats}
    figures["detections"] = len(found)
    for library in libraries:
        figures[library] = summary(timings[library]) | {
            "largest_difference": float(np.abs(stats[library] - reference).max())
        }
    ours = figures["nasline"]["cpu_ms"]
    figures["times_faster_than"] = {
        library: {
            "with_loading": round(figures[library]["cpu_ms"] / ours, 1),
            "without_loading": round(figures[library]["cpu_ms_without_loading"] / ours, 1),
        }
        for library in libraries[1:]
    }
    return figures


def summary(timings: list[Timing]) -> dict[str, float]:
    """Medians, rounded to a tenth of a millisecond."""
    return {
        "cpu_ms": round(statistics.median(timing.cpu_ms for timing in timings), 1),
        "cpu_ms_without_loading": round(statistics.median(t.cpu_ms - t.loading_cpu_ms for t in timings), 1),
        "wall_ms": round(statistics.median(timing.wall_ms for timing in timings), 1),
    }


def load(name: str) -> ImageSet:
    """A real set as its annotation file has it, or the synthetic one."""
    if name == SYNTHETIC:
        return synthetic(SYNTHETIC_IMAGES, SYNTHETIC_CLASSES, SEED)
    data = Path(os.environ.get("NASLINE_SHARED", REPOSITORY.parent / "shared")) / "data"
    return read_evaluation_set(data / name.split(",")[0], REAL[name]).images


def synthetic(count: int, classes: int, seed: int) -> ImageSet:
    """Boxes as many and as large as COCO's: 7.3 an image, few classes in one image, frequent and rare ones, crowds."""
    random = np.random.default_rng(seed)
    boxes_in_image = random.poisson(np.minimum(random.exponential(7.3, count), 60))
    owners = np.repeat(np.arange(count), boxes_in_image)
    frequency = 1 / np.arange(1, classes + 1)
    in_image = random.choice(classes, size=(count, 3), p=frequency / frequency.sum())
    labels = in_image[owners, random.integers(3, size=len(owners))]
    sides = np.exp(random.normal(4.0, 1.1, (len(owners), 2))).clip(4, 600)
    corners = random.random((len(owners), 2)) * (640 - sides)
    return ImageSet.from_arrays(
        [f"class {label}" for label in range(classes)],
        [f"images/{index}.jpg" for index in range(count)],
        [(640, 640)] * count,
        owners,
        np.concatenate([corners, sides], axis=1),
        labels,
        is_crowd=random.random(len(owners)) < 0.012,
    )


def detections(images: ImageSet, per_image: int, seed: int) -> Detections:
    """As a detector gives at a low threshold: about three around each box, better scored where they fit better, a
    tenth of them of another class; the rest invented, of low score."""
    random = np.random.default_rng(seed)
    truth = images.all_boxes()
    rows = np.repeat(np.arange(len(truth.labels)), random.poisson(3.0, len(truth.labels)))
    spread = random.exponential(0.08, len(rows))
    sides = truth.boxes_xywh[rows, 2:]
    near = truth.boxes_xyxy[rows] + random.normal(0, 1, (len(rows), 4)) * spread[:, None] * np.tile(sides, 2)
    any_class = random.integers(len(images.class_names), size=len(rows))
    labels = np.where(random.random(len(rows)) < 0.1, any_class, truth.labels[rows])
    pattern = random.integers(len(truth.labels), size=max(0, per_image * len(images) - len(rows)))
    places = random.integers(len(images), size=len(pattern))
    corners = random.random((len(pattern), 2)) * images.sizes[places] * 0.8
    invented_sides = truth.boxes_xywh[pattern, 2:] * np.exp(random.normal(0, 0.5, (len(pattern), 2)))
    boxes = np.concatenate([near, np.concatenate([corners, corners + invented_sides], axis=1)])
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    scores = np.append(random.beta(2, 2, len(rows)) * np.exp(-6 * spread), random.beta(0.5, 8, len(pattern)))
    owners = np.append(truth.image_index[rows], places)
    order = np.lexsort((-scores, owners))
    scores32 = scores.clip(0.01, 1).astype(np.float32)
    all_labels = np.append(labels, truth.labels[pattern])
    return Detections(owners[order], boxes[order].astype(np.float32), scores32[order], all_labels[order])


Run = Callable[[], tuple[Timing, "np.ndarray[Any, Any]"]]


def runner(library: str, images: ImageSet, found: Detections) -> Run:
    """A function that evaluates once; the ground truth is loaded before."""
    if library == "nasline":
        return lambda: run_ours(images, found)
    content, results = as_coco(images), as_results(found)
    make, evaluation = classes_of(library)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = make(content)
    return lambda: run_peer(truth, evaluation, results)


def run_ours(images: ImageSet, found: Detections) -> tuple[Timing, np.ndarray[Any, Any]]:
    """The whole evaluation, from columns."""
    cpu, wall = time.process_time(), time.perf_counter()
    metrics = evaluate(found, images)
    timing = Timing(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall), 0.0)
    return timing, stats_of(metrics)


def run_peer(truth: Any, evaluation: Any, results: list[dict[str, Any]]) -> tuple[Timing, np.ndarray[Any, Any]]:
    """The peer's whole evaluation, from a list of dictionaries (copies, since loading writes into them)."""
    copies = [dict(result) for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        cpu, wall = time.process_time(), time.perf_counter()
        loaded = truth.loadRes(copies)
        loading = time.process_time() - cpu
        run = evaluation(truth, loaded, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
        timing = Timing(1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall), 1e3 * loading)
    return timing, np.array(list(run.stats)[:12], np.float64)


def classes_of(library: str) -> tuple[Callable[[dict[str, Any]], Any], Any]:
    """How the library makes a ground truth from COCO's structure, and its evaluation."""
    if library == "hotcoco":
        from hotcoco import COCO, COCOeval

        return COCO, COCOeval
    if library == "faster_coco_eval":
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def make(content: dict[str, Any]) -> Any:
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        return truth

    return make, COCOeval


def as_coco(images: ImageSet) -> dict[str, Any]:
    """The set as the structure of a COCO file; ids of images and classes are their places."""
    truth = images.all_boxes()
    columns = zip(truth.image_index, truth.labels, truth.boxes_xywh.tolist(), truth.area, truth.is_crowd, strict=True)
    annotations = [
        {"id": row, "image_id": int(i), "category_id": int(c), "bbox": b, "area": float(a), "iscrowd": int(d)}
        for row, (i, c, b, a, d) in enumerate(columns, start=1)
    ]
    sizes = images.sizes.tolist()
    return {
        "info": {},
        "images": [{"id": i, "file_name": str(i), "width": w, "height": h} for i, (w, h) in enumerate(sizes)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(images.class_names)],
        "annotations": annotations,
    }


def as_results(found: Detections) -> list[dict[str, Any]]:
    """The detections as COCO's results."""
    columns = (found.image_index.tolist(), found.labels.tolist(), found.boxes_xywh.tolist(), found.scores.tolist())
    rows = zip(*columns, strict=True)
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]


def stats_of(metrics: DetectionMetrics) -> np.ndarray[Any, Any]:
    """The twelve numbers; -1 where the set has no such boxes, as pycocotools says it."""
    return np.nan_to_num(np.array([getattr(metrics, name) for name in STATS]), nan=-1.0)


def describe(row: dict[str, Any]) -> str:
    """One line a library."""
    figures = row["figures"]
    head = f"{row['configuration']['set']}: {figures['images']} images, {figures['detections']} detections"
    lines = []
    for name in row["configuration"]["libraries"]:
        of = figures[name]
        times = f"CPU {of['cpu_ms']} ms, without loading {of['cpu_ms_without_loading']} ms, wall {of['wall_ms']} ms"
        lines.append(f"  {name:<17} {times}, largest difference {of['largest_difference']:.1e}")
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
