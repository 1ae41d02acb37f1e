"""The chain from the champion's weights, without pretraining: every week, and when the dataset changes."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from airflow.sdk import DAG, AssetOrTimeSchedule, CronTriggerTimetable
from airflow.sdk.definitions.param import ParamsDict
from pipeline_chain import (
    CHAMPION_DROP,
    DAG_ARGUMENTS,
    DATASET,
    gate_group,
    pseudo_label_group,
    register_task,
    report,
    start_task,
    step_task,
)
from trigger_form import trigger_form

CRON = os.environ.get("NASLINE_RETRAIN_CRON", "0 3 * * 1")

DOCUMENTATION = f"""
### Retrain from the champion

Runs at `{CRON}` (UTC, `NASLINE_RETRAIN_CRON`) and whenever the asset `nasline_dataset` gets an event: from
`nasline data add` or `nasline data announce`, where `NASLINE_AIRFLOW_URL` is set, or on the asset's page.
`evaluate_champion` gives an event to `nasline_champion_drop` when the champion has become worse and
`register.retrain_on_drop` is set. The datasets are those of `params.yaml`.

It starts from the champion's float weights, student and teacher, so there must be one: train with `train_yolo_nas`
first. The DAG is paused when it is new. Unpausing it makes Airflow run the latest missed slot at once. When neither
data nor parameters differ from what the champion was made of, `start` is skipped, and `report` says so.
"""

FORM = trigger_form(without=("start.from_champion", "start.pretrain_dataset", "pretrain."))

with DAG(
    "retrain_yolo_nas",
    description="The same chain from the champion's weights, weekly and when the dataset changes",
    doc_md=DOCUMENTATION,
    schedule=AssetOrTimeSchedule(timetable=CronTriggerTimetable(CRON, timezone="UTC"), assets=DATASET | CHAMPION_DROP),
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    is_paused_upon_creation=True,
    **{**DAG_ARGUMENTS, "max_active_runs": 1},
) as dag:
    start = start_task(FORM, "--from-champion", "--if-changed")
    validate_data = step_task("validate_data")
    teach = step_task("teach")
    pseudo_label = pseudo_label_group()
    distill = step_task("distill")
    quantize = step_task("quantize")
    export = step_task("export")
    gate = gate_group()
    register = register_task()

    start >> validate_data >> teach >> pseudo_label >> distill
    distill >> quantize >> export >> gate >> register
    [gate, register] >> report()

dag.params = ParamsDict(FORM)  # last: each task made after it would get a copy of the whole form
