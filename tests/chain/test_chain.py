"""The whole chain, for real and small: every step, reuse, rejection, prediction, retraining."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typed_chain import CHAIN, Terminal

pytestmark = pytest.mark.slow


def test_every_step_published_what_the_next_one_reads(finished: Terminal) -> None:
    run = json.loads((finished.workspace / "runs" / "one" / "run.json").read_text())
    assert set(run["steps"]) >= {"validate_data", "pretrain/student", "pretrain/teacher", "teach", "pseudo_label",
                                 "distill", "quantize", "export", "gate", "register"}  # fmt: skip
    assert not list((finished.workspace / "steps").glob("*/*.partial"))
    gate = finished.published("one", "gate")
    for picture in ("precision_recall", "confusion_matrix", "predictions"):
        assert (gate / "plots" / f"{picture}.png").stat().st_size > 5000
    assert (finished.published("one", "distill") / "plots" / "curves.png").exists()
    assert (finished.published("one", "validate_data") / "data_docs" / "index.html").exists()


def test_lineage_names_weights_annotations_and_images_apart(finished: Terminal) -> None:
    engine = json.loads((finished.published("one", "export") / "engine" / "engine.json").read_text())
    assert engine["lineage"]["weights"] == ["random initialisation"]
    assert engine["lineage"]["annotations"]
    assert len(engine["lineage"]["images"]) == 3, "pretraining set, target and pseudo-labelled set"


def test_quantization_reports_every_stage(finished: Terminal) -> None:
    summary = finished.manifest("one", "quantize")["summary"]
    assert {"float_map50_95", "ptq_map50_95", "selective_map50_95", "qat_map50_95"} <= set(summary)


def test_second_run_with_another_gate_limit_reuses_all_before_it_and_says_so(finished: Terminal) -> None:
    finished.start("strict", "--gate.minimum_map", "0.999")
    for command in CHAIN[:-2]:
        output = finished.nasline(*command, "--run", "strict")
        assert " reused: key " in output and "was made by run one" in output, command
    output = finished.nasline("gate", "--run", "strict", code=99)
    assert "verdict: rejected: INT8 mAP50-95" in output and "misses the limit 0.999" in output
    again = finished.nasline("gate", "--run", "strict", code=99)
    assert "gate reused" in again
    output = finished.nasline("register", "--run", "strict", code=99)
    assert "not registered, because the gate rejected" in output
    finished.nasline("register", "--rejection-is-result", "--run", "strict")


def test_champion_predicts_from_the_command_and_from_python(finished: Terminal, tmp_path: Path) -> None:
    photos = finished.data / "target" / "images"
    out = tmp_path / "out"
    finished.nasline("predict", "models:/chain_digits@champion", str(photos), "--out", str(out),
                     "--score-threshold", "0.01")  # fmt: skip
    entries = json.loads((out / "detections.json").read_text())
    count = len(list(photos.iterdir()))
    assert len(entries) == count and len(list(out.glob("*.jpg"))) == count
    script = (
        "import sys, json, nasline\n"
        "result = nasline.load('models:/chain_digits@champion').predict(sys.argv[1], score_threshold=0.01)\n"
        "result.save(sys.argv[2])\n"
        "p = result.prediction\n"
        "print(json.dumps([p.bboxes_xyxy.tolist(), p.labels.tolist(), p.confidence.tolist(), result.class_names]))"
    )
    first = entries[0]
    done = subprocess.run(
        [sys.executable, "-c", script, first["image"], str(tmp_path / "one.jpg")],
        capture_output=True, text=True, env=finished.environment, cwd=finished.folder, check=True,
    )  # fmt: skip
    boxes, labels, confidence, names = json.loads(done.stdout.splitlines()[-1])
    assert names == list("0123456789")
    assert boxes == [d["bbox_xyxy"] for d in first["detections"]]
    assert labels == [d["label"] for d in first["detections"]]
    assert confidence == [d["confidence"] for d in first["detections"]]
    assert (tmp_path / "one.jpg").stat().st_size > 500


def test_registered_model_gives_the_engines_boxes_through_mlflow(finished: Terminal) -> None:
    script = (
        "import sys, json, mlflow, nasline\n"
        "mlflow.set_tracking_uri(sys.argv[2])\n"
        "through = mlflow.pyfunc.load_model('models:/chain_digits@champion').predict([sys.argv[1]])\n"
        "direct = nasline.load('models:/chain_digits@champion').predict(sys.argv[1]).to_json()\n"
        "print(json.dumps([through[0], direct]))"
    )
    picture = next((finished.data / "target" / "images").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", script, str(picture), f"sqlite:///{finished.workspace}/mlflow.db"],
        capture_output=True, text=True, env=finished.environment, cwd=finished.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    through, direct = json.loads(done.stdout.splitlines()[-1])
    assert through == direct


def test_retraining_starts_from_the_champion_and_meets_it_in_the_gate(finished: Terminal) -> None:
    output = finished.start("same", "--from-champion", "--if-changed", code=99)
    assert "nothing to do: chain_digits v1 was made from these datasets with these parameters" in output
    finished.start("again", "--from-champion", "--distill.epochs", "1")
    finished.nasline("validate_data", "--run", "again")
    for command in CHAIN[3:]:
        output = finished.nasline(*command, "--run", "again")
        if command[0] in ("teach", "distill"):
            assert "10 of 10 classes known" in output
    verdict = json.loads((finished.published("again", "gate") / "verdict.json").read_text())
    comparison = verdict["champion_comparison"]
    assert comparison["champion"] == "chain_digits v1"
    assert comparison["images"] == 24 and comparison["excluded_images"] == 0
    assert "registered models:/chain_digits/2" in output


def test_shard_count_does_not_change_the_pseudo_labels(finished: Terminal) -> None:
    before = (finished.published("one", "pseudo_label") / "tables" / "boxes.parquet").read_bytes()
    terminal = Terminal(finished.folder / "three_shards", finished.data)
    subprocess.run(["cp", "-r", str(finished.workspace), str(terminal.workspace)], check=True)
    key = finished.published("one", "pseudo_label").name
    for name in (key, f"{key}.shards"):
        subprocess.run(["rm", "-r", str(terminal.workspace / "steps" / "pseudo_label" / name)], check=True)
    terminal.start("three", "--pseudo_label.shards", "3")
    assert "missing: 0, 1, 2" in terminal.nasline("pseudo_label", "--merge", "--run", "three", code=2)
    terminal.nasline("pseudo_label", "--shard", "all", "--run", "three")
    terminal.nasline("pseudo_label", "--merge", "--run", "three")
    published = terminal.published("three", "pseudo_label")
    assert published.name == key
    assert (published / "tables" / "boxes.parquet").read_bytes() == before
    assert terminal.manifest("three", "pseudo_label")["summary"]["boxes"] > 0
