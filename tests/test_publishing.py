"""What is published of a finished profile: its results without their bulk, and where they come from."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from pool_work import run_here
from small_run import profile, save_base

from qtale_lib import contrasts, jobs, provenance, publishing
from qtale_lib import lab as lab_module
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
