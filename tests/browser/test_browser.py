"""What a person does: log in, fill the trigger form, watch the run turn green, look at it in MLflow.

Against a real `airflow standalone`, a real MLflow server and the real steps. Pictures go to NASLINE_SCREENSHOTS.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from airflow_api import AirflowApi
from playwright.sync_api import Page, expect
from services import Stack

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]
DAG = "train_yolo_nas"
RUN_SECONDS = 1200


@pytest.fixture(scope="module")
def api(stack: Stack) -> AirflowApi:
    """Airflow's API, to wait with; everything else goes through the browser."""
    api = AirflowApi(stack)
    api.unpause(DAG)
    return api


def test_a_person_logs_in(page: Page, stack: Stack, api: AirflowApi, screenshots: Path) -> None:
    page.goto(stack.airflow_url)
    page.fill("input[name=username]", "admin")
    page.fill("input[name=password]", api.password)
    page.screenshot(path=screenshots / "1-login.png")
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(lambda url: "login" not in url)


def test_the_form_is_filled_and_the_chain_runs_green(
    page: Page, stack: Stack, api: AirflowApi, digits: Path, screenshots: Path
) -> None:
    page.goto(f"{stack.airflow_url}/dags/{DAG}")
    page.get_by_role("button", name="Trigger").first.click()
    dialog = page.get_by_role("dialog")
    dialog.wait_for()
    fill_form(dialog, digits)
    page.screenshot(path=screenshots / "2-form.png")
    dialog.get_by_text("distill", exact=True).click()
    epochs = dialog.locator('input[name="element_distill.epochs"]')
    epochs.fill("2")
    epochs.blur()
    page.screenshot(path=screenshots / "3-form-section.png")
    dialog.get_by_role("button", name="Trigger", exact=True).click()
    dialog.wait_for(state="hidden")
    run = api.runs(DAG)[0]
    assert run["triggered_by"] == "ui"
    assert run["conf"]["distill.epochs"] == 2
    assert api.wait_for_end(DAG, run["dag_run_id"], RUN_SECONDS) == "success"
    page.goto(f"{stack.airflow_url}/dags/{DAG}/runs/{quote(run['dag_run_id'])}")
    expect(page.get_by_text("Success").first).to_be_visible()
    page.screenshot(path=screenshots / "4-run.png")


def fill_form(dialog, digits: Path) -> None:
    for field, folder in (("dataset", "target"), ("pretrain_dataset", "pretrain"), ("unlabeled_dataset", "unlabeled")):
        entry = dialog.locator(f'input[name="element_start.{field}"]')
        entry.fill(str(digits / folder))
        entry.blur()
