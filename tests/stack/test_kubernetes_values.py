"""The values for Airflow's chart say the same as the Compose file where both must."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / "kubernetes-values.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
WORKER: dict[str, str] = SERVICES["worker-cpu"]["environment"]
CELERY: dict[str, Any] = VALUES["workers"]["celery"]
LOOKED_UP = {
    "executor", "airflowVersion", "airflowHome", "uid", "gid", "images.airflow.repository", "images.airflow.tag",
    "fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName", "data.metadataSecretName",
    "data.brokerUrlSecretName", "postgresql.enabled", "redis.enabled", "statsd.enabled",
    "createUserJob.defaultUser.enabled", "dags.persistence.enabled", "dags.gitSync.enabled", "env",
    "apiServer.startupProbe.failureThreshold",
    *(f"{part}.logGroomerSidecar.enabled" for part in ("scheduler", "dagProcessor", "triggerer", "workers.celery")),
    *(f"workers.celery.{name}" for name in (
        "enableDefault", "terminationGracePeriodSeconds", "persistence.enabled", "persistence.size", "safeToEvict",
        "livenessProbe.command", "extraVolumes", "extraVolumeMounts", "env", "sets",
    )),
}  # fmt: skip
"""Keys that were looked up in the chart (docs/deploy.md says in which): Helm refuses an unknown one, or leaves it out
without a word. Those below `config` are Airflow's own settings, those of `resources` Kubernetes's."""


def test_each_queue_has_its_workers_with_limits() -> None:
    sets = {entry["queue"]: entry for entry in CELERY["sets"]}
    assert set(sets) == {"default", "gpu", "t4"} and not CELERY["enableDefault"]
    assert all({"requests", "limits"} == set(entry["resources"]) for entry in sets.values())
    assert sets["t4"]["resources"]["requests"]["cpu"] == sets["t4"]["resources"]["limits"]["cpu"]
    assert ["nvidia.com/gpu" in sets[queue]["resources"]["limits"] for queue in ("default", "gpu", "t4")] == [0, 1, 1]


def test_variables_are_those_of_the_compose_workers() -> None:
    given = {entry["name"]: entry for entry in (*VALUES["env"], *CELERY["env"])}
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
    for entry in (*VALUES["env"], *CELERY["env"]):
        if any(word in entry["name"] for word in ("PASSWORD", "SECRET")):
            assert "secretKeyRef" in entry["valueFrom"], entry["name"]
    assert {"fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName"} <= set(VALUES)


def test_every_key_was_looked_up_in_the_chart() -> None:
    assert set(_keys({name: value for name, value in VALUES.items() if name != "config"})) == LOOKED_UP
    known = {"name", "queue", "args", "replicas", "resources", "tolerations", "nodeSelector"}
    assert set().union(*CELERY["sets"]) == known


def _keys(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        if name != "resources":
            yield from _keys(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"]


def test_settings_are_texts_since_helm_writes_large_numbers_as_floating_point() -> None:
    assert all(isinstance(value, str) for options in VALUES["config"].values() for value in options.values())


def test_workers_take_as_many_tasks_at_a_time_as_those_of_compose_and_answer_their_probe() -> None:
    for entry in CELERY["sets"]:
        worker = re.compile(r"airflow celery worker (--queues \S+ --concurrency \d+) --celery-hostname (\S+)")
        ours = worker.search(entry["args"][-1])
        theirs = worker.search(SERVICES[f"worker-{entry['name']}"]["command"][-1])
        assert ours and theirs and ours[1] == theirs[1]
        assert ours[2] in CELERY["livenessProbe"]["command"][-1], "the probe asks a worker of that name"


def test_nothing_of_the_official_image_is_needed_that_ours_lacks() -> None:
    parts = (VALUES["scheduler"], VALUES["dagProcessor"], VALUES["triggerer"], CELERY)
    assert not any(part["logGroomerSidecar"]["enabled"] for part in parts)
    assert "> /entrypoint" in (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8"), "the chart's probes"
