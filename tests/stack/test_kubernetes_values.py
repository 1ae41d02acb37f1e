"""The values for Airflow's chart say the same as the Compose file where both must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / "kubernetes-values.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
WORKER: dict[str, str] = SERVICES["worker-cpu"]["environment"]


def test_each_queue_has_its_workers_with_limits() -> None:
    sets = {entry["queue"]: entry for entry in VALUES["workers"]["celery"]["sets"]}
    assert set(sets) == {"default", "gpu", "t4"} and not VALUES["workers"]["celery"]["enableDefault"]
    assert all({"requests", "limits"} == set(entry["resources"]) for entry in sets.values())
    assert sets["t4"]["resources"]["requests"]["cpu"] == sets["t4"]["resources"]["limits"]["cpu"]
    assert ["nvidia.com/gpu" in sets[queue]["resources"]["limits"] for queue in ("default", "gpu", "t4")] == [0, 1, 1]


def test_variables_are_those_of_the_compose_workers() -> None:
    given = {entry["name"]: entry for entry in (*VALUES["env"], *VALUES["workers"]["env"])}
    assert set(given) <= set(WORKER)
    for name in ("NASLINE_WORKSPACE", "NASLINE_COMMAND", "NASLINE_PARAMS", "MLFLOW_TRACKING_USERNAME"):
        assert given[name]["value"] == WORKER[name]


def test_settings_that_keep_long_steps_alive_are_the_same() -> None:
    for section, options in VALUES["config"].items():
        for name, value in options.items():
            told = WORKER[f"AIRFLOW__{section.upper()}__{name.upper()}"]
            assert told.partition(":-")[2].rstrip("}") == str(value) or told == str(value), (section, name)


def test_no_secret_stands_in_the_values_and_no_user_has_a_default_password() -> None:
    assert not VALUES["createUserJob"]["defaultUser"]["enabled"]
    for entry in (*VALUES["env"], *VALUES["workers"]["env"]):
        if any(word in entry["name"] for word in ("PASSWORD", "SECRET")):
            assert "secretKeyRef" in entry["valueFrom"], entry["name"]
    assert {"fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName"} <= set(VALUES)
