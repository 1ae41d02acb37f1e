"""The model registry: what `register` puts there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.tracking.champions import ChampionMovedError, Compared, actor, move_champion
from pipeline_tasks.tracking.client import away, open_store, server_errors
from pipeline_tasks.tracking.model_signature import input_example, signature
from pipeline_tasks.tracking.registry import BEST_TAG, BUNDLE, BUNDLE_TAG, CANDIDATE, CHAMPION, ENGINE_TAG, VERDICT_TAG
from pipeline_tasks.workspace import Workspace

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

MOST_LETTERS = 5000
"""Of a version's description."""
CUT = "\n\n(cut; all of it is in gate/verdict.json)"


def register_bundle(
    workspace: Workspace,
    name: str,
    bundle: Path,
    run_id: str | None,
    tags: dict[str, str],
    promote: bool,
    description: str = "",
    compared: Compared | None = None,
) -> dict[str, Any]:
    """Register a bundle as a new version and move the aliases; an engine that is registered already, with the same best
    ancestor to beat, keeps its version.

    Args:
        bundle: Folder with engine/, gate/, student/, teacher/, lineage.json and perhaps best/.
        run_id: MLflow run of the step `register`, which then owns the model.
        tags: Tags of the version; ENGINE_TAG and BEST_TAG among them.
        description: The version's page, in Markdown.
        compared: The champion that the gate compared with, None where it compared with none.

    Returns: model, version and aliases, and `not_champion`, a sentence, where another became champion since the gate.

    Raises:
        UnavailableError: the registry does not answer; nothing was promoted.
    """
    client = open_store(workspace)
    try:
        version = _existing_version(client, name, tags) or _new_version(name, bundle, run_id, tags)
        for key in tags.keys() - {BUNDLE_TAG}:  # an existing version keeps the bundle that was uploaded with it
            client.set_model_version_tag(name, version, key, tags[key])
        if description:
            client.update_model_version(name, version, shortened(description))
        client.set_registered_model_alias(name, CANDIDATE, version)
    except server_errors() as error:
        raise away(workspace, error) from None
    told: dict[str, Any] = {"model": name, "version": version, "aliases": [CANDIDATE]}
    if promote:
        try:
            move_champion(client, workspace, name, version, "register", actor(), tags.get(VERDICT_TAG, ""), compared)
            told["aliases"].append(CHAMPION)
        except ChampionMovedError as error:
            told["not_champion"] = str(error)
            log.warning("registered, but not champion: %s", error)
    log.info("registered models:/%s/%s%s", name, version, ", now @champion" if CHAMPION in told["aliases"] else "")
    return told


def shortened(page: str) -> str:
    """A page that MLflow's database keeps; a longer one is refused by a server on Postgres."""
    return page if len(page) <= MOST_LETTERS else page[: MOST_LETTERS - len(CUT)] + CUT


def _existing_version(client: MlflowClient, name: str, tags: dict[str, str]) -> str | None:
    same = [f"tags.`{tag}` = '{tags[tag]}'" for tag in (ENGINE_TAG, BEST_TAG)]
    found = client.search_model_versions(" and ".join([f"name = '{name}'", *same]))
    return str(found[0].version) if found else None


def _new_version(name: str, bundle: Path, run_id: str | None, tags: dict[str, str]) -> str:
    """Upload first, then make the version together with its tags: a kill leaves no version that nobody can tell."""
    import mlflow

    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pyfunc.log_model(
            name="engine",
            python_model=str(Path(__file__).with_name("engine_model.py")),
            artifacts={BUNDLE: str(bundle)},
            signature=signature(bundle / "engine"),
            input_example=input_example(),
            pip_requirements=[f"nasline=={_version()}"],
        )
    return str(mlflow.register_model(info.model_uri, name, tags=tags).version)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nasline")
    except PackageNotFoundError:
        return "0.1.0"
