"""A tiny run, killed at random moments and started again: are its results those of one that was not?

    python tests/kill_run.py FOLDER BASE MOMENTS SEED

Every run is a fork of this process, which has imported everything: a restart costs no imports. A moment is a
time, or one of the run's operations on files, of which Python tells a hook: so that writes, which are short,
are hit as often as computing, which is long. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pool_work import run_here
from safetensors import safe_open
from small_run import profile

from qtale_lib import figures, lab, stages, tables
from qtale_lib.config import Profile
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.store import file_digest, read_json

MEASURED = {
    "seconds", "training_seconds", "probe_seconds", "generation_seconds", "peak_memory_bytes", "finished_at",
    "git_commit",
}  # fmt: skip
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree"}
MEMOS = ("base.json", "data.json")  # of hashes, in the order in which they were asked for
KEPT_APART = {"locks", "logs"}
BLOWS_A_RUN = 5  # at most, before it is let end


def settings(base: Path) -> Profile:
    """Training with three checkpoints, quantization, θ search and evaluations."""
    return profile(
        base, tasks=["arc_easy"], methods=["qtale"], bits=[4], training={"save_steps": 2},
        limit={"train": 24, "calibration": 4, "test": 4},
    )  # fmt: skip


def work(chosen: Profile, root: Path) -> None:
    """What `python -m qtale_lib run` does, in this process: all results, a table and a figure of them."""
    own = Lab(chosen, root)
    outcomes = own.compute(all_jobs(chosen))
    assert all(outcome.status == "done" for outcome in outcomes), outcomes
    frame = own.evaluations().drop(columns="seconds")
    tables.save(tables.Table("table", "evaluations", frame.astype(str), frame, ()), own.tables)
    drawn = Figure()
    drawn.subplots().plot(frame.nll.tolist())
    figures.save(drawn, frame, "figure", root / "figures")


def begin(chosen: Profile, root: Path, operation: int | None = None, delay: float = 0.0) -> int:
    """Fork a run; with `operation`, it dies so many seconds after so many-th of its operations on files."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if operation is not None:
            die_at(operation, delay, root)
        work(chosen, root)
        status = 0
    finally:
        os._exit(status)


def die_at(operation: int, delay: float, root: Path) -> None:
    """Let the system end this process shortly after one of its operations on files below root."""
    left = [operation]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        left[0] -= is_operation(event, arguments, root)
        if left[0] == 0:
            left[0] = -1
            signal.setitimer(signal.ITIMER_REAL, delay + 1e-6)  # SIGALRM, which nothing handles

    sys.addaudithook(hook)


def is_operation(event: str, arguments: tuple[Any, ...], root: Path) -> bool:
    """Whether an event of Python's is an operation on a file below root."""
    return event in OPERATIONS and isinstance(arguments[0], str | Path) and str(root) in str(arguments[0])


def ended(child: int) -> int:
    """How a run ended: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def everything(root: Path) -> dict[str, Any]:
    """All that a run leaves, by name, without what is measured; hidden files, locks and logs left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir() or path.name.startswith(".") or path.name in MEMOS or KEPT_APART & set(path.parts):
            continue
        is_result = path.suffix == ".json" and path.parent.parent.name == "store"
        found[name] = unmeasured(read_json(path)) if is_result else file_digest(path)
    return found


def unmeasured(value: Any) -> Any:
    """A JSON value without what no two runs have in common."""
    if isinstance(value, dict):
        return {name: unmeasured(item) for name, item in value.items() if name not in MEASURED}
    return [unmeasured(item) for item in value] if isinstance(value, list) else value


def half_written(root: Path) -> list[str]:
    """What a reader could take for whole, and is not: results, their tensors, tables, figures."""
    broken = []
    for path in root.rglob("*.json"):
        if path.name.startswith(".") or "checkpoint-" in str(path):
            continue  # a checkpoint counts by its digest: see `finish` of checkpoints.py
        if read_json(path) is None:
            broken.append(str(path))
        tensors = (
            list(path.with_suffix("").glob("*.safetensors")) if path.parent.parent.name == "store" else []
        )
        broken += [str(file) for file in tensors if not opens(file)]
    ends = {".pdf": b"%%EOF\n", ".svg": b"</svg>\n", ".png": b"IEND\xaeB`\x82", ".csv": b"\n", ".md": b"\n"}
    for path in root.rglob("*"):
        if path.suffix in ends and not path.name.startswith("."):
            broken += [] if path.read_bytes().endswith(ends[path.suffix]) else [str(path)]
    return broken


