"""`nasline start --dry-run`: what a run would do, step by step, before anything is written.

A key follows from what the inputs published, so the key of a step is known once all before it have finished.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_tasks import champion_data, initial_checkpoint, pinned_files
from pipeline_tasks.combinations import require_possible
from pipeline_tasks.errors import DataError, UnavailableError
from pipeline_tasks.keys import RunKeys, key_content
from pipeline_tasks.launch import TRAINING_STEPS
from pipeline_tasks.params import Parameters
from pipeline_tasks.start import ROLES, no_champion, pin_dataset, registry_name
from pipeline_tasks.steps import STEPS, Input, StepDefinition, reference
from pipeline_tasks.tracking import registry
from pipeline_tasks.workspace import Workspace

WIDTH = 118
SHOWN_KEY = 12
MAIN_PARAMETERS = ("epochs", "batch_size", "learning_rate", "variant", "target")


@dataclass(frozen=True)
class PlannedStep:
    """One step, or one part of it, of a run that was not started."""

    reference: str
    key: str | None
    """None while something it reads from is unknown."""
    finished: bool
    """Whether any run has published this key, so that it would be reused."""
    inputs: dict[str, str]
    """By name: the step it comes from and the digest of its content, as far as they are known."""
    waits_for: tuple[str, ...]
    """What has to be there before the key is known."""
    parameters: dict[str, Any]
    """All that the key depends on, by name."""
    shown: tuple[str, ...]
    """Names of those that tell the step's recipe: not at their default, or asked for in any case."""


@dataclass(frozen=True)
class Plan:
    """A run that was not started."""

    datasets: dict[str, str]
    """By role: the folder, and the digest of its content or that it does not exist."""
    missing: tuple[str, ...]
    """Parameters that name what is not there, with their values."""
    steps: tuple[PlannedStep, ...]

    def sentence(self) -> str:
        """What is not there, as one sentence; empty where nothing is missing."""
        if not self.missing:
            return ""
        return f"not there: {', '.join(self.missing)}; without them the run cannot start, and keys stay unknown"


def plan(workspace: Workspace, parameters: Parameters) -> Plan:
    """Resolve every step of a run. Nothing is written but the remembered digests of files (`docs/operate.md`).

    Raises:
        ParameterError: parameters are impossible together.
        UsageError: a champion is asked for and there is none.
    """
    require_possible(parameters)
    frozen, missing = _tentative(workspace, parameters)
    datasets = {
        role: f"{entry['path']} {entry['digest'] or '(not there)'}" if entry else "(none given)"
        for role, entry in frozen["datasets"].items()
    }
    return Plan(datasets, tuple(missing), tuple(_Planner(workspace, parameters, frozen).steps()))


def _tentative(workspace: Workspace, parameters: Parameters) -> tuple[dict[str, Any], list[str]]:
    """The content of run.json as far as it is known, and what is not there."""
    missing: list[str] = []
    frozen: dict[str, Any] = {
        "run": "dry-run",
        "parameters": parameters.to_json(),
        "datasets": {role: _dataset(parameters, role, field, missing) for role, field in ROLES.items()},
        "champion": _champion(workspace, parameters, missing),
        "registry": registry_name(workspace),
    }
    for name, pin in ((initial_checkpoint.INPUT, initial_checkpoint.pin), (pinned_files.FIELD, pinned_files.pin)):
        try:
            frozen[name] = pin(parameters)
        except DataError as error:
            missing.append(str(error))
            frozen[name] = {} if name == pinned_files.FIELD else None
    return frozen, missing


def _dataset(parameters: Parameters, role: str, field: str, missing: list[str]) -> dict[str, Any] | None:
    folder = getattr(parameters.start, field)
    if folder and Path(folder).expanduser().is_dir():
        return pin_dataset(parameters, role, field)
    if folder:
        missing.append(f"start.{field} {folder}")
        return {"path": folder, "digest": None}
    if role == "target":
        missing.append(f"start.{field} (empty)")
        return {"path": "", "digest": None}
    return None


def _champion(workspace: Workspace, parameters: Parameters, missing: list[str]) -> dict[str, Any] | None:
    needed = parameters.start.from_champion or parameters.teach.source != "train"
    try:
        champion = registry.find_champion(workspace, parameters.start.model_name)
    except UnavailableError as error:
        missing.append(str(error))
        return None
    if champion is None and needed:
        raise no_champion(parameters)
    if champion is not None and (bundle := workspace.root / champion["directory"]).is_dir():
        champion[champion_data.FIELD] = champion_data.pin(bundle)  # else only `start` fetches it and knows its data
    return champion


