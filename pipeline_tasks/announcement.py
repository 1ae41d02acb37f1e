"""A new version of a dataset as an event of Airflow's asset `nasline_dataset`, which starts `retrain_yolo_nas`.

Airflow itself remembers what was announced: the last event of a set holds its digest, so telling the same version
again does nothing, from whatever machine.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline_tasks.airflow_rest import URL, AirflowRest, understood
from pipeline_tasks.data.versioning import dataset_digest, dvc_remote, dvc_revision, project_root
from pipeline_tasks.errors import ConfigurationError, StepError

log = logging.getLogger(__name__)

ASSET = "nasline_dataset"
"""The name in dags/pipeline_chain.py; a test compares them."""
EVENTS = 100
"""How many of the newest events are looked through for the set's last one."""


@dataclass(frozen=True)
class Announcement:
    """What became of a version: the event that tells of it, or the one that had told of it before."""

    dataset: str
    digest: str
    event: int
    new: bool
    paused: tuple[str, ...] = ()
    """DAGs that follow the asset and are paused: Airflow drops events for them."""

    def __str__(self) -> str:
        if not self.new:
            return f"Airflow knows {self.dataset} {self.digest} already (event {self.event}); nothing was announced"
        return f"announced {self.dataset} {self.digest} to Airflow (event {self.event} of {ASSET})"


def announce(folder: Path, again: bool = False, environment: Mapping[str, str] = os.environ) -> Announcement:
    """Give Airflow's asset an event with a set's digest, revision and remote, unless the last one told of this digest.

    again: give it all the same, for instance after the DAG was unpaused.

    Raises:
        DataError: the folder is missing.
        ConfigurationError: Airflow's address, a secret or the asset is missing, or Airflow refused.
        UnavailableError: Airflow does not answer.
    """
    airflow = AirflowRest(environment)
    digest, dataset = dataset_digest(folder), _name(folder)
    extra = {"dataset": dataset, "digest": digest, "revision": dvc_revision(folder), "remote": dvc_remote(folder)}
    with understood(airflow):
        asset = _asset(airflow)
        known = None if again else _last_event(airflow, asset["id"], dataset)
        if known is not None and known["extra"].get("digest") == digest:
            return Announcement(dataset, digest, int(known["id"]), new=False)
        body = {"asset_id": asset["id"], "extra": {key: value for key, value in extra.items() if value}}
        event = airflow.call("POST", "/assets/events", body)
        return Announcement(dataset, digest, int(event["id"]), new=True, paused=_paused(airflow, asset))


def announce_added(folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """What `nasline data add` does at its end: tell Airflow where one is configured. The set is added in any case."""
    command = shlex.join(["nasline", "data", "announce", os.path.relpath(folder)])
    if not environment.get(URL):
        log.info("%s is not set, so no retraining is started; `%s` tells Airflow of the version", URL, command)
        return
    try:
        tell(announce(folder, environment=environment))
    except StepError as error:
        log.warning("the set was added, but not announced: %s; `%s` does it later", error, command)


def tell(announcement: Announcement) -> None:
    """Log what was announced, and what will not follow from it."""
    log.info("%s", announcement)
    if announcement.paused:
        log.warning(
            "%s is paused, so the event starts nothing there; unpause it, then announce with --again",
            " and ".join(announcement.paused),
        )


def _name(folder: Path) -> str:
    """Where the set lies in its project; the folder's name outside of one."""
    project, resolved = project_root(folder), folder.resolve()
    return resolved.relative_to(project).as_posix() if project else resolved.name


def _asset(airflow: AirflowRest) -> dict[str, Any]:
    found = airflow.call("GET", f"/assets?name_pattern={ASSET}&limit=100")
    assets: list[dict[str, Any]] = found["assets"]
    asset = next((one for one in assets if one["name"] == ASSET), None)
    if asset is None:
        raise ConfigurationError(
            f"Airflow at {airflow.address} has no asset {ASSET}; it has one as soon as it has read "
            "dags/retrain_yolo_nas.py"
        )
    return asset


def _last_event(airflow: AirflowRest, asset: int, dataset: str) -> dict[str, Any] | None:
    found = airflow.call("GET", f"/assets/events?asset_id={asset}&order_by=-timestamp&limit={EVENTS}")
    events: list[dict[str, Any]] = found["asset_events"]
    return next((event for event in events if (event.get("extra") or {}).get("dataset") == dataset), None)


def _paused(airflow: AirflowRest, asset: dict[str, Any]) -> tuple[str, ...]:
    names = [str(entry["dag_id"]) for entry in asset["scheduled_dags"]]
    return tuple(name for name in names if airflow.call("GET", f"/dags/{quote(name)}")["is_paused"])
