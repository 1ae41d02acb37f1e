"""docker-compose.yml, the Dockerfile and `.env.example`: safe as they stand, and in step with the code they serve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
JOBS = {"airflow-init", "storage-init"}
WORKERS = {"worker-cpu", "worker-gpu", "worker-t4"}
AIRFLOW = {name for name in SERVICES if name.startswith("airflow")} | WORKERS
EXAMPLE = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
DOCKERFILE = (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
REQUIRED = r"\$\{[A-Z0-9_]+:\?[^}]+\}"
REFERENCE = re.compile(r"(?<!\$)\$\{([A-Z0-9_]+)(?::([-?])([^}]*))?\}")
OVERRIDES = ("compose.network.yml", "compose.worker.yml")

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def variables(name: str) -> dict[str, Any]:
    """A service's environment."""
    return dict(SERVICES[name].get("environment", {}))


def queues(name: str) -> set[str]:
    """The queues a worker takes."""
    found = re.search(r"--queues (\S+)", SERVICES[name]["command"][-1])
    assert found, name
    return set(found[1].split(","))


@each_service
def test_a_secret_is_never_written_down_and_never_has_a_default(name: str) -> None:
    secret = re.compile(r"PASSWORD$|SECRET|_KEY$|TOKEN$|WEBHOOK$")
    for key, value in variables(name).items():
        if secret.search(key) and value is not None:  # without a value: passed on from .env
            assert re.fullmatch(REQUIRED, value), f"{name}: {key}"
        if "://" in str(value) and "@" in str(value):
            assert re.search(rf":{REQUIRED}@", value), f"{name}: {key}"
    for word in [*SERVICES[name]["command"], *SERVICES[name].get("healthcheck", {}).get("test", [])]:
        assert "${" not in re.sub(r"\$\{MLFLOW_PUBLIC_HOST:-[^}]*\}", "", word), f"{name}: shown in process lists"


@each_service
def test_an_image_is_pinned_and_no_user_is_root(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z0-9/-]+:(\d+\.\d+[\w.-]*|\$\{NASLINE_VERSION:-\d+\.\d+\.\d+\})", service["image"])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged") and service.get("network_mode") is None
    assert "/var/run/docker.sock" not in str(service)


@each_service
def test_a_service_is_limited_watched_and_ends_in_its_own_time(name: str) -> None:
    service = SERVICES[name]
    assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    if name in JOBS:
        assert service["healthcheck"] == {"disable": True} and service["restart"].startswith("on-failure:")
    else:
        assert service["restart"] == "unless-stopped"
        assert service["stop_grace_period"]
        assert {"test", "interval", "timeout", "retries"} <= set(service["healthcheck"])


@each_service
def test_what_a_service_waits_for_can_come_true(name: str) -> None:
    for other, condition in SERVICES[name].get("depends_on", {}).items():
        wanted = "service_completed_successfully" if other in JOBS else "service_healthy"
        assert condition == {"condition": wanted}, other


def test_a_service_of_every_profile_waits_for_each_job() -> None:
    """`docker compose up --wait` takes a job that has ended for a failure unless a running service waits for it."""
    lasting = [service for service in SERVICES.values() if "profiles" not in service]
    waited_for = {
        other for service in lasting for other, wanted in service.get("depends_on", {}).items()
        if wanted["condition"] == "service_completed_successfully"
    }  # fmt: skip
    assert waited_for == JOBS


def test_only_the_two_user_interfaces_listen_and_only_here_unless_told() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "airflow-apiserver": ["${NASLINE_ADDRESS:-127.0.0.1}:8080:8080"],
        "mlflow": ["${NASLINE_ADDRESS:-127.0.0.1}:5000:5000"],
    }


