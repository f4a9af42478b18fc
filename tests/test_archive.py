"""Archives: a finished seed's results without their weights, read back into a store that has none."""

from __future__ import annotations

import lzma
from functools import partial
from pathlib import Path

import pytest
from pool_work import run_here
from small_run import profile, save_base

from qtale_lib import archive, jobs
from qtale_lib import lab as lab_module
from qtale_lib.cli import artefacts
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.measurements import Measurements


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    """Seed 0 finished, seed 1 not begun."""
    base = save_base(tmp_path_factory.mktemp("base"))
    wide = profile(base, tasks=["arc_easy", "alpaca"], methods=["full", "qtale"], bits=[16, 3], seeds=[0, 1])
    lab = Lab(wide, tmp_path_factory.mktemp("results"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "run_tasks", run_here)
        done = lab.compute([job for job in jobs.all_jobs(wide) if job.run.seed == 0])
    assert {outcome.status for outcome in done} == {"done"}
    return lab


@pytest.fixture
def folder(lab, tmp_path) -> Path:
    written = archive.archive(lab, tmp_path / "archive")
    assert written == [archive.path(lab, 0, tmp_path / "archive")]  # the unfinished seed is left out
    return tmp_path / "archive"


def elsewhere(lab: Lab, root: Path) -> Lab:
    return Lab(lab.profile, root)


def test_what_is_restored_is_judged_as_what_was_computed(lab, folder, tmp_path):
    other = elsewhere(lab, tmp_path / "clone")
    restored = archive.restore(other, folder)
    seed = [job for job in jobs.all_jobs(lab.profile) if job.run.seed == 0]
    assert all(map(other.is_done, seed)) and restored == len(lab.stored(seed, archive.KINDS))
    assert other.evaluations().equals(lab.evaluations())
    assert other.thresholds().equals(lab.thresholds())
    mine, theirs = Measurements(lab), Measurements(other)
    assert theirs.layers.equals(mine.layers)
    assert mine.answers.keys() == theirs.answers.keys()
    for cell, answers in mine.answers.items():
        assert (theirs.answers[cell].scores == answers.scores).all()
        assert (theirs.answers[cell].shared != answers.shared).nnz == 0
    assert archive.restore(other, folder) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["12 of 24 jobs of profile smoke are done"]),
        (
            {"max_steps": 5},
            ["0 of 24 jobs of profile smoke are done", "The archive was made from another base"],
        ),
    ],
)
def test_restore_says_how_much_of_the_profile_is_done(
    lab, folder, tmp_path, monkeypatch, capsys, changes, said
):
    other = Lab(lab.profile.model_copy(update=changes), tmp_path / "clone")
    monkeypatch.setattr(artefacts.studies, "labs", lambda _: [other])
    monkeypatch.setattr(archive, "restore", partial(archive.restore, folder=folder))
    artefacts.restore("smoke")
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.endswith("results restored to " + str(other.store.root)) and not first.startswith("0 ")
    assert [line[: len(start)] for line, start in zip(rest, said, strict=True)] == said


def test_equal_results_give_equal_bytes(lab, folder, tmp_path):
    other = elsewhere(lab, tmp_path / "clone")
    archive.restore(other, folder)
    (copy,) = archive.archive(other, tmp_path / "again")
    assert copy.read_bytes() == archive.path(lab, 0, folder).read_bytes()


def test_weights_that_were_not_kept_are_asked_for_in_a_sentence(lab, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, "run_tasks", run_here)
    other = Lab(lab.profile.model_copy(update={"bits": (16, 3, 2), "seeds": (0,)}), tmp_path / "clone")
    archive.restore(other, folder)
    outcomes = other.compute(jobs.all_jobs(other.profile))
    assert len(outcomes) == 4 and all(outcome.refused for outcome in outcomes)
    assert "not here, as its results were restored from an archive; delete" in outcomes[0].error


def test_nothing_finished_and_nothing_archived_are_told(lab, tmp_path):
    empty = elsewhere(lab, tmp_path / "empty")
    with pytest.raises(UserError, match="No seed of profile smoke is finished yet"):
        archive.archive(empty, tmp_path)
    with pytest.raises(UserError, match="holds no archive of profile smoke"):
        archive.restore(empty, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no xz", lzma.compress(b"[]"), lzma.compress(b"{}\n"), lzma.compress(b'{"kind": "a/b"}\n')],
)
def test_a_damaged_archive_is_named(lab, folder, tmp_path, content):
    file = archive.path(lab, 0, folder)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"seed-0\.jsonl\.xz is damaged; check it out again, or delete it"):
        archive.restore(elsewhere(lab, tmp_path / "clone"), folder)


def test_an_archive_that_is_cut_off_gives_what_is_whole(lab, folder, tmp_path):
    file = archive.path(lab, 0, folder)
    file.write_bytes(file.read_bytes()[:-50])
    other = elsewhere(lab, tmp_path / "clone")
    with pytest.raises(UserError, match="damaged"):
        archive.restore(other, folder)
    kept = {path.name for path in (other.store.root / "finetune").glob("*.json")}
    assert kept == {path.name for path in (lab.store.root / "finetune").glob("*.json")}
