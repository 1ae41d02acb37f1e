"""`nasline evaluate-champion`: the champion on today's test images, beside what the gate measured of it."""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_tasks.commands.report import report
from pipeline_tasks.errors import DataError, UsageError

if TYPE_CHECKING:
    from pipeline_tasks.params import Parameters
    from pipeline_tasks.workspace import Workspace

log = logging.getLogger(__name__)

FOLDER = "evaluations"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """The champion on today's data; `before` is the INT8 engine's mAP50-95 that the gate measured."""

    name: str
    version: str
    data: str
    before: float
    today: float
    limit: float | None
    folder: Path
    reused: bool

    @property
    def drop_points(self) -> float:
        """What was lost since the gate, negative for a gain."""
        return 100 * (self.before - self.today)

    @property
    def dropped(self) -> bool:
        """Whether more was lost than the limit allows."""
        return self.limit is not None and self.drop_points > self.limit

    def sentence(self) -> str:
        """The outcome in a line."""
        points = f"{abs(self.drop_points):.2f}"
        change = f"{points} points {'less' if self.drop_points > 0 else 'more'} than at the gate"
        change = "as much as at the gate" if points == "0.00" else change
        limit = "no limit is set" if self.limit is None else f"the limit is {self.limit:g}"
        verdict = "DROPPED" if self.dropped else "holds"
        return (
            f"champion {self.name} v{self.version} {verdict}: mAP50-95 {self.today:.4f} on today's test images, "
            f"{change} ({self.before:.4f}; {limit}, register.maximum_champion_drop)"
        )


def add_to(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    text = "Measure the champion on today's test images of start.dataset and compare with the gate's number."
    command = commands.add_parser("evaluate-champion", help=text, description=text, allow_abbrev=False)
    command.add_argument("--workspace", default=os.environ.get("NASLINE_WORKSPACE", ".nasline"))
    command.add_argument("--run", help="id of the Airflow run, for MLflow")
    command.add_argument("--params", type=Path, default=None, metavar="FILE", help="parameter file (YAML)")
    command.add_argument(
        "--options-json", default="{}", help='overrides as JSON: {"start.dataset": "/data/cells", ...}'
    )
    command.set_defaults(command_function=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pipeline_tasks.params import resolve
    from pipeline_tasks.tracking.evaluation_run import log_evaluation
    from pipeline_tasks.workspace import open_workspace

    try:
        options = json.loads(arguments.options_json)
    except json.JSONDecodeError as error:
        raise UsageError(f"--options-json is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(options, dict):
        raise UsageError("--options-json must be an object of section.field to value")
    parameters, workspace = resolve(arguments.params, options), open_workspace(arguments.workspace)
    found = evaluate_champion(workspace, parameters)
    address = log_evaluation(workspace, parameters.start.experiment, found, arguments.run)
    (log.warning if found.dropped else log.info)("%s", found.sentence())
    summary = _summary(found, parameters)
    report({"step": "evaluate-champion", "reused": found.reused, "mlflow_url": address, "summary": summary})
    return 0


def evaluate_champion(workspace: Workspace, parameters: Parameters) -> Evaluation:
    """Measure the champion, or take what was measured of the same version on the same data.

    Raises:
        ParameterError: start.dataset is empty.
        UsageError: the model has no champion.
        DataError: the set is not there or cannot be understood; the version has no number of the gate's.
        UnavailableError: the registry does not answer.
    """
    from pipeline_tasks.commands.evaluate import evaluate
    from pipeline_tasks.start import no_champion, pin_dataset
    from pipeline_tasks.tracking import registry

    dataset = pin_dataset(parameters, "target", "dataset")
    assert dataset is not None
    champion = registry.fetch_champion(workspace, parameters.start.model_name)
    if champion is None:
        raise no_champion(parameters)
    name, version, bundle = champion["name"], champion["version"], workspace.root / champion["directory"]
    folder = workspace.root / FOLDER / f"{name}-v{version}-{dataset['digest'][:12]}"
    reused = (folder / METRICS).exists()
    if not reused:
        evaluate(str(bundle / "engine"), Path(dataset["path"]), "test", folder, workspace=workspace.place)
    return Evaluation(
        name=name,
        version=version,
        data=f"{Path(dataset['path']).name} {dataset['digest'][:6]}",
        before=_at_the_gate(bundle, name, version),
        today=_today(folder / METRICS, dataset["path"]),
        limit=parameters.register_.maximum_champion_drop,
        folder=folder,
        reused=reused,
    )


def _today(path: Path, dataset: str) -> float:
    value = json.loads(path.read_text(encoding="utf-8"))["map50_95"]
    if value is None:
        raise DataError(
            f"the test images of {dataset} have no boxes of the champion's classes; nothing can be measured"
        )
    return float(value)


def _at_the_gate(bundle: Path, name: str, version: str) -> float:
    path = bundle / "gate" / "accuracy.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["int8"]["map50_95"])
    except (FileNotFoundError, KeyError, TypeError):
        raise DataError(f"{name} v{version} has no accuracy of the gate to compare with: {path} lacks it") from None


def _summary(found: Evaluation, parameters: Parameters) -> dict[str, Any]:
    return {
        "model": found.name,
        "version": found.version,
        "map50_95": found.today,
        "map50_95_at_the_gate": found.before,
        "drop_points": found.drop_points,
        "dropped": int(found.dropped),
        "retrain": int(found.dropped and parameters.register_.retrain_on_drop),
    }
