"""teach, pseudo_label and distill for real, on pictures of two coloured squares: seconds, nothing is learned well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

import model
from model.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from model.data.tables import BOXES_SCHEMA, IMAGES_SCHEMA, DatasetMetadata, read_dataset, write_dataset
from model.detections import Detections
from model.preprocessing import Preprocessing
from pipeline_tasks import distill, pinned_files, pretrain, pseudo_label, teach, teacher_checkpoint
from pipeline_tasks.errors import DataError, ParameterError, TemporaryError
from pipeline_tasks.execution import StepContext
from pipeline_tasks.params import resolve

CLASSES = ("red", "green")
SIDE = 64
SHORT = {"epochs": 2, "batch_size": 4, "warmup_steps": 1, "learning_rate": 0.01, "ema_decay": 0.5, "mosaic": 0.0}
OPTIONS: dict[str, Any] = {
    "start.image_size": SIDE, "start.threads": 1, "start.student_variant": "pico", "start.teacher_variant": "pico",
    **{f"{step}.{name}": value for step in ("teach", "distill") for name, value in SHORT.items()},
    "teach.minimum_precision": 0.0, "teach.minimum_threshold": 0.0,
}  # fmt: skip


@dataclass
class Stopper:
    """Asks for a stop after some optimiser steps."""

    after: int = 10**6
    asked: int = 0

    def cooperative(self) -> Any:
        return nullcontext()

    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.after


def _boxes(image_id: int) -> list[dict[str, Any]]:
    left, top = 4 + 3 * (image_id % 8), 8 + 2 * (image_id % 5)
    return [
        {
            "image_id": image_id, "category": label, "x": left + 20.0 * label, "y": float(top), "w": 16.0, "h": 20.0,
            "area": 320.0, "iscrowd": False, "score": 1.0, "source": "label", "annotation_id": f"{image_id}-{label}",
            "source_record": "made up",
        }
        for label in (0, 1)
    ]  # fmt: skip


def _draw(path: Path, image_id: int) -> None:
    picture = np.random.default_rng(image_id).integers(0, 60, (SIDE, SIDE, 3), np.uint8)
    for box in _boxes(image_id):
        x, y = int(box["x"]), int(box["y"])
        picture[y : y + 20, x : x + 16, 2 - box["category"]] = 220  # OpenCV writes blue, green, red
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def _write_set(folder: Path, pictures: Path, role: str, splits: dict[str, range]) -> None:
    rows, boxes = [], []
    for split, ids in splits.items():
        for image_id in ids:
            _draw(pictures / f"images/{image_id}.png", image_id)
            rows.append({
                "image_id": image_id, "original_id": str(image_id), "root": 0, "path": f"images/{image_id}.png",
                "width": SIDE, "height": SIDE, "split": split, "sha256": None, "licence": "MIT",
            })  # fmt: skip
            boxes += _boxes(image_id) if role == "target" else []
    names = CLASSES if role == "target" else ()
    licences = {"images": {"MIT": len(rows)}, "annotations": "CC0-1.0"}
    metadata = DatasetMetadata(role, names, tuple(range(1, len(names) + 1)), (role,), licences=licences)
    tables = [pa.Table.from_pylist(*pair) for pair in ((rows, IMAGES_SCHEMA), (boxes, BOXES_SCHEMA))]
    write_dataset(folder, *tables, metadata)


def _checkpoint(folder: Path, variant: str, class_names: tuple[str, ...], seed: int, origin: str) -> Path:
    torch.manual_seed(seed)
    network = model.build(variant, len(class_names))
    for head in (network.heads.head1, network.heads.head2, network.heads.head3):
        torch.nn.init.normal_(head.cls_pred.weight, std=0.3)  # classes of an untrained head would hardly differ
    lineage = {"weights": [origin], "annotations": [], "images": {}}
    save_checkpoint(folder, network, CheckpointMetadata(variant, class_names, Preprocessing(320), 7, lineage=lineage))
    return folder


@dataclass
class Bench:
    """Inputs on disk, and contexts for the steps."""

    root: Path
    options: dict[str, Any] = field(default_factory=lambda: dict(OPTIONS))

    def context(self, name: str, stopper: Stopper | None = None, state: str = "", **inputs: Path) -> StepContext:
        output = self.root / name / "output"
        output.mkdir(parents=True)
        (self.root / (state or name) / "state").mkdir(parents=True, exist_ok=True)
        digests = {
            key: pinned_files._digest("true_boxes" if key == "true_boxes" else "checkpoint", path)
            for key, path in inputs.items()
            if key.startswith(("extra_teachers", "true_boxes"))
        }
        unused: Any = None
        return StepContext(
            parameters=resolve(None, self.options), part="", inputs={"target": self.root / "target", **inputs},
            input_digests={"target": "t", **digests}, output=output, state=self.root / (state or name) / "state",
            published=self.root / name / "key", workspace=unused,
            run={"datasets": {role: {"path": str(self.root / f"{role}_raw")} for role in ("target", "unlabeled")}},
            champion=None, stopper=stopper or Stopper(), tracker=_NoTracker(), save_state=lambda: None,
        )  # fmt: skip

    def with_options(self, **changes: Any) -> Bench:
        return replace(self, options={**self.options, **{key.replace("__", "."): v for key, v in changes.items()}})


class _NoTracker:
    def deliver(self) -> None:
        """Nothing to do."""


@pytest.fixture(scope="module", autouse=True)
def _without_curves() -> Iterator[None]:
    """Drawing takes longer than training here, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.plots.training_curves", lambda history, path: None)
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("teaching")
    _write_set(root / "target", root / "target_raw", "target", {"train": range(8), "val": range(8, 12)})
    _write_set(root / "unlabeled", root / "unlabeled_raw", "unlabeled", {"unlabeled": range(20, 26)})
    _checkpoint(root / "start", "pico", CLASSES, 1, "random initialisation")
    _checkpoint(root / "swapped", "t", ("blue", "green", "red"), 2, "somebody")
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(20, 26)],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}, {"id": 3, "name": "unheard of"}],
        "annotations": [
            {"id": 1, "image_id": i, "category_id": 1 + box["category"], "bbox": [box[side] for side in "xywh"]}
            for i in range(20, 26)
            for box in _boxes(i)
        ],
    }
    (root / "truth.json").write_text(json.dumps(truth))
    return Bench(root)


