"""`python -m qtale_lib run --profile smoke`: every notebook from start to end, twice, and what it leaves."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import nbformat
import pytest

from qtale_lib import publishing
from qtale_lib.benchmark import seconds
from qtale_lib.benchmark_work import evaluation_times
from qtale_lib.config import load_profile
from qtale_lib.jobs import RULES, wanted_by
from qtale_lib.lab import Lab
from qtale_lib.log import read
from qtale_lib.provenance import ROOT

TOKENS = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
SECRET = "hf_secretsecretsecretsecretsecretsecret"
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def run(places: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qtale_lib", "run", "--profile", "smoke", *arguments],
        cwd=places["QTALE_RESULTS_DIR"],  # any folder: nothing depends on where it is started
        env={**os.environ, **places, **watched(places)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def watched(places: dict[str, str]) -> dict[str, str]:
    """No network, and tokens that must not be found anywhere afterwards."""
    path = os.pathsep.join((str(ROOT / "tests" / "no_network"), str(ROOT)))
    log = Path(places["QTALE_RESULTS_DIR"]) / "network"
    return {"PYTHONPATH": path, "QTALE_TEST_NETWORK": str(log), **dict.fromkeys(TOKENS, SECRET)}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    names = ("QTALE_RESULTS_DIR", "QTALE_FIGURES_DIR")
    return {name: str(tmp_path_factory.mktemp(name.lower())) for name in names}


@pytest.fixture(scope="module")
def first(places) -> subprocess.CompletedProcess:
    return run(places)


@pytest.fixture(scope="module")
def lab(first, places) -> Lab:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, value)
        return Lab("smoke")


pytestmark = pytest.mark.timeout(1800)


def test_it_ends_well_and_says_what_took_how_long(first):
    assert first.returncode == 0, first.stdout + first.stderr
    assert (
        "41 jobs, 0 there already" in first.stdout
        and f"{len(NOTEBOOKS)} executed, 0 up to date" in first.stdout
    )
    assert "left" in first.stdout


def test_it_ends_with_the_report(first, lab):
    assert re.search(r"^report +\d+", first.stdout, re.M)
    page = (lab.directory / "report" / "index.html").read_text()
    assert "has not been executed" not in page and page.count("The executed notebook ") == len(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_is_executed_from_first_cell_to_last(lab, name):
    notebook = nbformat.read(lab.directory / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 3
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds and kinds & {"display_data", "execute_result"}
    streams = [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
    assert not streams, streams


@pytest.mark.parametrize("number", range(1, 8))
def test_every_figure_is_there_in_all_formats_with_its_data(lab, number):
    csv = sorted(lab.figures.glob(f"figure_{number}_*.csv"))
    assert csv
    for data in csv:
        assert len(data.read_text().splitlines()) > 1
        assert data.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
        assert data.with_suffix(".png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in data.with_suffix(".svg").read_text()


@pytest.mark.parametrize("number", range(1, 5))
def test_every_table_is_there_in_all_formats(lab, number):
    found = {
        path.suffix for path in lab.tables.iterdir() if f"_{number}_" in path.name and "table" in path.name
    }
    assert {".md", ".csv", ".tex"} <= found


def test_every_result_of_the_grid_is_in_the_store(lab):
    profile = load_profile("smoke")
    grid = product(profile.tasks, profile.methods, profile.bits)
    cells = {(task, method, bits, rule) for task, method, bits in grid for rule in RULES[method]}
    frame = lab.evaluations()
    assert set(frame[["task", "method", "bits", "theta_rule"]].itertuples(index=False, name=None)) == cells
    assert (
        frame[frame.task == "alpaca"].ppl.gt(1).all()
        and frame[frame.task != "alpaca"].acc.between(0, 1).all()
    )
    assert frame[frame.theta_rule == "zero"].execution_ratio.eq(1).all()
    assert frame.execution_ratio.between(0, 1).all()


def test_no_process_tried_to_reach_another_machine(first, places):
    log = Path(places["QTALE_RESULTS_DIR"]) / "network"
    assert not log.exists(), log.read_text()


def test_no_token_is_in_what_is_said_or_written(first, places):
    assert SECRET not in first.stdout + first.stderr
    files = [path for place in places.values() for path in Path(place).rglob("*") if path.is_file()]
    assert len(files) > 100
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_again_it_computes_and_executes_nothing(lab, places):
    again = run(places)
    assert again.returncode == 0 and "0 jobs, 41 there already" in again.stdout
    assert f"0 executed, {len(NOTEBOOKS)} up to date" in again.stdout
    assert re.search(r"^report +\d+ s   up to date: ", again.stdout, re.M)


def test_every_call_leaves_a_log_that_says_all(first, lab):
    (path, *_) = sorted(lab.directory.glob("logs/*.log"))
    lines = read(path)
    over = [line.name for line in lines if line.event == "over"]
    assert {job.name for job in wanted_by(lab.profile, NOTEBOOKS)} | set(NOTEBOOKS) == set(over)
    assert [line.name for line in lines if line.event == "stage"][-2:] == ["notebooks", "report"]
    where = [line.text for line in lines if line.name == "fine-tune arc_easy.qtale.s0" and line.event == "at"]
    assert len(where) == 24 and re.search(r"100 %, epoch 2.0 of 2, step 24 of 24, loss .*, R 0\.", where[-1])
    assert lines[-1].text == "finished" and re.search(f"log: .*{path.name}$", first.stdout, re.M)


def test_scoring_by_a_trained_run_is_timed_dense_and_skipping(lab):
    times = evaluation_times(lab, 2, partial(seconds, device="cpu"), math.inf)
    assert times["run"] == "arc_easy.dllm.s0" and 0 < times["questions"] <= 200
    assert 0 < times["execution_ratio"] < 1 and times["left_out"] is None
    assert all(times[mode]["count"] == 2 and times[mode]["seconds"] > 0 for mode in ("dense", "skip"))


def test_a_finished_profile_is_published_without_its_bulk(lab, tmp_path):
    written = publishing.publish(lab, tmp_path / "results", tmp_path / "figures")
    assert all(path.is_file() for path in written)
    assert sum(path.stat().st_size for path in written if path.suffix == ".json") < 2**20
    results = json.loads((tmp_path / "results" / "smoke" / "results.json").read_text())
    assert len(results["evaluation"]) == len(lab.evaluations())
    for result in results["evaluation"]:
        whole = lab.result("evaluation", **result["spec"])
        assert result["value"]["nll"] == whole["value"]["nll"]
        assert result["provenance"]["adapter"] == whole["provenance"]["made_from"]["adapter"]
    provenance = json.loads((tmp_path / "results" / "smoke" / "provenance.json").read_text())
    assert provenance["profile"]["name"] == "smoke" and provenance["base"]["sha256"] == lab.base()["sha256"]
    figures = {path.name for path in Path(tmp_path / "figures" / "smoke").iterdir()}
    assert figures == {path.name for path in lab.figures.iterdir()}
