"""The parts the DAGs are put together from: a task per step, made from `pipeline_tasks.steps`.

The DAG files draw the arrows; a test compares them with what each step needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, get_args

from airflow.sdk import Asset, Param, TaskGroup, TriggerRule, get_current_context, task
from alerts import deadline_argument, task_failed
from step_operator import ACCELERATOR_POOL, REFERENCE_KEY, StartOperator, StepOperator, retry_arguments
from trigger_form import parameter_file

from pipeline_tasks.gate_parameters import Target
from pipeline_tasks.steps import StepDefinition, definition, reference

DAG_ARGUMENTS: dict[str, Any] = {
    "catchup": False,
    "max_active_runs": 4,
    "default_args": {"owner": "nasline", "on_failure_callback": task_failed, **retry_arguments(os.environ)},
    "tags": ["nasline", "yolo-nas"],
    **deadline_argument(os.environ),
}

GATE_TARGETS: tuple[Target, ...] = get_args(Target)
ACCELERATOR: dict[str, Any] = {
    "pool": ACCELERATOR_POOL,
    "queue": os.environ.get("NASLINE_ACCELERATOR_QUEUE") or "default",
}
"""Where tasks that train and label run: a slot of the pool, and a worker that takes the queue of the GPUs, if any."""

WHERE_GATES_RUN: dict[Target, dict[str, Any]] = {"gpu": ACCELERATOR, "t4": {"queue": "t4"}}
"""A GPU that trains is no quiet one to measure on; a T4's gate waits for a worker that takes the queue `t4`."""


DATASET = Asset(name="nasline_dataset", uri="nasline://dataset", group="nasline")
CHAMPION_DROP = Asset(name="nasline_champion_drop", uri="nasline://champion-drop", group="nasline")
"""Gets an event when the champion has become worse on today's data and a retraining is wanted."""


def parameter_arguments() -> tuple[str, ...]:
    """The parameter file as arguments, where there is one."""
    path = parameter_file()
    return ("--params", str(path)) if path else ()


def start_task(form: Mapping[str, Param], *arguments: str) -> StartOperator:
    """The task that freezes the run; the parameter file comes first, what the form changed wins over it."""
    arguments = (*parameter_arguments(), "--estimate", *arguments)
    return StartOperator(form=form, arguments=arguments, **_common(definition("start")), task_id="start")


def step_task(step: str, part: str = "") -> StepOperator:
    """The task of a step, or of one part of a step (a role of `pretrain`)."""
    arguments = ("--role", part) if part else ()
    return StepOperator(arguments=arguments, **_common(definition(step), part), task_id=part or step)


def pretrain_group() -> tuple[StepOperator, StepOperator]:
    """Student and teacher, side by side where the pool has room."""
    with TaskGroup("pretrain", tooltip=definition("pretrain").summary):
        return step_task("pretrain", "student"), step_task("pretrain", "teacher")


def pseudo_label_group() -> TaskGroup:
    """One task per shard, as many as the run's parameters say, then the merge."""
    step = definition("pseudo_label")
    with TaskGroup("pseudo_label", tooltip=step.summary) as group:
        label = StepOperator.partial(
            task_id="label", map_index_template="shard {{ task.arguments[1] }}", **_common(step)
        ).expand(arguments=shard_arguments())
        label >> StepOperator(task_id="merge", arguments=("--merge",), **_common(step, accelerator=False))
    return group


@task(task_id="shards", doc_md="The shards of this run, from what `start` froze: one mapped task each.")
def shard_arguments() -> list[list[str]]:
    """Arguments of each shard's task. In the chain this stands before the mapped task, which needs their number."""
    frozen = get_current_context()["ti"].xcom_pull(task_ids="start", key=REFERENCE_KEY)
    count = int(frozen["shards"])
    return [["--shard", f"{index}/{count}"] for index in range(count)]


def gate_group() -> TaskGroup:
    """One task per target, since a task's queue is fixed when Airflow reads the file; the run's target has its turn."""
    step = definition("gate")
    with TaskGroup("gate", tooltip=step.summary) as group:
        chosen = chosen_gate()
        for target in GATE_TARGETS:
            chosen >> StepOperator(task_id=target, **{**_common(step), **WHERE_GATES_RUN.get(target, {})})
    return group


@task.branch(
    task_id="target",
    doc_md="Lets the gate run on the target that `start` froze; the tasks of the other targets are skipped.",
)
def chosen_gate() -> str:
    """Id of the task whose turn it is."""
    frozen = get_current_context()["ti"].xcom_pull(task_ids="start", key=REFERENCE_KEY)
    return f"gate.{frozen['target']}"


def register_task() -> StepOperator:
    """Runs when the gate of one target accepted; a rejected gate is skipped like those of the other targets."""
    rule = TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS
    return StepOperator(**_common(definition("register")), task_id="register", trigger_rule=rule)


@task(
    task_id="report",
    trigger_rule=TriggerRule.NONE_FAILED,
    retries=0,
    doc_md="Says how the run ended: the verdict, and what was registered or why nothing was.",
)
def report() -> str:
    """Gather what `gate` and `register` said. A skipped task is no failure: a rejected engine is a result."""
    task_instance = get_current_context()["ti"]
    tasks = ("start", *(f"gate.{target}" for target in GATE_TARGETS), "register")
    start, *gates, register = (task_instance.xcom_pull(task_ids=name, key=REFERENCE_KEY) for name in tasks)
    gate = next((found for found in gates if found), None)
    return outcome(start or {}, gate, register)  # Airflow logs what a task returns


def outcome(start: Mapping[str, Any], gate: Mapping[str, Any] | None, register: Mapping[str, Any] | None) -> str:
    """How a run without failures ended, from the references its tasks left."""
    if gate is None:
        return f"The run ended before the gate: {start.get('sentence', 'start was skipped')}"
    verdict = gate.get("summary", {}).get("verdict") or gate["sentence"]
    if register is None:
        return f"The gate {verdict}. Nothing was registered; the champion is unchanged."
    summary = register.get("summary", {})
    registered = f"{summary['model']} v{summary['version']}" if "version" in summary else register["sentence"]
    not_champion = f" Not champion: {summary['not_champion']}." if "not_champion" in summary else ""
    return f"The gate {verdict}. Registered: {registered}.{not_champion}"


def _common(step: StepDefinition, part: str = "", accelerator: bool | None = None) -> dict[str, Any]:
    uses_accelerator = step.uses_accelerator if accelerator is None else accelerator
    return {
        "step": step.name,
        "doc_md": task_documentation(step, part),
        "execution_timeout": timedelta(hours=step.timeout_hours),
        **(ACCELERATOR if uses_accelerator else {}),
    }


def task_documentation(step: StepDefinition, part: str = "") -> str:
    """What the task does, reads and leaves, and how to run it again."""
    inputs = [f"`{reference(entry.step, entry.part)}`" for entry in step.inputs] or [f"`{n}`" for n in step.needs]
    option = f" --role {part}" if part else ""
    return "\n".join(
        [
            f"### nasline {step.name}{option}",
            step.summary,
            "",
            f"- **Reads** {', '.join(dict.fromkeys(inputs)) or 'the parameters and the dataset folders'}",
            f"- **Leaves** {step.outputs}",
            "- **Again** clear the task. Finished work with the same parameters and inputs is reused, not repeated;"
            " an interrupted training goes on from its checkpoint.",
            "- **By hand** the first line of the task's log is the command.",
        ]
    )
