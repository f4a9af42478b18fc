"""How far a reproduction is, as `status` tells it: of one that runs, ended, or was killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from pathlib import Path

import pytest
from pool_work import hold_log
from small_run import profile
from test_cli import qtale

from qtale_lib import status
from qtale_lib.lab import Lab
from qtale_lib.log import logged
from qtale_lib.notebooks import choose
from qtale_lib.store import is_held, write_json

TIME = r"\d\d:\d\d:\d\d"


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    monkeypatch.chdir(tmp_path)
    return Lab(profile(), tmp_path / "results")


def test_before_a_run_it_says_what_there_is_to_do_and_where_it_will_be(tmp_path):
    done = qtale("status", "--profile", "smoke", QTALE_RESULTS_DIR=str(tmp_path))
    *stages, report, figures, store = done.stdout.splitlines()
    assert done.returncode == 0 and stages == [
        "fine-tunings         0 of 9",
        "results at 16 bit    0 of 9",
        "results at 4 bit     0 of 9",
        "responses            0 of 12",
        "token routes         0 of 2",
        f"notebooks            0 of {len(choose())}",
    ]
    assert report == f"report: {tmp_path}/smoke/report/index.html, not written yet"
    assert store == f"store: {tmp_path}/smoke/store" and figures.startswith("figures: ")
    assert list(tmp_path.rglob("*.log")) == []


def test_a_studys_settings_are_counted_together(tmp_path):
    done = qtale("status", "--profile", "quantizers.smoke", QTALE_RESULTS_DIR=str(tmp_path))
    assert done.returncode == 0 and re.search(r"^fine-tunings +0 of \d+$", done.stdout, re.M)


def test_of_a_living_run_it_says_since_when_how_far_and_at_which_jobs(lab):
    write_json(lab.directory / "notebooks" / "01_figure_4_gumbel.json", {})
    with logged(lab.directory) as log:
        log.write("jobs", "", "3 jobs, 2 at a time")
        for name in ("a", "b", "c"):
            log.write("start", name)
        log.write("at", "a", "35 %, epoch 3.5 of 10, loss 1.2, R 0.6, 0.61 GiB, 2 min 05 s left")
        log.write("put off", "b", "another process is at it")
        lines = status.describe([lab])
        assert f"notebooks            1 of {len(choose())}" in lines
        began = lines.index(f"log: {log.path.relative_to(Path.cwd())}") - 3
        assert re.fullmatch(rf"running for \d+ s, since {TIME}: .*process {os.getpid()} on .+", lines[began])
        assert re.fullmatch(
            rf"  {TIME}  a: 35 %, epoch 3.5 .*, 2 min 05 s left \(since {TIME}\)", lines[began + 1]
        )
        assert re.fullmatch(rf"  {TIME}  c: begun \(since {TIME}\)", lines[began + 2])

        log.write("over", "c", "[1/3] 42 s; about 3 min 00 s left")
        lines = status.describe([lab])
        assert re.fullmatch(rf"  {TIME}  c: \[1/3\] 42 s; about 3 min 00 s left", lines[began + 1])
        assert not any(" c: begun" in line for line in lines)
        log.write("jobs", "", "14 jobs, 2 at a time")  # the next stage
        lines = status.describe([lab])
        assert re.fullmatch(rf"  {TIME}  14 jobs, 2 at a time", lines[began + 1])
    lines = status.describe([lab])
    assert re.match(rf"last run: finished {TIME}, begun {TIME}: ", lines[began])


def test_a_killed_run_is_told_from_a_living_one(lab):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    other = context.Process(target=hold_log, args=(lab.directory, held), daemon=True)
    other.start()
    assert held.wait(30)
    with logged(lab.directory) as own:
        told = [line for line in status.describe([lab]) if line.startswith(("running", "last"))]
        assert len(told) == 2 and all(line.startswith("running") for line in told)
        assert f"process {other.pid} on" in told[0] + told[1]
    (path,) = set(lab.directory.glob("logs/*.log")) - {own.path}
    assert is_held(path)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert not is_held(path)
    own.path.unlink()
    lines = status.describe([lab])
    assert any(re.match(rf"last run: killed {TIME}, begun {TIME}: ", line) for line in lines)


def test_a_look_at_a_lock_takes_it_from_nobody(tmp_path):
    assert not is_held(tmp_path / "none")
    with logged(tmp_path) as log:
        assert is_held(log.path) and is_held(log.path)
    assert not is_held(log.path)