class _Planner:
    """Resolves the steps in their order; each knows which of those before it have finished."""

    def __init__(self, workspace: Workspace, parameters: Parameters, frozen: Mapping[str, Any]) -> None:
        self._workspace, self._parameters, self._frozen = workspace, parameters, frozen
        self._keys = RunKeys(workspace, frozen)
        self._finished: set[str] = set()

    def steps(self) -> Iterator[PlannedStep]:
        for step in STEPS[1:]:
            for part in step.parts or ("",):
                planned = self._planned(step, part)
                if planned.finished:
                    self._finished.add(planned.reference)
                yield planned

    def _planned(self, step: StepDefinition, part: str) -> PlannedStep:
        waits_for = tuple(dict.fromkeys(name for name in self._waits_for(step) if name))
        step_key = None if waits_for else self._keys.of(step.name, part)
        parameters = self._key_parameters(step, part, self._parameters)
        defaults = self._key_parameters(step, part, Parameters())
        sources = {entry.name: self._source(entry) for entry in step.inputs}
        if step.name == "validate_data":
            sources = {role: entry["path"] for role, entry in self._frozen["datasets"].items() if entry}
        if step_key:
            digests = {name: entry.digest[:SHOWN_KEY] for name, entry in step_key.inputs.items()}
            sources |= {name: f"{sources.get(name, 'pinned')} {digest}" for name, digest in digests.items()}
        return PlannedStep(
            reference(step.name, part),
            step_key.key if step_key else None,
            bool(step_key and self._workspace.find(step.name, step_key.key)),
            sources,
            waits_for,
            parameters,
            tuple(name for name, value in parameters.items() if value != defaults.get(name) or _is_main(name)),
        )

    def _key_parameters(self, step: StepDefinition, part: str, parameters: Parameters) -> dict[str, Any]:
        found: dict[str, Any] = key_content(step, parameters, part, {}, self._frozen)["parameters"]
        if step.name == "pretrain":
            found["epochs"] = parameters.pretrain.of_variant(found["variant"]).epochs
            del found["epochs_by_variant"]
        return dict(_flat(found))

    def _waits_for(self, step: StepDefinition) -> Iterator[str]:
        if step.name == "validate_data":
            yield from (
                f"the set {role}" for role, entry in self._frozen["datasets"].items() if entry and not entry["digest"]
            )
        for entry in step.inputs:
            source = reference(entry.step, entry.part)
            if self._keys.from_champion(entry):
                folder = self._workspace.root / self._frozen["champion"]["directory"]
                yield "" if folder.is_dir() else "the champion, which `start` fetches"
            elif source not in self._finished:
                yield source

    def _source(self, entry: Input) -> str:
        return "champion" if self._keys.from_champion(entry) else reference(entry.step, entry.part)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_main(name: str) -> bool:
    return name.startswith("start.") or name.rsplit(".", 1)[-1] in MAIN_PARAMETERS


def text(plan: Plan, parameters: Parameters) -> str:
    """The plan for a reader."""
    lines = ["sets"]
    lines += [f"  {role:<10} {place}" for role, place in plan.datasets.items()]
    lines += ["steps (nothing was written)"]
    for step in plan.steps:
        lines += _step_lines(step, parameters)
    return "\n".join(lines)


def _step_lines(step: PlannedStep, parameters: Parameters) -> list[str]:
    state = "reused" if step.finished else "to do"
    key = f"key {step.key[:SHOWN_KEY]}" if step.key else f"key known after: {', '.join(step.waits_for)}"
    lines = [f"  {step.reference:<17} {state:<7} {key}"]
    if step.inputs:
        lines += _wrapped("reads", [f"{name} of {source}" for name, source in step.inputs.items()])
    if step.reference.split("/")[0] in TRAINING_STEPS:
        lines += _wrapped("on", [f"{parameters.start.processes} x {parameters.start.device}"])
    words = [f"{name}={_short(step.parameters[name])}" for name in step.shown]
    rest = len(step.parameters) - len(step.shown)
    if rest:
        words.append(f"({rest} at their defaults)" if words else "defaults")
    return lines + _wrapped("with", words)


def _short(value: Any) -> str:
    return "none" if value is None else str(value)


def _wrapped(title: str, words: list[str]) -> list[str]:
    """Words that stay whole, in lines that stand under each other."""
    joined = "  ".join(word.replace(" ", "\u00a0") for word in words)
    first, others = f"    {title:<6}", " " * 10
    wrapped = textwrap.wrap(joined, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in wrapped]
