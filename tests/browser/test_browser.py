"""What a person does: log in, fill the trigger form, watch the run turn green, look at it in MLflow beside
two more, of which the gate rejects one, and move the champion back and forth.

Against a real `airflow standalone`, a real MLflow server and the real steps; the tests follow each other, as the
person's clicks do. Pictures go to NASLINE_SCREENSHOTS.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from airflow_api import AirflowApi
from dag_helpers import wait_for
from playwright.sync_api import Locator, Page, expect
from services import Stack

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
DAG = "train_yolo_nas"
MODEL = "browser_digits"
RUN_SECONDS = 1500
MOVES = "promote_or_rollback"
LONGER, STRICT = "two-epochs", "strict-gate"
RUNS_PAGE = "/#/experiments/1/runs?workflowType=machine_learning"


@pytest.fixture(scope="module")
def api(stack: Stack) -> AirflowApi:
    """Airflow's API, to wait with; everything else goes through the browser."""
    api = AirflowApi(stack)
    api.unpause(DAG)
    return api


@pytest.fixture(scope="module")
def further_runs(api: AirflowApi) -> None:
    """Two more runs, beside each other, which reuse what the first one finished as far as they can."""
    first = api.runs(DAG)[-1]["conf"]
    changes = {
        LONGER: {"distill.epochs": 2, "quantize.qat": "never", "gate.champion_margin": 100.0},
        STRICT: {"gate.minimum_map": 0.99},
    }
    for run, changed in changes.items():
        request = {"dag_run_id": run, "logical_date": None, "conf": {**first, **changed}}
        api.call("POST", f"/dags/{DAG}/dagRuns", request)
    for run in changes:
        assert api.wait_for_end(DAG, run, RUN_SECONDS) == "success"


def run_page(stack: Stack, api: AirflowApi) -> str:
    """Address of the newest run."""
    return f"{stack.airflow_url}/dags/{DAG}/runs/{quote(api.runs(DAG)[0]['dag_run_id'])}"


def fill(dialog: Locator, field: str, value: str) -> None:
    """Write into a field of the trigger form; Airflow takes the value over when the field is left."""
    entry = dialog.locator(f'input[name="element_{field}"]')
    entry.fill(value)
    entry.blur()


def test_a_person_logs_in(page: Page, stack: Stack, api: AirflowApi, screenshots: Path) -> None:
    page.goto(stack.airflow_url)
    page.fill("input[name=username]", "admin")
    page.fill("input[name=password]", api.password)
    page.screenshot(path=screenshots / "1-login.png")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(lambda url: "login" not in url)


def test_the_filled_form_starts_a_run(
    page: Page, stack: Stack, api: AirflowApi, digits: Path, screenshots: Path
) -> None:
    page.goto(f"{stack.airflow_url}/dags/{DAG}")
    page.get_by_role("button", name="Trigger").first.click()
    dialog = page.get_by_role("dialog")
    trigger = dialog.get_by_role("button", name="Trigger", exact=True)
    expect(trigger).to_be_disabled()  # start.dataset is still empty
    fill(dialog, "start.dataset", str(digits / "target"))
    fill(dialog, "start.pretrain_dataset", str(digits / "pretrain"))
    fill(dialog, "start.unlabeled_dataset", str(digits / "unlabeled"))
    page.screenshot(path=screenshots / "2-form.png")
    dialog.get_by_role("button", name="teach", exact=True).click()
    fill(dialog, "teach.epochs", "2")
    dialog.locator('input[name="element_teach.epochs"]').scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "3-form-section.png")
    trigger.click()
    dialog.wait_for(state="hidden")
    run = api.runs(DAG)[0]
    assert run["triggered_by"] == "ui"
    assert run["conf"]["teach.epochs"] == 2


def test_the_run_turns_green(page: Page, stack: Stack, api: AirflowApi, screenshots: Path) -> None:
    assert api.wait_for_end(DAG, api.runs(DAG)[0]["dag_run_id"], RUN_SECONDS) == "success"
    page.goto(run_page(stack, api))
    expect(page.get_by_text("Success").first).to_be_visible()
    page.get_by_role("button", name="Show Graph").first.click()
    expect(page.locator(".react-flow__node").filter(has_text="register").first).to_be_visible()
    page.screenshot(path=screenshots / "4-run.png")
    page.get_by_role("button", name="Show Grid").first.click()
    page.goto(f"{run_page(stack, api)}/tasks/report")
    expect(page.get_by_text(f"Registered: {MODEL} v1").first).to_be_visible()
    page.screenshot(path=screenshots / "5-report.png")


