"""A run that is killed, or loses its folder or its disk: nothing is half written, and the end is the same.

$QTALE_KILLS: the moments of the slow test (100).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_run import everything, settings
from pool_work import attempt_here
from small_run import save_base

from qtale_lib import cli, preflight
from qtale_lib import lab as lab_module
from qtale_lib.errors import MachineError
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT

QUICK, MANY = 3, int(os.environ.get("QTALE_KILLS", 100))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("moments", "seed"), [(QUICK, 0), pytest.param(MANY, 1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(moments, seed, base, tmp_path):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kill_run.py", tmp_path / "runs", base, str(moments), str(seed)],
        env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
             "QTALE_FIGURES_DIR": str(tmp_path / "figures")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["moments"] >= moments and said["operations"] > 100


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MiB, which a run overfills."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("only who may mount has a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_a_full_disk_ends_a_run_in_a_sentence_and_what_was_finished_stays(
    base, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr(lab_module, "run_tasks", attempt_here)
    chosen = settings(base)
    other = Lab(chosen, tmp_path / "other")
    assert {outcome.status for outcome in other.compute(all_jobs(chosen))} == {"done"}

    lab = Lab(chosen, small_disk)
    with monkeypatch.context() as patch:  # as if another had taken what was free at the start
        patch.setattr(preflight, "check_disk", lambda *_: {})
        (small_disk / "ballast").write_bytes(b"x" * (2**20 - 80_000))
        failed = [outcome for outcome in lab.compute(all_jobs(chosen)) if outcome.status == "failed"]
    assert failed and failed[0].refused == MachineError.exit_code, failed
    assert "No space left" in failed[0].error and "free some space" in failed[0].error
    assert len(failed[0].error.splitlines()) == 1
    whole = everything(other.directory)
    left = {name: v for name, v in everything(lab.directory).items() if len(Path(name).parts) == 3}
    assert all(value == whole[name] for name, value in left.items())

    (small_disk / "ballast").unlink()
    remount(small_disk, "size=64M")
    assert {outcome.status for outcome in lab.compute(all_jobs(chosen))} == {"done"}
    assert everything(lab.directory) == whole

    remount(small_disk, "ro")  # reading goes on; work is refused before it begins
    again = Lab(chosen, small_disk)
    assert len(again.evaluations()) == len(other.evaluations())
    with pytest.raises(MachineError, match="cannot be written to"):
        again.compute(all_jobs(chosen))


def test_the_command_line_says_in_a_sentence_what_the_disk_refuses(monkeypatch, capsys):
    def full() -> None:
        raise OSError(28, "No space left on device", "/disk/x.json")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == MachineError.exit_code
    assert said.startswith("/disk/x.json: No space left on device; ") and len(said.splitlines()) == 1
