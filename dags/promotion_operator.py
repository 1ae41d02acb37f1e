"""A person's move of the champion as tasks: what was asked is checked first, then done with the version named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from airflow.sdk.exceptions import AirflowFailException
from step_operator import REFERENCE_KEY, StepOperator, step_command, workspace

PLAN, APPROVE, MOVE = "plan", "approve", "move"


class PromotionOperator(StepOperator):
    """Runs `nasline promote` or `nasline rollback` with what the form says; no value is ever read by a shell.

    Args:
        plan_only: check, and leave the version found as the task's reference; else move to that version, unless
            another became champion since.
    """

    def __init__(self, *, plan_only: bool, **kwargs: Any) -> None:
        super().__init__(step="promotion", **kwargs)
        self.plan_only = plan_only

    def argv(self, context: Any) -> list[str]:
        """The command line."""
        form = context["params"]
        action, model, version = form["action"], form["model"], form["version"] or ""
        if not self.plan_only:  # what was checked and approved: this version, and in place of that champion
            planned = context["ti"].xcom_pull(task_ids=PLAN, key=REFERENCE_KEY)
            action, model, version = planned["kind"], planned["model"], planned["version"]
            if action == "promote":
                require_approval(context["ti"].xcom_pull(task_ids=APPROVE))
        options = ["--workspace", workspace(os.environ), f"--reason={form['reason']}", f"--by={who(context)}"]
        options.append("--dry-run" if self.plan_only else f"--instead-of={planned['before'] or 'none'}")
        return [*step_command(os.environ), *command(action, model, version, options)]


def command(action: str, model: str, version: str, options: Sequence[str]) -> list[str]:
    """The words of `nasline`; behind `--` a name that begins with a dash is a name too."""
    if action == "promote":
        return ["promote", *options, "--", model, version]
    return ["rollback", *([f"--to={version}"] if version else []), *options, "--", model]


def require_approval(answer: Any) -> None:
    """Refuse a promotion that nobody approved: this task may be cleared, or the one before marked, by hand."""
    if "Approve" not in ((answer or {}).get("chosen_options") or ()):
        raise AirflowFailException(f"nobody approved this promotion; trigger it again and press Approve in {APPROVE!r}")


def who(context: Any) -> str:
    """Who filled the form, and who approved."""
    asked = context["dag_run"].triggering_user_name or "Airflow"
    answer = context["ti"].xcom_pull(task_ids=APPROVE) or {}
    approver = (answer.get("responded_by_user") or {}).get("name")
    return f"{asked}, approved by {approver}" if approver else str(asked)
