"""Notebook 13 and the report in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
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

from qtale_lib import report
from qtale_lib.lab import Lab
from qtale_lib.notebooks import choose
from qtale_lib.provenance import ROOT

playwright = pytest.importorskip(
    "playwright.sync_api",
    reason="Playwright is not installed; pip install --require-hashes --no-deps -r requirements-browser.lock",
)
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="As Playwright, of the same lock.")
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


# The report.

WIDTHS, SCHEMES = (1200, 390), ("light", "dark")


@pytest.fixture(scope="module")
def report_of_tiny(tmp_path_factory) -> Path:
    """A report's folder, of the committed tables and figures of `tiny`, dealt out to the notebooks."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTALE_FIGURES_DIR", str(folder / "figures"))
        lab = Lab("tiny", folder / "results")
    shutil.copytree(ROOT / "results" / "reference" / "tiny" / "tables", lab.tables)
    shutil.copytree(ROOT / "figures" / "reference" / "tiny", lab.figures)
    shown = [*sorted(lab.tables.glob("*.md")), *sorted(lab.figures.glob("*.png"))]
    sources = choose()
    (lab.directory / "notebooks").mkdir()
    for number, source in enumerate(sources):
        book = nbformat.read(source, as_version=4)
        outputs = [as_output(path) for path in shown[number :: len(sources)]]
        outputs.append(nbformat.v4.new_output("stream", text="a long line, said in a cell " * 20))
        outputs.append(nbformat.v4.new_output("error", ename="UserError", evalue="It failed. " * 40))
        book.cells.append(nbformat.v4.new_code_cell("x = 1  # a long line of code" * 10, outputs=outputs))
        nbformat.write(book, lab.directory / "notebooks" / source.name)
    return report.build(lab).parent


def as_output(path: Path) -> nbformat.NotebookNode:
    if path.suffix == ".md":
        return nbformat.v4.new_output("display_data", {"text/markdown": path.read_text(encoding="utf-8")})
    return nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(path.read_bytes()).decode()})


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in SCHEMES], ids=str)
def page(request, browser) -> Iterator[playwright.Page]:
    """A page of a desktop or a phone, light or dark; `asked` of it: the addresses that it asked for."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(240_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()


def check_whole(page: playwright.Page) -> None:
    """Nothing lies beyond the window's sides but in boxes that scroll; every picture is there; no network."""
    inner = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= inner
    bars = page.locator(".bar").evaluate_all("bars => bars.map(bar => [bar.scrollWidth, bar.clientWidth])")
    assert bars and all(needed <= given for needed, given in bars)
    pictures = page.locator("img").evaluate_all("all => all.map(one => one.complete && one.naturalWidth > 0)")
    assert all(pictures)
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []


def test_the_report_fits_its_window_and_asks_for_nothing(page, report_of_tiny):
    page.goto((report_of_tiny / "index.html").as_uri())
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert page.locator("img").count() >= 10
    check_whole(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")


def test_every_executed_notebook_is_reached_and_leads_back(page, report_of_tiny):
    index = (report_of_tiny / "index.html").as_uri()
    page.goto(index)
    links = page.locator(".links a").evaluate_all("all => all.map(one => one.href)")
    assert len(links) == len(choose())
    for link in links[:: 1 if page.viewport_size["width"] == max(WIDTHS) else 5]:
        page.goto(link)
        assert page.locator("pre.code").count() > 3
        check_whole(page)
    page.locator(".bar a").click()
    assert page.url.startswith(f"{index}#nb-")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["index.html", "notebooks/05_tables_1_2_accuracy.html"])
def test_axe_finds_nothing_serious(page, report_of_tiny, name):
    page.goto((report_of_tiny / name).as_uri())
    found = axe.Axe().run(page).response["violations"]
    assert [(each["id"], each["help"]) for each in found if each["impact"] in ("serious", "critical")] == []


def test_axe_finds_what_is_serious(page):
    page.set_content("<html lang='en'><title>x</title><main><img src='data:,'></main></html>")
    assert "image-alt" in [each["id"] for each in axe.Axe().run(page).response["violations"]]
