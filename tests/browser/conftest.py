"""A running stack with the real `nasline`, and headless Chromium in front of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
for folder in (REPOSITORY, REPOSITORY / "stack", REPOSITORY / "tests" / "dags"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import services  # noqa: E402
from dag_helpers import free_port  # noqa: E402
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

SMALL_RUN = """
start: {student_variant: pico, teacher_variant: pico, image_size: 64, model_name: browser_digits, threads: 1}
pretrain: &short {epochs: 1, batch_size: 16, learning_rate: 0.004, warmup_steps: 5, ema_decay: 0.9, mosaic: 0.0}
teach: *short
pseudo_label: {shards: 2}
distill: *short
quantize:
  calibration_images: 16
  sensitivity_images: 8
  maximum_float_share: 0.1
  qat: always
  training: {epochs: 1, batch_size: 16, warmup_steps: 1}
gate: {minimum_map: 0.0, maximum_map_drop: 100.0, latency_repeats: 20, latency_threads: 1, maximum_spread: 50.0}
"""
"""Seconds per step, and a gate that lets an engine through which has hardly learned."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's generated data: target/, pretrain/, unlabeled/."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    subprocess.run([sys.executable, str(REPOSITORY / "demo" / "digits.py"), str(folder)], check=True, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Stack]:
    """Airflow and MLflow on free ports, started as `make up` does, with parameters for a very small run."""
    folder = tmp_path_factory.mktemp("stack")
    parameter_file = folder / "params.yaml"
    parameter_file.write_text(SMALL_RUN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AIRFLOW")]:
            patch.delenv(name)
        patch.setenv("NASLINE_PARAMS", str(parameter_file))
        patch.setenv("NASLINE_RETRY_SECONDS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        running = services.Stack(folder / "state", folder / "workspace", free_port(), free_port())
        services.up(running)
        try:
            yield running
        finally:
            services.down(running)


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the pages go: NASLINE_SCREENSHOTS, else a temporary folder."""
    given = os.environ.get("NASLINE_SCREENSHOTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """One tab of headless Chromium; a missing Chromium is a failure."""
    chromium = os.environ.get("NASLINE_CHROMIUM") or shutil.which("chromium")
    assert chromium, "install Chromium (Debian: apt-get install chromium) or set NASLINE_CHROMIUM"
    options = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=options)
        tab = browser.new_context(viewport={"width": 1500, "height": 1000}).new_page()
        tab.set_default_timeout(180_000)  # a loaded two-core machine needs a minute for a page
        expect.set_options(timeout=180_000)
        yield tab
        browser.close()
