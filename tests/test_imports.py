"""Dependencies point one way, and importing does nothing; looked at in fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIST = "import sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
HEAVY = {"torch", "mlflow", "airflow", "dvc", "great_expectations", "boto3", "openvino", "onnxruntime", "matplotlib"}


def loaded_after(statement: str, folder: Path) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", f"{statement}; {LIST}"], capture_output=True, text=True, check=True, cwd=folder
    )
    assert result.stderr == ""
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import nasline", set()),
        ("import model", set()),
        ("import pipeline_tasks.steps, pipeline_tasks.params", set()),
        ("import pipeline_tasks.__main__", set()),
        ("import pipeline_tasks.execution, pipeline_tasks.run_step", set()),
        ("import model.yolo_nas, model.loss, model.distillation", {"torch"}),
        ("import model.training, model.evaluation, model.detector", {"torch"}),
        ("import model.quantization.quantize, model.export, model.engines", {"torch"}),
        ("import pipeline_tasks.pinned_files, pipeline_tasks.teacher_checkpoint, pipeline_tasks.validate_data", set()),
        ("import pipeline_tasks.gate, pipeline_tasks.register, pipeline_tasks.quantize", set()),
    ],
)
def test_import_loads_no_more_than_it_may(statement: str, allowed: set[str], tmp_path: Path) -> None:
    assert loaded_after(statement, tmp_path) & HEAVY <= allowed


def test_import_writes_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    statement = "import nasline, model.yolo_nas, pipeline_tasks.__main__, pipeline_tasks.start"
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=tmp_path, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_model_knows_nothing_of_the_pipeline(repository: Path) -> None:
    forbidden = ("pipeline_tasks", "mlflow", "airflow", "dvc", "great_expectations", "boto3", "pydantic")
    for path in (repository / "model").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in forbidden, f"{path}: {line}"


def test_one_home_for_each_service(repository: Path) -> None:
    homes = {
        "mlflow": "pipeline_tasks/tracking/",
        "great_expectations": "pipeline_tasks/validation/",
        "dvc": "pipeline_tasks/data/",
        "dvc_data": "pipeline_tasks/data/",
        "boto3": "pipeline_tasks/store",
        "airflow": "dags/",
    }
    for path in [*(repository / "model").rglob("*.py"), *(repository / "pipeline_tasks").rglob("*.py")]:
        name = path.relative_to(repository).as_posix()
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                home = homes.get(words[1].split(".")[0])
                assert home is None or name.startswith(home), f"{name}: {line.strip()}"