def test_both_user_interfaces_have_users() -> None:
    assert all(variables(name)["AIRFLOW__CORE__AUTH_MANAGER"].endswith(".FabAuthManager") for name in AIRFLOW)
    assert "--app-name=basic-auth" in SERVICES["mlflow"]["command"]
    permissions = (REPOSITORY / "mlflow" / "basic_auth.ini").read_text(encoding="utf-8")
    assert "default_permission = READ" in permissions and "password =" not in permissions
    assert any(word.startswith("--allowed-hosts=mlflow:5000,") for word in SERVICES["mlflow"]["command"])
    assert variables("mlflow")["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == variables("worker-cpu")["NASLINE_MLFLOW_UI"]


@pytest.mark.slow  # importing the provider takes seconds
def test_behind_a_proxy_each_address_has_logins_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.providers.fab.www.extensions.init_wsgi_middlewares import init_wsgi_middleware
    from flask import Flask
    from flask_limiter.util import get_remote_address  # what the limit of logins counts by

    name = "AIRFLOW__FAB__ENABLE_PROXY_FIX"
    assert variables("airflow-apiserver")[name] == "${AIRFLOW_BEHIND_PROXY:-False}"
    forwarded = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}  # the first may be made up, the proxy wrote the last
    seen = []
    for value in ("False", "True"):
        monkeypatch.setenv(name, value)
        app = Flask("login")
        app.add_url_rule("/", view_func=get_remote_address)
        init_wsgi_middleware(app)
        seen.append(app.test_client().get("/", headers=forwarded).text)
    assert seen == ["127.0.0.1", "203.0.113.7"]


def test_steps_log_in_to_airflow_as_a_user_of_their_own() -> None:
    made, used = variables("airflow-init"), variables("worker-cpu")
    assert used["NASLINE_AIRFLOW_USER"] == made["AIRFLOW_PIPELINE_USER"] != made["AIRFLOW_ADMIN_USER"]
    assert used["NASLINE_AIRFLOW_PASSWORD"] == made["AIRFLOW_PIPELINE_PASSWORD"]
    assert not {"AIRFLOW_ADMIN_PASSWORD", "AIRFLOW_PIPELINE_PASSWORD"} & set(used), "under these names no step gets it"


def test_every_variable_is_in_the_example_with_the_same_default() -> None:
    overrides = [(REPOSITORY / "deploy" / name).read_text(encoding="utf-8") for name in OVERRIDES]
    used = [match.groups() for text in (TEXT, *overrides) for match in REFERENCE.finditer(text)]
    shown = dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", EXAMPLE, re.MULTILINE))
    passed_on = {key for name in SERVICES for key, value in variables(name).items() if value is None}
    assert {name for name, _, _ in used} | passed_on | {"COMPOSE_PROFILES"} == set(shown)
    assert all(shown[name] == value for name, kind, value in used if kind == "-")
    secrets = set(re.findall(r"^([A-Z][A-Z0-9_]+)=$", EXAMPLE, re.MULTILINE))
    assert {name for name, _, _ in REFERENCE.findall(TEXT) if f"${{{name}:?" in TEXT} == secrets
    assert shown["COMPOSE_PROFILES"] == "cpu"


TOLD_BY_OTHERS = {
    "NASLINE_DIE_WITH_PARENT", "NASLINE_LEASE_WAIT_SECONDS",  # the operator
    "NASLINE_LAUNCHED_BY", "NASLINE_REPORTS",  # --processes
    "NASLINE_AIRFLOW_TOKEN",  # in place of a password
    "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",  # steps, for themselves
    "AWS_ENDPOINT_URL_S3",  # AWS_ENDPOINT_URL holds for all
}  # fmt: skip


def read_by(folder: str) -> set[str]:
    """The variables that the sources of a folder name."""
    sources = [path.read_text(encoding="utf-8") for path in (REPOSITORY / folder).rglob("*.py")]
    name = r'"((?:NASLINE|MLFLOW|AWS|XDG)_[A-Z0-9_]+)"'
    return {found for text in sources for found in re.findall(name, text)} - TOLD_BY_OTHERS


def test_workers_are_told_everything_that_steps_and_dags_read() -> None:
    for worker in WORKERS:
        assert read_by("pipeline_tasks") | read_by("dags") <= set(variables(worker)), worker


