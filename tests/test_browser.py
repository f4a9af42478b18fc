"""Notebook 13 and the report in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from qtale_lib.provenance import ROOT

playwright = pytest.importorskip(
    "playwright.sync_api",
    reason="Playwright is not installed; pip install --require-hashes --no-deps -r requirements-browser.lock",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("QTALE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="There is no Chromium here; install one, or name it: QTALE_CHROMIUM=/path/of/it.",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        # a sandbox needs rights that root in a container lacks; it opens nothing but pages of ours
        browser = started.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False)
        yield browser
        browser.close()


# Notebook 13 in JupyterLab.

TOKEN = "of-a-test"
SMALL = """
extends: smoke
tasks: [arc_easy]
methods: [full, qtale]
bits: [16]
max_steps: 6
limit: {train: 24, calibration: 8, test: 10}
quantization: {calibration_texts: 4}
calibration: {coarse_step: 0.25, fine_step: 0.25, questions: 8}
probes: {samples: 12}
"""
SEEN = ("svg[role=img]", ".jp-OutputArea-output img")  # the panel's picture, and the one that is saved


@pytest.fixture
def jupyterlab(tmp_path) -> Iterator[str]:
    """The address of a JupyterLab on a folder with notebook 13, whose profile is a small one."""
    (tmp_path / "small.yaml").write_text(SMALL)
    book = nbformat.read(ROOT / "notebooks" / "13_explore.ipynb", as_version=4)
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = parameters.source.replace('"tiny"', repr(str(tmp_path / "small.yaml")))
    (tmp_path / "notebooks").mkdir()
    nbformat.write(book, tmp_path / "notebooks" / "13_explore.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {
        name: str(tmp_path / name.lower())
        for name in (
            *("QTALE_RESULTS_DIR", "QTALE_FIGURES_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"),
            *("JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"),
        )
    }
    words = [
        *("--no-browser", "--allow-root", f"--port={port}", f"--IdentityProvider.token={TOKEN}"),
        *(f"--ServerApp.root_dir={tmp_path / 'notebooks'}", "--LabApp.news_url=None"),
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]
    no_news = Path(folders["JUPYTERLAB_SETTINGS_DIR"]) / "@jupyterlab" / "apputils-extension"
    no_news.mkdir(parents=True)
    (no_news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            env={**os.environ, **folders, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/api", server, tmp_path / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/13_explore.ipynb?token={TOKEN}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.timeout(900)
def test_the_panel_answers_in_jupyterlab(browser, jupyterlab):
    page = browser.new_page(viewport={"width": 1300, "height": 2600})  # the whole notebook is in view
    page.set_default_timeout(240_000)
    page.goto(jupyterlab)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # else it asks which kernel is meant
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    for seen in SEEN:
        page.locator(seen).first.wait_for()
    page.locator(".jp-CodeCell").last.locator(".jp-OutputArea-output").first.wait_for()

    picture = page.locator(SEEN[0])
    before, slider = picture.inner_html(), page.locator(".widget-slider .noUi-handle").last
    slider.focus()
    for _ in range(30):
        slider.press("ArrowRight")
    page.get_by_text("θ 0.80", exact=False).first.wait_for()
    assert picture.inner_html() != before
    page.get_by_role("button", name="Export the picture").click()
    page.get_by_text("Written:").wait_for()
    wrong = (
        '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'
    )
    assert page.locator(wrong).all_inner_texts() == []
    page.close()
