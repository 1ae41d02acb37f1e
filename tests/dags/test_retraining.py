"""Retraining with real steps on real photographs: `retrain_yolo_nas` after the data changed, for the better and not.

The champion has learned a third of the training images. Then nothing changes; then the others are added; then the
classes of the training boxes are mixed up. That a new data version starts the DAG is in test_dataset_asset.py and
test_standalone.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from test_dag_chain import load_dag
from test_gate_in_the_dag import parent_tags, real_commands
from typed_chain import Terminal

from pipeline_tasks.tracking.client import connect
from pipeline_tasks.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "retrained_cells"
ANNOTATIONS = "annotations/instances_train.json"
PARAMETERS = """
start: {{dataset: "{dataset}", student_variant: pico, teacher_variant: pico, image_size: 96, model_name: {model},
  threads: 1, estimate_steps: 0}}
pretrain: {{epochs: 1}}
pseudo_label: {{shards: 1}}
distill: &training
  {{epochs: 6, batch_size: 8, learning_rate: 0.004, warmup_steps: 10, ema_decay: 0.95, evaluate_every_epochs: 3}}
teach: {{<<: *training, epochs: 2}}
quantize: {{calibration_images: 32, sensitivity_images: 8, qat: never, selection_evaluations: 0}}
export: {{comparison_images: 4}}
gate: {{minimum_map: 0.0, maximum_map_drop: 100.0, champion_margin: 0.5, latency_repeats: 20, latency_threads: 1,
  latency_warmup_seconds: 0.1, maximum_spread: 1000.0, maximum_box_error_pixels: null}}
"""


@dataclass(frozen=True)
class Retrained:
    """One run of a DAG: states of its tasks, tags of its MLflow run, what was printed."""

    states: dict[str, str]
    tags: dict[str, str]
    said: str

    def with_state(self, state: str) -> set[str]:
        return {task for task, found in self.states.items() if found == state}


RunDag = Callable[[str], Retrained]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """A workspace, and bccd with every third training image."""
    folder = tmp_path_factory.mktemp("retraining")
    shared = Path(os.environ.get("NASLINE_SHARED", REPOSITORY.parent / "shared")).resolve() / "data/bccd"
    terminal = Terminal(folder, folder / "cells")
    shutil.copytree(shared, terminal.data)
    (terminal.folder / "params.yaml").write_text(PARAMETERS.format(dataset=terminal.data, model=MODEL))
    content = training_set(terminal)
    (folder / "all.json").write_text(json.dumps(content))
    write_training_set(terminal, {**content, "images": content["images"][::3]})
    return terminal


def training_set(terminal: Terminal) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((terminal.data / ANNOTATIONS).read_text())
    return content


def write_training_set(terminal: Terminal, content: dict[str, Any]) -> None:
    """The images and their boxes; pictures that no record names go, as their split would."""
    kept = {image["id"] for image in content["images"]}
    boxes = [box for box in content["annotations"] if box["image_id"] in kept]
    (terminal.data / ANNOTATIONS).write_text(json.dumps({**content, "annotations": boxes}))


@pytest.fixture(scope="module")
def run_dag(terminal: Terminal) -> Iterator[RunDag]:
    """Runs a DAG with the real `nasline`, whose parameters are those of params.yaml."""
    with real_commands(terminal):

        def run(dag: str) -> Retrained:
            output = StringIO()
            with contextlib.redirect_stdout(output):
                done = load_dag(dag).test()
            import step_operator

            states = {ti.task_id: str(ti.state) for ti in done.get_task_instances()}
            tags = parent_tags(terminal.workspace, step_operator.run_name(done.run_id))
            assert str(done.state) == "success", output.getvalue()
            return Retrained(states, tags, output.getvalue())

        yield run


def champion(terminal: Terminal) -> tuple[str, float]:
    """Version of the champion, and the mAP that its gate measured."""
    version = connect(Workspace(terminal.workspace)).get_model_version_by_alias(MODEL, "champion")
    return str(version.version), float(version.tags["nasline.int8_map50_95"])


@pytest.fixture(scope="module")
def first(run_dag: RunDag, terminal: Terminal) -> tuple[str, float]:
    run_dag("train_yolo_nas")
    return champion(terminal)


@pytest.fixture(scope="module")
def unchanged(run_dag: RunDag, first: tuple[str, float]) -> Retrained:
    return run_dag("retrain_yolo_nas")


@pytest.fixture(scope="module")
def with_more_images(run_dag: RunDag, terminal: Terminal, unchanged: Retrained) -> Retrained:
    write_training_set(terminal, json.loads((terminal.folder / "all.json").read_text()))
    return run_dag("retrain_yolo_nas")


@pytest.fixture(scope="module")
def better(terminal: Terminal, with_more_images: Retrained) -> tuple[str, float]:
    return champion(terminal)


@pytest.fixture(scope="module")
def with_mixed_classes(run_dag: RunDag, terminal: Terminal, better: tuple[str, float]) -> Retrained:
    content = training_set(terminal)
    identifiers = [category["id"] for category in content["categories"]]
    following = dict(zip(identifiers, [*identifiers[1:], identifiers[0]], strict=True))
    boxes = [{**box, "category_id": following[box["category_id"]]} for box in content["annotations"]]
    write_training_set(terminal, {**content, "annotations": boxes})
    return run_dag("retrain_yolo_nas")


def test_nothing_is_trained_while_nothing_changed(unchanged: Retrained) -> None:
    assert unchanged.with_state("success") == {"report"}
    assert f"nothing to do: {MODEL} v1 was made from these datasets" in unchanged.said


def test_a_better_engine_becomes_champion(
    first: tuple[str, float], with_more_images: Retrained, better: tuple[str, float]
) -> None:
    assert "pretrain.student" not in with_more_images.states and with_more_images.states["register"] == "success"
    assert (first[0], better[0]) == ("1", "2") and better[1] > first[1] > 0.02
    tags = with_more_images.tags
    assert (tags["nasline.champion"], tags["nasline.registered"]) == (f"{MODEL} v1", f"{MODEL} v2")


def test_a_worse_engine_is_rejected_and_the_champion_stays(
    better: tuple[str, float], with_mixed_classes: Retrained, terminal: Terminal
) -> None:
    assert {"register", "gate.cpu"} <= with_mixed_classes.with_state("skipped")
    assert {"teach", "distill", "quantize", "export", "report"} <= with_mixed_classes.with_state("success")
    verdict = with_mixed_classes.tags["nasline.verdict"]
    assert verdict.startswith("rejected: ") and "mAP50-95 against the champion" in verdict
    assert champion(terminal) == better