def test_airflow_is_told_everything_that_the_dag_files_read() -> None:
    steps_only = {"NASLINE_KILL_GRACE_SECONDS"}
    for name in AIRFLOW:
        assert read_by("dags") - steps_only <= set(variables(name)), name
        assert "NASLINE_ALERT_WEBHOOK" in variables(name), name


def test_keys_of_the_store_and_of_mlflow_are_the_workers_alone() -> None:
    for name in AIRFLOW - WORKERS:
        assert not [key for key in variables(name) if key.startswith(("AWS_", "MLFLOW_"))], name


def test_workers_differ_in_what_they_take() -> None:
    assert [queues(name) for name in sorted(WORKERS)] == [{"default"}, {"gpu"}, {"t4"}]
    for name in WORKERS:
        service = SERVICES[name]
        assert service["profiles"] == [name.removeprefix("worker-")]
        assert ("devices" in service["deploy"]["resources"].get("reservations", {})) == (name != "worker-cpu")
    assert "--concurrency 1" in SERVICES["worker-t4"]["command"][-1]


def test_no_running_step_is_given_to_a_second_worker() -> None:
    from pipeline_tasks.steps import STEPS

    longest = max(step.timeout_hours for step in STEPS) * 3600
    for name in AIRFLOW:
        assert float(variables(name)["AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT"]) > longest


# the images ---------------------------------------------------------------------------------------------


def test_every_environment_is_made_of_the_pinned_versions() -> None:
    installs = re.split(r"pip install ", DOCKERFILE.replace("\\\n", " "))[1:]
    assert len(installs) == 5
    for command in installs:
        pinned = "--constraint constraints.txt" in command
        assert pinned or command.startswith("--no-deps /wheels") or "torch==2.13.0 " in command, command
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0\n" in constraints


def test_steps_find_git_and_put_large_files_on_a_disk() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n((?:(?!FROM).*\n)*)", DOCKERFILE, re.MULTILINE))
    for name in ("worker", "pipeline"):
        assert " git " in stages[name] and stages[name].rindex("USER 10001:10001") > stages[name].index(" git "), name
    assert "PATH=$PATH:/opt/nasline/bin" in stages["worker"], "`docker compose exec worker-cpu nasline`"
    assert "rm /opt/airflow/bin/nasline" in stages["airflow-environment"], "that one has no torch"
    for name in WORKERS:
        mounted = {volume.split(":")[1] for volume in SERVICES[name]["volumes"]}
        assert variables(name)["TMPDIR"] in mounted and variables(name)["TMPDIR"] != "/srv/airflow", name


def test_targets_exist_and_do_not_run_as_root() -> None:
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n((?:(?!FROM).*\n)*)", DOCKERFILE, re.MULTILINE))
    assert targets == {"airflow", "worker", "mlflow"} and {*targets, "pipeline"} <= set(stages)
    assert all("USER 10001:10001" in stages[name] for name in ("airflow", "pipeline", "mlflow"))
    assert re.search(r"^FROM airflow AS worker$", DOCKERFILE, re.MULTILINE), "the worker has Airflow's user"


def test_the_build_context_holds_what_is_copied_and_no_secret() -> None:
    let_in = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY ((?!--from).*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert any(source == name or source.startswith(name + "/") for name in let_in), source
    assert not any(name.startswith(".env") for name in let_in)
    assert (REPOSITORY / ".dockerignore").read_text().splitlines()[1] == "*"
    assert ".env" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_extras_of_the_images_need_no_torch() -> None:
    script = REPOSITORY / "deploy" / "requirements.py"
    done = subprocess.run([sys.executable, script, "airflow", "stack"], capture_output=True, text=True, check=True)
    assert "apache-airflow==3.3.2" in done.stdout and "apache-airflow-providers-celery" in done.stdout
    assert "celery<5.7" in done.stdout and "torch" not in done.stdout and "nasline[" not in done.stdout
    tracking = subprocess.run([sys.executable, script, "tracking"], capture_output=True, text=True, check=True)
    assert "mlflow[auth]==3.17.2" in tracking.stdout