@pytest.fixture(scope="module")
def taught(bench: Bench) -> tuple[Path, dict[str, Any]]:
    """A teacher of two networks, one trained here and one that lists its classes in another order."""
    context = bench.context("teach", weights=bench.root / "start", extra_teachers_1=bench.root / "swapped")
    return context.output, teach.teach(context)


def test_teach_reports_what_every_mode_is_worth_per_class(taught: tuple[Path, dict[str, Any]]) -> None:
    output, summary = taught
    modes = json.loads((output / "thresholds.json").read_text())["flip_consistency"]
    assert set(modes) == {"none", "keep", "weight", "average"}
    for mode in modes.values():
        assert set(mode["thresholds"]) == set(CLASSES)
        per_class = mode["validation_quality"]["per_class"]
        assert {name: entry["threshold"] for name, entry in per_class.items()} == mode["thresholds"]
        assert all({"precision", "recall", "kept", "truth"} <= set(entry) for entry in per_class.values())
    assert summary["teachers"] == 2 and 0 <= summary["teacher_map50_95"] <= 1
    assert (output / "plots/pseudo_labels.png").stat().st_size > 5000
    assert (output / "history.csv").read_text().startswith("epoch")


def test_ensemble_is_averaged_with_its_classes_in_the_targets_order(
    bench: Bench, taught: tuple[Path, dict[str, Any]]
) -> None:
    teacher, metadata = teacher_checkpoint.load_teacher(taught[0] / "checkpoint")
    assert metadata.class_names == CLASSES and metadata.preprocessing == Preprocessing(SIDE)
    assert metadata.lineage["weights"] == ["random initialisation", "somebody"]
    images = torch.rand(1, 3, SIDE, SIDE)
    first, _ = load_checkpoint(taught[0] / "checkpoint")
    second, _ = load_checkpoint(bench.root / "swapped")
    with torch.no_grad():
        theirs = second(images)[0][1][..., [2, 1]]  # red is its third class, green its second
        expected = (first(images)[0][1] + theirs) / 2
    torch.testing.assert_close(teacher(images)[0][1], expected, rtol=1e-4, atol=1e-6)