def test_a_task_leads_to_its_mlflow_run(page: Page, stack: Stack, api: AirflowApi, screenshots: Path) -> None:
    page.goto(f"{run_page(stack, api)}/tasks/teach/details")
    link = page.get_by_text("MLflow run", exact=True)
    link.wait_for()
    page.screenshot(path=screenshots / "6-task.png")
    with page.context.expect_page() as opened:
        link.click()
    tab = opened.value
    assert tab.url.startswith(stack.mlflow_url)
    expect(tab.get_by_role("heading", name="teach").first).to_be_visible()
    expect(tab.get_by_text("map50_95").first).to_be_visible()
    tab.screenshot(path=screenshots / "7-mlflow-run.png")
    tab.close()


def test_mlflow_shows_the_pipeline_run_and_its_steps(page: Page, stack: Stack, screenshots: Path) -> None:
    page.goto(stack.mlflow_url + RUNS_PAGE)
    page.get_by_role("button", name="Close", exact=True).click()  # MLflow's assistant, which covers a quarter
    expect(page.get_by_text(re.compile(r"^\d{8}-\d{6}-manual")).first).to_be_visible()
    page.locator('[role=gridcell][col-id*="Run Name"] button').first.click()  # opens the list of its steps
    expect(page.get_by_role("link", name="distill", exact=True)).to_be_visible()
    page.screenshot(path=screenshots / "8-mlflow-runs.png")


def test_mlflow_shows_the_champion(page: Page, stack: Stack, screenshots: Path) -> None:
    page.goto(f"{stack.mlflow_url}/#/models/{MODEL}")
    expect(page.get_by_text("Version 1").first).to_be_visible()
    expect(page.get_by_text("@ champion").first).to_be_visible()
    page.screenshot(path=screenshots / "9-mlflow-champion.png")


def test_a_rejected_run_is_green_and_airflow_says_why(
    page: Page, stack: Stack, api: AirflowApi, further_runs: None, screenshots: Path
) -> None:
    states = api.task_states(DAG, STRICT)
    assert states["gate.cpu"] == states["register"] == "skipped" and states["report"] == "success"
    page.goto(f"{stack.airflow_url}/dags/{DAG}/runs/{STRICT}")
    expect(page.get_by_text("Success").first).to_be_visible()
    page.goto(f"{stack.airflow_url}/dags/{DAG}/runs/{STRICT}/tasks/report")
    why = re.compile(r"The gate rejected: INT8 mAP50-95: .* misses the limit 0\.99")
    expect(page.get_by_text(why).first).to_be_visible()
    page.screenshot(path=screenshots / "10-rejected.png")


def test_mlflows_saved_view_tells_data_gate_and_champion_of_each_run(
    page: Page, stack: Stack, further_runs: None, screenshots: Path
) -> None:
    page.goto(f"{stack.mlflow_url}{RUNS_PAGE}&viewStateShareKey=nasline")
    expect(page.get_by_role("gridcell", name="rejected", exact=True)).to_have_count(1)
    expect(page.get_by_role("gridcell", name="accepted", exact=True)).to_have_count(2)
    expect(page.get_by_role("gridcell", name=f"{MODEL} v2", exact=True)).to_have_count(1)
    expect(page.get_by_role("gridcell", name=re.compile(f"{MODEL} v2 since .* by "))).to_have_count(1)
    page.screenshot(path=screenshots / "11-mlflow-view.png")


def test_a_rejected_runs_page_begins_with_the_verdict_and_shows_the_pictures(
    page: Page, stack: Stack, further_runs: None, screenshots: Path
) -> None:
    page.goto(stack.mlflow_url + RUNS_PAGE)
    page.reload()  # the address differs from the last one after # only
    page.get_by_role("link", name=STRICT, exact=True).click()
    expect(page.get_by_text(re.compile("^The gate rejected: INT8 mAP50-95: "))).to_be_visible()
    page.get_by_text("Show more").first.click()
    missed = page.get_by_role("row").filter(has_text="INT8 mAP50-95").first
    expect(missed.get_by_role("cell").first).to_have_text(re.compile("^no"))
    for name in ("precision_recall", "confusion_matrix", "predictions"):
        picture = page.locator(f'img[src*="{name}.png"]')
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") > 100
    page.screenshot(path=screenshots / "12-mlflow-rejected.png")


