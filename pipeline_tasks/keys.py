"""Keys: what a step's result depends on, and the finished work that therefore is its input.

A step's key follows from the frozen run alone, by way of what its inputs published. So an input is found by its key,
whichever run made it, and stale work of a changed run is never taken for the run's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline_tasks import champion_data, digests, initial_checkpoint, pinned_files
from pipeline_tasks.errors import UsageError
from pipeline_tasks.params import Parameters, of_run
from pipeline_tasks.steps import Input, StepDefinition, definition, reference
from pipeline_tasks.tracking.registry import ITSELF, fetch_model
from pipeline_tasks.workspace import Workspace

KEY_LENGTH = 32

CHAMPION_TEACHERS = {"champion": "student", "champion_teacher": "teacher"}
"""Folder of the champion's bundle behind each `teach.source` that trains nothing."""


@dataclass(frozen=True)
class ResolvedInput:
    """A published folder and its content digest."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class StepKey:
    """The key of a step of a run, what it was made of, and the step's inputs."""

    key: str
    content: dict[str, Any]
    inputs: dict[str, ResolvedInput]


class RunKeys:
    """Keys of all steps of one run, each computed once."""

    def __init__(self, workspace: Workspace, frozen: Mapping[str, Any]) -> None:
        self._workspace, self._frozen = workspace, frozen
        self._parameters = of_run(frozen)
        self._known: dict[str, StepKey] = {}

    def of(self, step: str, part: str = "") -> StepKey:
        """The key of a step.

        Raises:
            UsageError: a step it reads from has not finished; the sentence names the command to run.
        """
        name = reference(step, part)
        if name not in self._known:
            step_definition = definition(step)
            inputs = {entry.name: self._input(step_definition, entry) for entry in step_definition.inputs}
            inputs |= self._initial_checkpoint(step, part) | self._pinned_files(step)
            content = key_content(step_definition, self._parameters, part, inputs, self._frozen)
            self._known[name] = StepKey(digests.of_json(content)[:KEY_LENGTH], content, inputs)
        return self._known[name]

    def from_champion(self, entry: Input) -> bool:
        """Whether the champion's bundle takes the place of this input."""
        return self._champion_part(entry) is not None

    def champion_teacher(self) -> Path | None:
        """Folder of the champion's network that teaches as it is; None where the run trains its teacher."""
        source = self._parameters.teach.source
        return None if source == "train" else self._champion_weights(CHAMPION_TEACHERS[source]).folder

    def _champion_part(self, entry: Input) -> str | None:
        """The champion's network that takes the place of a pretrained one: the same part, or what is to teach."""
        if entry.step != "pretrain":
            return None
        if entry.part == "teacher" and self._parameters.teach.source != "train":
            return CHAMPION_TEACHERS[self._parameters.teach.source]
        return entry.part if self._parameters.start.from_champion else None

    def _input(self, step: StepDefinition, entry: Input) -> ResolvedInput:
        if (champion_part := self._champion_part(entry)) is not None:
            return self._champion_weights(champion_part)
        published = self._workspace.find(entry.step, self.of(entry.step, entry.part).key)
        if published is None:
            run = self._frozen["run"]
            option = {"pretrain": f" --role {entry.part}", "pseudo_label": " --merge"}.get(entry.step, "")
            raise UsageError(
                f"{step.name} needs {reference(entry.step, entry.part)} of run {run!r}, which has not finished; "
                f"run `nasline {entry.step}{option} --run {run}` first"
            )
        return ResolvedInput(published.directory / entry.folder, published.digest(entry.folder))

    def _initial_checkpoint(self, step: str, part: str) -> dict[str, ResolvedInput]:
        """A further input of `pretrain` where the run begins from a checkpoint; other runs' keys know nothing of it."""
        pinned = initial_checkpoint.for_part(self._frozen, part) if step == "pretrain" else None
        return {initial_checkpoint.INPUT: ResolvedInput(Path(pinned["path"]), pinned["digest"])} if pinned else {}

    def _pinned_files(self, step: str) -> dict[str, ResolvedInput]:
        """Further inputs, which parameters name by their place; keys of runs without them know nothing of it."""
        pinned = pinned_files.of_step(self._frozen, step)
        return {name: ResolvedInput(Path(entry["path"]), entry["digest"]) for name, entry in pinned.items()}

    def _champion_weights(self, part: str) -> ResolvedInput:
        """Retraining starts from the champion's networks where a first run starts from pretraining."""
        champion = self._frozen["champion"]
        folder = champion_folder(self._workspace, champion) / part
        return ResolvedInput(folder, digests.of_json([champion["digest"], part]))


def champion_folder(workspace: Workspace, champion: Mapping[str, Any]) -> Path:
    """The pinned champion's bundle; `start` fetched it, but maybe on another machine."""
    folder = workspace.root / champion["directory"]
    return folder if folder.is_dir() else fetch_model(workspace, f"models:/{champion['name']}/{champion['version']}")


def key_content(
    step: StepDefinition,
    parameters: Parameters,
    part: str,
    inputs: Mapping[str, ResolvedInput],
    frozen: Mapping[str, Any],
) -> dict[str, Any]:
    """What the step's result depends on: no times, no paths."""
    own = key_fields(parameters.section(step.name))
    shared = {f"start.{name}": getattr(parameters.start, name) for name in step.shared_parameters}
    content: dict[str, Any] = {
        "step": step.name,
        "contract_version": step.contract_version,
        "parameters": {**own, **shared},
        "inputs": {name: entry.digest for name, entry in inputs.items()},
    }
    if part:
        content["parameters"]["variant"] = getattr(parameters.start, f"{part}_variant")
    if part == "teacher" and parameters.teach.source != "train":
        content["parameters"]["unused_because"] = parameters.teach.source
    if step.name == "validate_data":
        content["inputs"] = {role: entry["digest"] for role, entry in frozen["datasets"].items() if entry}
        if compared := champion_data.key_inputs(frozen):
            content["inputs"] |= compared
            given = parameters.validate_data
            limits = {"drift_class_distance": given.drift_class_distance, "drift_size_index": given.drift_size_index}
            content["parameters"] |= limits
    if step.name == "quantize":
        measured_on = {name: getattr(parameters.gate, name) for name in ("target", "runtime", "latency_threads")}
        content["parameters"] |= {f"gate.{name}": value for name, value in measured_on.items()}
    if step.name == "gate":
        content["inputs"] |= _compared_with(frozen["champion"])
    if step.name == "register":
        content["registry"] = {"name": parameters.start.model_name, "store": frozen["registry"]}
    return content


def _compared_with(champion: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The champion, and the best of its line where that is another engine: one engine may be the champion of two."""
    best = champion.get("best", ITSELF) if champion else ITSELF
    other = {} if best == ITSELF else {"best_of_line": best}
    return {"champion": champion["digest"] if champion else None, **other}


def parameters_digest(parameters: Parameters) -> str:
    """Digest of all parameters that can change an engine; equal data and an equal digest give an equal engine."""
    names = [name for name in parameters.to_json() if name != "register"]
    return digests.of_json({name: key_fields(parameters.section(name)) for name in names})


def key_fields(section: BaseModel) -> dict[str, Any]:
    """The fields of a section that can change a result."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values[name] = key_fields(value)
        elif _in_key(field.json_schema_extra):
            values[name] = value
    return values


def _in_key(extra: Any) -> bool:
    return not isinstance(extra, dict) or bool(extra.get("in_key", True))