def test_champion_teaches_without_training(bench: Bench) -> None:
    context = bench.with_options(teach__source="champion").context("champion", weights=bench.root / "swapped")
    summary = teach.teach(context)
    assert summary["steps"] == 0 and summary["teachers"] == 1
    network, metadata = load_checkpoint(context.output / "checkpoint")
    assert (metadata.variant, metadata.class_names, metadata.step) == ("t", CLASSES, 7)
    given, _ = load_checkpoint(bench.root / "swapped")
    images = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = given(images)[0][1][..., [2, 1]]
        # two rows instead of three: the same products, which another kernel may sum in another order
        torch.testing.assert_close(network(images)[0][1], expected, rtol=1e-5, atol=1e-7)
    assert (context.output / "history.csv").read_text() == f"epoch,map50_95\n0,{summary['teacher_map50_95']}\n"


def test_nothing_is_pretrained_for_a_teacher_that_is_not_trained(bench: Bench) -> None:
    context = bench.with_options(teach__source="champion").context("unused", pretrain=bench.root / "target")
    assert pretrain.pretrain(replace(context, part="teacher")) == {"pretrained": 0}
    assert load_checkpoint(context.output / "checkpoint")[1].step == 0


def test_champions_ensemble_goes_on_teaching(bench: Bench, taught: tuple[Path, dict[str, Any]]) -> None:
    chosen = bench.with_options(teach__source="champion_teacher", teach__flip=0.0)
    context = chosen.context("inherited", weights=taught[0] / "checkpoint")
    assert teach.teach(context)["teachers"] == 2
    folders = teacher_checkpoint.member_folders(context.output / "checkpoint")
    assert [load_checkpoint(folder)[1].variant for folder in folders] == ["pico", "t"]
    assert list(json.loads((context.output / "thresholds.json").read_text())["flip_consistency"]) == ["none"]


def test_a_teacher_that_lacks_a_class_is_refused_before_training(bench: Bench) -> None:
    stranger = _checkpoint(bench.root / "stranger", "pico", ("red",), 3, "somebody")
    context = bench.context("refused", weights=bench.root / "start", extra_teachers_1=stranger)
    with pytest.raises(DataError) as refused:
        teach.teach(context)
    sentence = str(refused.value)
    assert sentence.startswith(f"teach.extra_checkpoints: the teacher {stranger} does not know the target's classes gr")
    assert sentence.endswith("leave it out"), "teach.source is train already"
    chosen = bench.with_options(teach__source="champion").context("foreign champion", weights=stranger)
    with pytest.raises(DataError, match=r"^teach\.source: .* set teach\.source to train$"):
        teach.teach(chosen)