def opens(file: Path) -> bool:
    """Whether a file of tensors is whole."""
    try:
        with safe_open(file, "pt") as tensors:
            return bool(list(tensors.keys()))
    except Exception:
        return False


def trial(chosen: Profile, root: Path, whole: float, operations: int, dice: random.Random) -> list[str]:
    """Disturb a run a few times, then let it end; how. Fails if what it left is ever half written."""
    moments = []
    for _ in range(BLOWS_A_RUN):
        blow = dice.choice((kill_in_time, kill_at_an_operation, take_its_folder))
        moment, status = blow(chosen, root, whole, operations, dice)
        moments.append(moment)
        broken = half_written(root)
        assert not broken, (moments, broken)
        if status == 0:
            break
    assert ended(begin(chosen, root)) == 0, moments
    return moments


def kill_in_time(
    chosen: Profile, root: Path, whole: float, operations: int, dice: random.Random
) -> tuple[str, int]:
    """SIGKILL after a part of the time that a run takes."""
    child, delay = begin(chosen, root), dice.uniform(0, whole)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    assert status in (0, -signal.SIGKILL), status
    return f"killed after {delay:.2f} s", status


def kill_at_an_operation(
    chosen: Profile, root: Path, whole: float, operations: int, dice: random.Random
) -> tuple[str, int]:
    """The same at one of its operations on files, or milliseconds after."""
    operation, delay = dice.randint(1, operations), dice.choice((0.0, dice.uniform(0, 0.003)))
    status = ended(begin(chosen, root, operation, delay))
    assert status in (0, -signal.SIGALRM), status
    return f"killed {delay:.4f} s after operation {operation}", status


def take_its_folder(
    chosen: Profile, root: Path, whole: float, operations: int, dice: random.Random
) -> tuple[str, int]:
    """Remove all it has written, under its hands: it fails, or goes on without."""
    child, delay = begin(chosen, root), dice.uniform(0, whole)
    time.sleep(delay)
    shutil.rmtree(root, ignore_errors=True)
    status = ended(child)
    assert status in (0, 1), status
    return f"its folder gone after {delay:.2f} s", status


def together(chosen: Profile, root: Path, whole: float, dice: random.Random) -> None:
    """Two runs at once on one tree, of which one is killed."""
    both = [begin(chosen, root), begin(chosen, root)]
    time.sleep(dice.uniform(0, whole))
    os.kill(both[0], signal.SIGKILL)
    assert ended(both[0]) in (0, -signal.SIGKILL)
    assert ended(both[1]) == 0


def main(folder: Path, base: Path, wanted: int, seed: int) -> None:
    """Kill runs until there were so many moments; each must leave what an undisturbed run does."""
    stages.be_quiet()
    lab.run_tasks = run_here
    dice, chosen = random.Random(seed), settings(base)
    started = time.monotonic()
    assert ended(begin(chosen, folder / "reference")) == 0
    whole, expected = time.monotonic() - started, everything(folder / "reference")
    operations = count_operations(chosen, folder / "counted")
    assert everything(folder / "counted") == expected  # or a comparison would say nothing
    moments: list[str] = []
    runs = 0
    while len(moments) < wanted:
        root = folder / f"run-{runs}"
        moments += trial(chosen, root, whole, operations, dice)
        compare(root, expected, moments)
        runs += 1
    root = folder / "together"
    together(chosen, root, whole, dice)
    compare(root, expected, ["two at once"])
    print(json.dumps({"moments": len(moments), "runs": runs, "seconds": whole, "operations": operations}))


def count_operations(chosen: Profile, root: Path) -> int:
    """How many operations on files a whole run takes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status, count = 1, [0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            count[0] += is_operation(event, arguments, root)

        try:
            sys.addaudithook(hook)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(chosen, root)
            os.write(writer, str(count[0]).encode())
            status = 0
        finally:
            os._exit(status)
    assert ended(child) == 0
    return int(os.read(reader, 20))


def compare(root: Path, expected: dict[str, Any], moments: list[str]) -> None:
    """Fail with the first difference between a run's tree and the undisturbed one's."""
    found = everything(root)
    different = [name for name in expected.keys() | found if expected.get(name) != found.get(name)]
    assert not different, (root, moments, sorted(different))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
