"""What a person does: log in, fill the trigger form, watch the run turn green, look at it in MLflow.

Against a real `airflow standalone`, a real MLflow server and the real steps; the tests follow each other, as the
person's clicks do. Pictures go to NASLINE_SCREENSHOTS.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from airflow_api import AirflowApi
from playwright.sync_api import Locator, Page, expect
from services import Stack

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
DAG = "train_yolo_nas"
MODEL = "browser_digits"
RUN_SECONDS = 1500


@pytest.fixture(scope="module")
def api(stack: Stack) -> AirflowApi:
    """Airflow's API, to wait with; everything else goes through the browser."""
    api = AirflowApi(stack)
    api.unpause(DAG)
    return api


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
    page.goto(f"{stack.mlflow_url}/#/experiments/1/runs")
    expect(page.get_by_text(re.compile(r"^\d{8}-\d{6}-manual")).first).to_be_visible()
    page.locator('[role=gridcell][col-id*="Run Name"] button').first.click()  # opens the list of its steps
    expect(page.get_by_role("link", name="distill", exact=True)).to_be_visible()
    page.screenshot(path=screenshots / "8-mlflow-runs.png")


def test_mlflow_shows_the_champion(page: Page, stack: Stack, screenshots: Path) -> None:
    page.goto(f"{stack.mlflow_url}/#/models/{MODEL}")
    expect(page.get_by_text("Version 1").first).to_be_visible()
    expect(page.get_by_text("@ champion").first).to_be_visible()
    page.screenshot(path=screenshots / "9-mlflow-champion.png")