def test_mlflow_compares_the_parameters_of_two_runs(
    page: Page, stack: Stack, further_runs: None, screenshots: Path
) -> None:
    page.goto(stack.mlflow_url + RUNS_PAGE)
    page.reload()
    for run in (LONGER, STRICT):
        row = page.get_by_role("row").filter(has_text=run)
        row.get_by_label("Press Space to toggle row selection").first.click(force=True)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Comparing 2 Runs from 1 Experiment")).to_be_visible()
    page.get_by_text("Show diff only").first.click()
    epochs = page.get_by_role("row").filter(has_text="distill.epochs")
    expect(epochs).to_have_text(re.compile(r"distill\.epochs\s*(2\s*1|1\s*2)\s*$"))
    expect(page.get_by_role("row").filter(has_text="teach.epochs")).to_have_count(0)  # equal in both
    epochs.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "13-mlflow-compare.png")


def test_mlflow_draws_the_curves_of_several_runs_in_one_chart(
    page: Page, stack: Stack, further_runs: None, screenshots: Path
) -> None:
    page.goto(f"{stack.mlflow_url}{RUNS_PAGE}&compareRunsMode=CHART")
    page.reload()
    page.get_by_placeholder("Search metric charts").fill("curves/distill/loss")
    names = "[...new Set(document.querySelector('.js-plotly-plot').data.map(line => line.name))]"
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot').length == 1 && {names}.length == 3")
    assert {LONGER, STRICT} < set(page.evaluate(names))
    page.screenshot(path=screenshots / "14-mlflow-curves.png")


def champion_is(page: Page, stack: Stack, version: int) -> None:
    """MLflow's page of the model shows the alias beside that version."""
    page.goto(f"{stack.mlflow_url}/#/models/{MODEL}")
    page.reload()
    row = page.get_by_role("row").filter(has_text=f"Version {version}")
    expect(row).to_contain_text("@ champion")


def test_a_rollback_by_the_form_moves_the_alias_back(
    page: Page, stack: Stack, api: AirflowApi, further_runs: None, screenshots: Path
) -> None:
    champion_is(page, stack, 2)
    page.goto(f"{stack.airflow_url}/dags/{MOVES}")
    page.get_by_role("button", name="Trigger").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator('input[name="element_model"]')).to_have_value(MODEL)
    fill(dialog, "reason", "misses the digit 7")
    page.screenshot(path=screenshots / "15-rollback-form.png")
    dialog.get_by_role("button", name="Trigger", exact=True).click()
    dialog.wait_for(state="hidden")
    run = api.runs(MOVES)[0]["dag_run_id"]
    assert api.wait_for_end(MOVES, run, RUN_SECONDS) == "success"
    assert api.task_states(MOVES, run)["approve"] == "skipped"  # a rollback waits for nobody
    champion_is(page, stack, 1)
    page.screenshot(path=screenshots / "16-mlflow-rolled-back.png")


def test_a_promotion_waits_until_somebody_presses_approve(
    page: Page, stack: Stack, api: AirflowApi, further_runs: None, screenshots: Path
) -> None:
    form = {"action": "promote", "model": MODEL, "version": "2", "reason": "the sevens were labelled wrong"}
    run = api.trigger(MOVES, form)
    assert wait_for(lambda: api.task_states(MOVES, run).get("approve") == "awaiting_input", RUN_SECONDS)
    page.goto(f"{stack.airflow_url}/dags/{MOVES}/runs/{quote(run)}/tasks/approve/required_actions")
    approve = page.get_by_role("button", name="Approve", exact=True)
    expect(page.get_by_text(re.compile(f"promote {MODEL} v2 .*the sevens", re.DOTALL)).last).to_be_visible()
    page.screenshot(path=screenshots / "17-approve.png")
    approve.click()
    assert api.wait_for_end(MOVES, run, RUN_SECONDS) == "success"
    assert api.task_states(MOVES, run)["move"] == "success"
    champion_is(page, stack, 2)