@pytest.mark.parametrize("field", ["weights", "extra_teachers_1"])
def test_a_teacher_of_another_input_size_is_told(
    bench: Bench, field: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`swapped` learned at 320 pixels; what it teaches here is of no interest."""
    monkeypatch.setattr(teach, "_judge", lambda *_: {})
    own = bench.root / f"of this size {field}"
    network, metadata = load_checkpoint(bench.root / "start")
    save_checkpoint(own, network, replace(metadata, preprocessing=Preprocessing(SIDE)))
    inputs = {"weights": own, field: bench.root / "swapped"}
    context = bench.with_options(teach__source="champion").context(f"size {field}", **inputs)
    with caplog.at_level("WARNING"):
        teach.teach(context)
    told = [record.getMessage() for record in caplog.records if "learned at" in record.getMessage()]
    source = "the champion" if field == "weights" else f"teach.extra_checkpoints: {bench.root / 'swapped'}"
    assert told == [f"{source} learned at 320 pixels and teaches at {SIDE} (start.image_size)"]


def test_a_teacher_that_was_changed_since_the_start_is_refused(bench: Bench) -> None:
    changed = _checkpoint(bench.root / "changed", "pico", CLASSES, 3, "somebody")
    context = bench.context("stale", weights=bench.root / "start", extra_teachers_1=changed)
    _checkpoint(changed, "pico", CLASSES, 4, "somebody")
    with pytest.raises(DataError, match="was changed since the run started"):
        teach.teach(context)


def _label(bench: Bench, name: str, teacher: Path) -> tuple[Path, dict[str, Any]]:
    """Both shards, then the merge."""
    inputs = {"unlabeled": bench.root / "unlabeled", "teacher": teacher, "true_boxes": bench.root / "truth.json"}
    context = bench.context(name, **inputs)
    for index in range(2):
        shard = context.published.with_name("key.shards") / f"{index}-of-2"
        shard.mkdir(parents=True)
        pseudo_label._label_shard(replace(context, output=shard), index, 2)
        (shard / "manifest.json").write_text("{}")
    return context.output, pseudo_label.pseudo_label(context)


@pytest.mark.parametrize("mode", ["none", "weight"])
def test_labels_are_measured_against_true_boxes(bench: Bench, taught: tuple[Path, dict[str, Any]], mode: str) -> None:
    output, summary = _label(bench.with_options(pseudo_label__flip_consistency=mode), f"labels {mode}", taught[0])
    quality = json.loads((output / "label_quality.json").read_text())
    assert quality["truth"] == summary["truth"] == 12
    assert quality["kept"] == summary["boxes"]
    if quality["kept"]:
        assert summary["precision"] == quality["correct"] / quality["kept"]
    assert summary["recall"] == quality["correct"] / 12
    expected = json.loads((taught[0] / "thresholds.json").read_text())["flip_consistency"][mode]["validation_quality"]
    assert summary.get("validation_recall") == expected["recall"]
    assert (output / "plots/label_quality.png").exists()


def test_mirror_modes_need_a_teacher_that_saw_mirrored_images(
    bench: Bench, taught: tuple[Path, dict[str, Any]]
) -> None:
    folder = bench.root / "unflipped"
    folder.mkdir()
    (folder / "checkpoint").symlink_to(taught[0] / "checkpoint")
    modes = json.loads((taught[0] / "thresholds.json").read_text())["flip_consistency"]
    (folder / "thresholds.json").write_text(json.dumps({"flip_consistency": {"none": modes["none"]}}))
    with pytest.raises(ParameterError, match=r"flip_consistency is 'keep', but with teach\.flip 0"):
        _label(bench.with_options(pseudo_label__flip_consistency="keep"), "unflipped labels", folder)


def test_no_pseudo_label_at_all_is_told(
    bench: Bench, taught: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = bench.root / "silent"
    teacher.mkdir()
    judged = {"thresholds": dict.fromkeys(CLASSES, 1.0), "validation_quality": {"precision": None, "recall": 0.0}}
    (teacher / "thresholds.json").write_text(json.dumps({"flip_consistency": {"none": judged}}))
    (teacher / "checkpoint").symlink_to(taught[0] / "checkpoint")
    with caplog.at_level("WARNING"):
        _, summary = _label(bench, "no labels", teacher)
    assert summary["boxes"] == 0
    assert "no pseudo-label came out" in caplog.text and "teach.minimum_precision (0.0)" in caplog.text


def test_minimum_threshold_may_be_below_the_usual_floor(bench: Bench) -> None:
    """A teacher that learned little is right with a score of 0.03."""
    validation_set = read_dataset(bench.root / "target").split("val")
    truth = validation_set.all_boxes()
    corners = np.concatenate([truth.boxes_xywh[:, :2], truth.boxes_xywh[:, :2] + truth.boxes_xywh[:, 2:]], axis=1)
    scores = np.full(len(corners), 0.03, np.float32)
    found = Detections(truth.image_index, corners.astype(np.float32), scores, truth.labels)

    def thresholds(least: float) -> list[float]:
        context = bench.with_options(teach__minimum_threshold=least).context(f"floor {least}")
        return list(teach._labels_of_mode(context, found, validation_set)["thresholds"].values())

    assert all(0 < value <= 0.03 for value in thresholds(0.0))
    assert thresholds(0.3) == [1.0, 1.0]


@pytest.fixture(scope="module")
def labels(bench: Bench, taught: tuple[Path, dict[str, Any]]) -> Path:
    """Pseudo-labels for the student: the true boxes of half the images, with a score of 0.6."""
    boxes = [{**box, "score": 0.6, "source": "pseudo"} for image_id in (20, 22, 24) for box in _boxes(image_id)]
    unlabeled = read_dataset(bench.root / "unlabeled")
    metadata = replace(unlabeled.metadata, class_names=CLASSES, category_ids=(1, 2))
    tables = unlabeled.images, pa.Table.from_pylist(boxes, schema=BOXES_SCHEMA)
    write_dataset(bench.root / "labels", *tables, metadata)
    return bench.root / "labels"


@pytest.mark.parametrize(
    ("weight", "factor", "expected"), [("score", 1.0, 0.6), ("score", 0.5, 0.3), ("one", 1.0, 1.0), ("one", 0.25, 0.25)]
)
def test_pseudo_labels_weigh_their_score_or_one(
    bench: Bench, labels: Path, weight: str, factor: float, expected: float
) -> None:
    chosen = bench.with_options(distill__pseudo_weight=weight, distill__pseudo_factor=factor)
    (images,) = distill._pseudo_labelled(chosen.context(f"weights {weight} {factor}", pseudo_labels=labels))
    assert images.image_ids.tolist() == [20, 22, 24]
    assert [images.boxes(row).weights.tolist() for row in range(3)] == [pytest.approx([expected] * 2)] * 3


def test_orders_of_labels_and_pseudo_labels(bench: Bench, labels: Path) -> None:
    target = read_dataset(bench.root / "target").split("train")
    (pseudo,) = distill._pseudo_labelled(bench.context("orders", pseudo_labels=labels))

    def phases(order: str, sets: list[Any]) -> Any:
        given = resolve(None, {**bench.options, "distill.pseudo_order": order}).distill
        return distill._phases(given, sets)

    assert phases("mixed", [target, pseudo]) is None
    assert phases("first", [target]) is None
    first, both = phases("first", [target, pseudo]), phases("mixed_first", [target, pseudo])
    assert first.first.image_ids.tolist() == [20, 22, 24] and both.first.image_ids.tolist() == [*range(8), 20, 22, 24]
    assert first.rest.image_ids.tolist() == both.rest.image_ids.tolist() == list(range(8))
    assert first.first_share == 0.5


def test_distillation_in_two_phases_resumes_to_the_bit(
    bench: Bench, taught: tuple[Path, dict[str, Any]], labels: Path
) -> None:
    """11 images in batches of 4 are 2 steps an epoch; the first 3 of 4 are on pseudo-labels, the first 2 with the
    teacher; the run is broken off after 1."""
    chosen = bench.with_options(
        distill__pseudo_order="first", distill__pseudo_share=0.75, distill__feature_weight=0.1,
        distill__feature_kind="cwd", distill__teacher_share=0.5, distill__evaluate_every_epochs=2,
    )  # fmt: skip
    inputs = {"weights": bench.root / "start", "teacher": taught[0] / "checkpoint", "pseudo_labels": labels}
    whole = chosen.context("whole", **inputs)
    summary = distill.distill(whole)
    assert summary["steps"] == 4 and summary["images"] == 11 and summary["pseudo_boxes"] == 6
    with pytest.raises(TemporaryError, match="told to stop"):
        distill.distill(chosen.context("broken", Stopper(after=1), **inputs))
    resumed = chosen.context("resumed", state="broken", **inputs)
    distill.distill(resumed)
    network, metadata = load_checkpoint(whole.output / "checkpoint")
    again, _ = load_checkpoint(resumed.output / "checkpoint")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert not hasattr(network, "feature_adapters")
    assert metadata.lineage["weights"] == ["random initialisation", "somebody"]
    rows = [json.loads(line) for line in (whole.output / "metrics.jsonl").read_text().splitlines()]
    terms = [row["loss_distill_features"] for row in rows]
    assert terms[0] > 0 and terms[1] == 0
