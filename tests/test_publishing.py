"""What is published of a finished profile: its results without their bulk, and where they come from."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from pool_work import run_here
from small_run import profile, save_base

from qtale_lib import contrasts, jobs, provenance, publishing
from qtale_lib import lab as lab_module
from qtale_lib.cli import one_run
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    """Two tasks, finished; of tables and figures there are none."""
    root = tmp_path_factory.mktemp("here")
    chosen = profile(
        save_base(root / "base"), tasks=["arc_easy", "alpaca"], methods=["full", "qtale"], bits=[16, 3]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "run_tasks", run_here)
        patch.setenv("QTALE_FIGURES_DIR", str(root / "figures"))
        lab = Lab(chosen, root / "results")
        assert {outcome.status for outcome in lab.compute(jobs.all_jobs(chosen))} == {"done"}
    for folder in (lab.tables, lab.figures):
        folder.mkdir(parents=True)
    return lab


@pytest.fixture(scope="module")
def published(lab, tmp_path_factory) -> Path:
    """The folder of the published results."""
    root = tmp_path_factory.mktemp("published")
    publishing.publish(lab, root / "results", root / "figures")
    return root / "results" / lab.profile.name


def test_what_results_have_in_common_stands_once_and_nothing_but_lists_is_lost(lab, published):
    results = json.loads((published / "results.json").read_text())
    common = results.pop("common")
    assert len(common) == 2 * (1 + 2 + 2)  # a task's fine-tunings; searches and evaluations, at 16 bits and 3
    for kind, entries in results.items():
        for entry in entries:
            whole, shared = lab.result(kind, **entry["spec"]), common[entry["common"]]
            kept = {k: v for k, v in whole["value"].items() if k in entry["value"] or not isinstance(v, list)}
            assert {**entry["value"], **shared["value"]} == kept and entry["key"] == whole["key"]
            made_from = {
                **shared["provenance"]["made_from"],
                **{k: v for k, v in entry["provenance"].items() if k == "adapter"},
                **({"theta": entry["value"]["theta"]} if kind == "evaluation" else {}),
            }
            assert made_from == whole["provenance"]["made_from"]
            own = {k: v for k, v in entry["provenance"].items() if k != "adapter"}
            assert {**shared["provenance"], **own, "made_from": made_from} == whole["provenance"]
    evaluations = [len(json.dumps(entry)) for entry in results["evaluation"]]
    assert max(evaluations) < 900


def test_the_provenance_is_that_of_all_results_and_of_the_stated_contrasts(lab, published):
    told = json.loads((published / "provenance.json").read_text())
    times = sorted(
        entry["provenance"]["finished_at"]
        for entry in lab.stored(jobs.all_jobs(lab.profile), ("finetune", "threshold", "evaluation"))
    )
    assert told["finished_between"] == [times[0], times[-1]]
    assert len(told["cores"]) == len(told["devices"]) == len(told["git_commits"]) == 1
    assert told["contrasts"] == {
        "file": "contrasts.yaml",
        "sha256": hashlib.sha256(contrasts.FILE.read_bytes()).hexdigest(),
        "last_change": provenance.last_change(contrasts.FILE),
    }


def test_evaluations_made_elsewhere_are_told(lab, tmp_path):
    spec = next(jobs.evaluation_specs(lab.profile, jobs.Run("arc_easy", "full", 0)))
    path = lab.store.path(*lab.address("evaluation", spec))
    before = path.read_text()
    result = json.loads(before)
    result["provenance"] |= {"device": "another", "cores": 99, "git_commit": "f" * 40}
    path.write_text(json.dumps(result))
    try:
        publishing.publish(lab, tmp_path, tmp_path / "figures")
    finally:
        path.write_text(before)
    told = json.loads((tmp_path / lab.profile.name / "provenance.json").read_text())
    assert "another" in told["devices"] and 99 in told["cores"] and "f" * 40 in told["git_commits"]


@pytest.fixture
def evaluate(lab, published, tmp_path, monkeypatch, capsys):
    """`evaluate` on a copy of the store, beside what is published; returns the lab and its output's lines."""
    shutil.copytree(lab.directory, tmp_path / lab.profile.name)
    shutil.copytree(published, tmp_path / "results" / "reference" / lab.profile.name)
    monkeypatch.setattr(publishing, "ROOT", tmp_path)
    monkeypatch.setattr(lab_module, "run_tasks", run_here)

    def call(method: str, bits: int = 3, changes: dict | None = None, **options) -> tuple[Lab, str]:
        chosen = lab.profile.model_copy(update={"tasks": ("arc_easy",), **(changes or {})})
        own = Lab(chosen, tmp_path)
        monkeypatch.setattr(one_run, "one_run_of", lambda *_: (own, jobs.Run("arc_easy", method, 0)))
        one_run.evaluate("arc_easy", method, bits=bits, **options)
        return own, capsys.readouterr().out

    return call


