"""The full chain: from datasets to a registered INT8 engine. Triggered from the form, the API or the command line."""

from __future__ import annotations

from datetime import UTC, datetime

from airflow.sdk import DAG
from airflow.sdk.definitions.param import ParamsDict
from pipeline_chain import (
    DAG_ARGUMENTS,
    gate_group,
    pretrain_group,
    pseudo_label_group,
    register_task,
    report,
    start_task,
    step_task,
)
from trigger_form import trigger_form

DOCUMENTATION = """
### Train, distill, quantize and register a YOLO-NAS detector

Press **Trigger**, give the folder of the target set (COCO: `images/`, `annotations/instances_{train,val,test}.json`;
VOC, YOLO and Objects365 are recognised too) and start. Each field shows the value that holds when you leave it alone;
sections hold the rest, a step each.

A green run ends in one of two ways, and the task `report` says which: the engine passed the gate and is registered,
or the gate rejected it (`gate` and `register` are skipped, and the champion stays).

The gate runs on the target that `gate.target` names: `t4` waits in the queue `t4` for a worker on a machine with a
T4 (`docs/deploy.md`); the gates of other targets are skipped.

A step that finished before with the same parameters and inputs is reused. Bad data or parameters fail at once; only
what a retry can cure is retried. The button **MLflow run** on a task leads to its metrics and pictures. Tasks that
train wait for a slot of the pool `accelerator`.
"""

FORM = trigger_form(without=("start.from_champion",))

with DAG(
    "train_yolo_nas",
    description="The full chain, from datasets to a registered INT8 engine",
    doc_md=DOCUMENTATION,
    schedule=None,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    **DAG_ARGUMENTS,
) as dag:
    start = start_task(FORM)
    validate_data = step_task("validate_data")
    pretrain_student, pretrain_teacher = pretrain_group()
    teach = step_task("teach")
    pseudo_label = pseudo_label_group()
    distill = step_task("distill")
    quantize = step_task("quantize")
    export = step_task("export")
    gate = gate_group()
    register = register_task()

    start >> validate_data >> [pretrain_student, pretrain_teacher]
    pretrain_teacher >> teach >> pseudo_label >> distill
    pretrain_student >> distill >> quantize >> export >> gate >> register
    [gate, register] >> report()

dag.params = ParamsDict(FORM)  # last: each task made after it would get a copy of the whole form
