"""The command line: what it says and how it ends; notebooks executed, or left out while up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import typer
from small_run import profile

from qtale_lib import notebooks, publishing, report
from qtale_lib.cli import reproduction
from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.pool import Outcome
from qtale_lib.progress import PlainWatcher, Stopclock
from qtale_lib.provenance import ROOT
from qtale_lib.store import discard


def qtale(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qtale_lib", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--profile", "nope"], "nope is no profile's name"),
        (["run", "--profile", "smoke", "--only", "42"], "There is no notebook 42"),
        (["run", "--profile", "smoke", "--only", ","], '--only (= ",") must be numbers'),
        (["run", "--profile", "smoke", "--data-dir", "/nowhere"], "/nowhere"),
        (["train", "chess", "full"], "chess"),
        (["calibrate", "arc_easy", "full"], "A full model has no routers"),
        (["quantize", "arc_easy", "full", "--bits", "16"], "A 16-bit model is not quantized"),
        (
            ["quantize", "arc_easy", "full", "--out", "README.md/x"],
            "--out (= README.md/x/packed.json) cannot",
        ),
        (["publish", "smoke"], "Profile smoke is not finished"),
    ],
)
def test_what_a_user_can_cause_is_one_sentence_and_code_2(tmp_path, arguments, sentence):
    done = qtale(*arguments, QTALE_RESULTS_DIR=str(tmp_path), QTALE_FIGURES_DIR=str(tmp_path))
    assert done.returncode == 2 and sentence in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> list[Path]:
    """Files of an earlier run of smoke: a result, an executed notebook, a figure."""
    monkeypatch.setenv("QTALE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    places = ("results/smoke/store/finetune/a.json", "results/smoke/notebooks/01.json", "figures/smoke/a.pdf")
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("{}")
    return [tmp_path / place for place in places]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (["--data-dir", "empty"], 3),
        (["--only", ","], 2),
        (["--only", "42"], 2),
        (["--data-dir", "none"], 2),
    ],
)
def test_fresh_removes_nothing_before_everything_is_checked(earlier, tmp_path, wrong, code):
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / word) if word in ("empty", "none") else word for word in wrong]
    done = qtale("run", "--profile", "smoke", "--fresh", *given)
    assert done.returncode == code and len(done.stderr.strip().splitlines()) == 1
    assert all(path.exists() for path in earlier)


@pytest.mark.parametrize(
    ("given", "left"),
    [({}, 0), ({"only": "01"}, 3), ({"fresh": False}, 3), ({"only": "01", "fresh": False}, 3)],
)
def test_fresh_forgets_the_profile_and_with_only_what_is_asked_for(earlier, monkeypatch, given, left):
    reached = []
    monkeypatch.setattr(reproduction, "_compute", lambda *_: reached.append("runs") or [])
    monkeypatch.setattr(reproduction, "_compute_studies", lambda *_: [])
    monkeypatch.setattr(reproduction, "execute", lambda *_: reached.append("notebooks") or [])
    monkeypatch.setattr(reproduction, "_write_report", lambda *_: reached.append("report") or [])
    stamp = notebooks.Executions(Lab("smoke"), {})._stamp(notebooks.choose("01")[0])
    stamp.write_text("{}")
    reproduction.run("smoke", **{"fresh": True, **given})
    assert reached == ["runs", "notebooks", "report"]
    assert sum(path.exists() for path in earlier) == left
    assert stamp.exists() == ("fresh" in given)


@pytest.mark.parametrize(("only", "left"), [("01", True), ("11", False)])
def test_fresh_forgets_a_benchmark_with_its_notebook_alone(earlier, tmp_path, monkeypatch, only, left):
    monkeypatch.setattr(reproduction, "_compute", lambda *_: [])
    monkeypatch.setattr(reproduction, "_compute_studies", lambda *_: [])
    monkeypatch.setattr(reproduction, "execute", lambda *_: [])
    monkeypatch.setattr(reproduction, "_write_report", lambda *_: [])
    path = tmp_path / "results" / "smoke" / "bench" / "tiny.json"
    path.parent.mkdir()
    path.write_text("{}")
    reproduction.run("smoke", only=only, fresh=True)
    assert path.exists() == left


def test_a_failed_benchmark_is_an_outcome(lab, monkeypatch):
    def refused(lab):
        raise UserError("no room left")

    monkeypatch.setattr(reproduction.benchmark_report, "of_profile", refused)
    (outcome,) = reproduction._bench_if_missing(lab, Stopclock())
    assert (outcome.status, outcome.error) == ("failed", "no room left")


@pytest.mark.parametrize(
    ("error", "said", "refused"),
    [
        (UserError("no notebook yet"), "no notebook yet", 2),
        (ValueError("a cell is odd"), "ValueError: a cell is odd", 0),
    ],
)
def test_a_report_that_fails_is_an_outcome(lab, monkeypatch, error, said, refused):
    def build(lab):
        raise error

    monkeypatch.setattr(report, "build", build)
    clock = Stopclock()
    (outcome,) = reproduction._write_report(lab, clock)
    assert (outcome.name, outcome.status, outcome.error, outcome.refused) == (
        "report", "failed", said, refused
    )  # fmt: skip
    assert ("Traceback" in outcome.detail) == (not refused)
    assert [(stage, note) for stage, _, note in clock.stages] == [("report", "not written")]


def test_the_summary_says_where_the_report_lies_and_what_it_took(lab, capsys, shelf):
    copy = lab.directory / "notebooks" / "02_good.ipynb"
    copy.parent.mkdir(parents=True)
    copy.write_text((shelf / "02_good.ipynb").read_text())
    clock = Stopclock()
    reproduction.finish(lab, reproduction._write_report(lab, clock), clock)
    page = lab.directory / "report" / "index.html"
    assert page.is_file() and re.search(rf"^report +\d+ s   {page}$", capsys.readouterr().out, re.M)


def test_a_linked_folder_is_emptied_and_stays_a_link(tmp_path):
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    discard(tmp_path / "link")
    discard(tmp_path / "nowhere")
    assert list((tmp_path / "link").iterdir()) == [] and (tmp_path / "link").is_symlink()


def test_notebooks_are_chosen_by_number_and_the_scoreboard_goes_last():
    assert [path.name[:2] for path in notebooks.choose("5, 00,03")] == ["03", "05", "00"]
    assert notebooks.choose()[-1].name.startswith("00") and len(notebooks.choose()) == 15
    with pytest.raises(UserError, match="There is no notebook 42"):
        notebooks.choose("42")


@pytest.mark.parametrize("only", ["", ",", "3,", "3,,5", "3,x", "03_figures", "-1", "1.5", "3 5"])
def test_what_is_no_number_of_a_notebook_is_refused(only):
    with pytest.raises(UserError) as refused:
        notebooks.choose(only)
    assert str(refused.value) == (
        f'--only (= "{only}") must be numbers with commas between them, such as 03,05.'
    )


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """Three notebooks of our own: one that fails, one that writes a figure, the scoreboard."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    figure = "from pathlib import Path\nPath(FIGURE).write_text(str(SEEDS))"
    for name, source in (("01_bad", "1 / 0"), ("02_good", figure), ("00_last", "print(PROFILE)")):
        cells = [nbformat.v4.new_code_cell(text) for text in ('PROFILE = FIGURE = ""; SEEDS = 0', source)]
        cells[0].metadata["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)
    monkeypatch.setattr(
        notebooks, "library_files", list
    )  # an edit of the library would make all of them stale
    return folder


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    made = Lab(profile(), tmp_path / "results")
    made.figures.mkdir(parents=True)
    made.fingerprint = lambda job: str(job)
    return made


def test_a_failing_notebook_stops_no_other_and_what_is_up_to_date_is_left_out(shelf, lab, capsys):
    def execute() -> list[tuple[str, str]]:
        executions = notebooks.Executions(
            lab, {"PROFILE": "smoke", "SEEDS": 3, "FIGURE": str(lab.figures / "a.csv")}
        )
        stale = executions.stale(notebooks.choose())
        outcomes = executions.execute(stale, PlainWatcher([notebooks.as_task(book) for book in stale], 2))
        return [(outcome.name, outcome.status) for outcome in outcomes]

    assert execute() == [("01_bad", "failed"), ("02_good", "done"), ("00_last", "done")]
    assert "01_bad: FAILED, ZeroDivisionError: division by zero (see " in capsys.readouterr().out
    assert (lab.figures / "a.csv").read_text() == "3"
    copy = nbformat.read(lab.directory / "notebooks" / "01_bad.ipynb", as_version=4)
    assert "ZeroDivisionError" in str(copy.cells)
    assert execute() == [("01_bad", "failed")]

    (lab.figures / "a.csv").unlink()
    assert ("02_good", "done") in execute()
    lab.fingerprint = lambda job: f"another {job}"
    assert ("00_last", "done") in execute()
    text = (shelf / "02_good.ipynb").read_text()
    (shelf / "02_good.ipynb").write_text(text.replace("write_text", "write_text "))
    assert execute() == [("01_bad", "failed"), ("02_good", "done")]


def test_a_failure_ends_in_code_1_and_its_whole_error_is_kept(lab, capsys):
    clock = Stopclock()
    clock.lap("runs", "3 jobs")
    bad = Outcome("train x", "failed", 1.0, "no good", "Traceback ...")
    lab.directory.mkdir(parents=True)
    with pytest.raises(typer.Exit) as ended:
        reproduction.finish(lab, [bad, Outcome("train y", "done", 1.0)], clock)
    shown = capsys.readouterr()
    assert ended.value.exit_code == 1
    assert "FAILED train x: no good" in shown.out and "train y" not in shown.out and "runs" in shown.out
    assert "Traceback ..." in (lab.directory / "failures.txt").read_text()


@pytest.mark.parametrize(("others", "code"), [([], 2), [[Outcome("train y", "failed", error="boom")], 1]])
def test_what_was_refused_alone_ends_in_code_2(lab, others, code):
    failed = [Outcome("train x", "failed", error="do this instead", refused=2), *others]
    failed.append(Outcome("evaluate x", "skipped", error="what it builds on failed"))
    with pytest.raises(typer.Exit) as ended:
        reproduction.finish(lab, failed, Stopclock())
    assert ended.value.exit_code == code


def test_an_unfinished_profile_is_not_published(lab):
    with pytest.raises(UserError, match=f"{len(all_jobs(lab.profile))} jobs missing"):
        publishing.publish(lab)