def rows(said: str, name: str) -> list[list[str]]:
    """The cells of every row of this name."""
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in said.splitlines()]
    return [cells[1:] for cells in lines if cells[0] == name]


def test_evaluate_shows_the_committed_numbers_beside_its_own(lab, evaluate):
    _, said = evaluate("qtale")
    for name in ("acc", "expected_acc", "open_acc", "nll", "execution_ratio", "loss_ratio"):
        found = rows(said, name)
        assert [cells[2] for cells in found] == ["0"] * 3  # argmax, searched, zero
        assert all(here == committed != "" for here, committed, _ in found)
    assert said.endswith("The adapter is the committed one, bit for bit, and was evaluated as that was.\n")


def test_another_number_is_shown_with_its_difference(evaluate, tmp_path):
    path = tmp_path / "results" / "reference" / "smoke" / "results.json"
    results = json.loads(path.read_text())
    for entry in results["evaluation"]:
        entry["value"]["nll"] += 0.5
    path.write_text(json.dumps(results))
    _, said = evaluate("full")
    (cells,) = rows(said, "nll")
    assert cells[2] == "-0.5" and float(cells[1]) == pytest.approx(float(cells[0]) + 0.5, abs=1e-4)


def test_fresh_computes_one_runs_cell_anew_and_gives_the_committed_numbers(lab, evaluate, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "smoke" / "store").rglob("*-*.json")}
    _, said = evaluate("full", fresh=True)
    assert rows(said, "acc")[0][2] == "0" and "is the committed one, bit for bit, and was" in said
    anew = {path.name.split("-")[0] for path, time in before.items() if path.stat().st_mtime_ns != time}
    name = "arc_easy.full.s0"
    assert anew == {name, f"{name}.b3", f"{name}.b3.none"}


def test_what_cannot_be_computed_is_said_before_anything_is_forgotten(evaluate, tmp_path):
    before = set((tmp_path / "smoke" / "store").rglob("*"))
    with pytest.raises(UserError, match="does not divide"):
        evaluate("full", changes={"group_size": 24}, fresh=True)
    assert before == set((tmp_path / "smoke" / "store").rglob("*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_steps": 5}, "which was made from another base or other rows, with other settings"),
        ({"group_size": 16}, "bit for bit, but was evaluated at another θ"),
    ],
)
def test_it_is_said_that_other_settings_give_other_numbers(evaluate, changes, reason):
    _, said = evaluate("full", changes=changes)
    assert reason in said


def test_another_adapter_of_the_same_settings_is_laid_to_the_machine(evaluate, tmp_path):
    path = tmp_path / "results" / "reference" / "smoke" / "results.json"
    results = json.loads(path.read_text())
    for entry in results["finetune"]:
        entry["value"]["adapter_sha256"] = "another"
    path.write_text(json.dumps(results))
    _, said = evaluate("full")
    assert "another CPU or build of torch may round otherwise" in said


def test_without_committed_results_the_same_numbers_are_shown(evaluate, tmp_path):
    shutil.rmtree(tmp_path / "results")
    _, said = evaluate("full", bits=16)
    assert rows(said, "expected_acc") and rows(said, "open_acc") and "committed" not in said
    assert "results/reference holds nothing at 16 bit for profile smoke" in said


def test_the_last_change_of_a_file_is_its_last_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    file = tmp_path / "contrasts.yaml"
    file.write_text("a: 1\n")
    assert provenance.last_change(file) is None  # no checkout

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init")
    assert provenance.last_change(file) is None  # no commit
    git("add", file.name)
    git("commit", "-m", "state", "--date", "2020-01-01T00:00:00Z")
    commit = git("rev-parse", "HEAD").strip()
    git("commit", "--allow-empty", "-m", "else")
    assert provenance.last_change(file)["commit"] == commit
    assert provenance.last_change(file)["date"] == git("log", "-1", "--format=%cI", commit).strip()
    file.write_text("a: 2\n")
    assert provenance.last_change(file)["commit"] == f"{commit}+"
