"""A person moves the champion: back in one click, forward with a second person's approval."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, TriggerRule, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict
from pipeline_chain import DAG_ARGUMENTS
from promotion_operator import APPROVE, MOVE, PLAN, PromotionOperator
from step_operator import REFERENCE_KEY
from trigger_form import trigger_form

DOCUMENTATION = """
### Move the champion

**Roll back**: press Trigger twice. The form is filled for a rollback to the champion before this one; a version goes
back further. It is done at once.

**Promote**: choose `promote`, give the version and the reason. The task `approve` then waits, up to a week, until
somebody presses **Approve** (the run's page, or **Required Actions**); rejected, or not answered, nothing moves.

`plan` checks what was asked with the command's own sentences before anything else runs: a version that the gate did not
accept, or that nasline did not make, is refused. Who asked, who approved, when and why stand in the registry
afterwards: `nasline champion` prints them.
"""
PLAN_TEXT = """
### nasline promote | rollback --dry-run

- **Reads** the form, the registry, and the version's verdict.json
- **Leaves** model, version and the present champion as the task's reference; the last line of the log says them
- **Again** clear the task; it changes nothing
"""
APPROVE_TEXT = "Waits for a person. Only promotions come here: a rollback must not wait for anybody."
MOVE_TEXT = """
### nasline promote | rollback

- **Reads** what `plan` found, so that exactly the approved version becomes champion
- **Leaves** the alias `champion` at that version, and who, when, why and the version before as tags
- **Fails** where another version became champion since `plan`: nobody approved to replace that one
- **Again** clear the task; made twice, the move is made once
"""

FORM = {
    "action": Param("rollback", enum=["rollback", "promote"], description="Back at once, or forward when approved"),
    "model": Param(
        trigger_form(only=("start.model_name",))["start.model_name"].value, type="string", minLength=1,
        description="Registered model",
    ),
    "version": Param(
        "", type=["null", "string"],
        description="Number of the version; for a rollback empty: the champion before this one",
    ),
    "reason": Param(
        "rolled back in Airflow", type="string", minLength=1, maxLength=2000,
        description="Why; kept beside the version",
    ),
}  # fmt: skip


@task.branch(task_id="decide", retries=0, doc_md="A promotion goes to `approve`, a rollback to `move` at once.")
def decide() -> list[str]:
    """Id of the task whose turn it is; none where the version is champion already."""
    return next_task(get_current_context()["ti"].xcom_pull(task_ids=PLAN, key=REFERENCE_KEY))


def next_task(planned: dict[str, Any]) -> list[str]:
    """What follows a plan."""
    if planned["version"] == planned["before"]:
        return []
    return [APPROVE if planned["kind"] == "promote" else MOVE]


with DAG(
    "promote_or_rollback",
    description="Move the champion by hand: back at once, forward when approved",
    doc_md=DOCUMENTATION,
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    is_paused_upon_creation=False,  # without a schedule nothing runs by itself, and a rollback must not wait
    **{**DAG_ARGUMENTS, "max_active_runs": 100},  # a rollback must not wait behind promotions that wait for approval
) as dag:
    start = PromotionOperator(task_id=PLAN, plan_only=True, doc_md=PLAN_TEXT, execution_timeout=timedelta(minutes=10))
    approve = ApprovalOperator(
        task_id=APPROVE,
        subject="{{ ti.xcom_pull(task_ids='plan', key='reference')['sentence'] }}",
        body="Asked by {{ dag_run.triggering_user_name or 'Airflow' }}: {{ params.reason }}",
        defaults=ApprovalOperator.REJECT,
        response_timeout=timedelta(days=7),
        doc_md=APPROVE_TEXT,
    )
    move = PromotionOperator(
        task_id=MOVE, plan_only=False, doc_md=MOVE_TEXT, execution_timeout=timedelta(minutes=10),
        max_active_tis_per_dag=1, trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
    )  # fmt: skip
    start >> decide() >> [approve, move]
    approve >> move

dag.params = ParamsDict(FORM)  # last: each task made after it would get a copy of the whole form
