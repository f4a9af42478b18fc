"""Work for the pool's tests, in a module without torch: each worker imports it anew."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from qtale_lib.config import Profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Run, all_jobs
from qtale_lib.lab import Lab, run_spec
from qtale_lib.log import logged
from qtale_lib.pool import Outcome, PutOff, Report, Task, Watcher, attempt, run_tasks
from qtale_lib.progress import PlainWatcher
from qtale_lib.store import locked


def note(path: Path, text: str, report: Report) -> None:
    """Write a line."""
    report(0.5, "half way")
    with path.open("a") as stream:
        stream.write(text + "\n")


def fail(report: Report) -> None:
    """Fail as a bug does."""
    raise ValueError("no good")


def refuse(report: Report) -> None:
    """Fail as a user's mistake does."""
    raise UserError("do this instead")


def die(report: Report) -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_first(path: Path, report: Report) -> str:
    """Write a line and be killed; the second time, do it and say so."""
    first = not path.exists()
    note(path, "x", report)
    if first:
        die(report)
    return "done at last"


def hold(path: Path, held) -> None:
    """Keep a lock for a minute."""
    with locked(path):
        held.set()
        time.sleep(60)


def hold_log(directory: Path, held) -> None:
    """Be at work, by a log, for a minute."""
    with logged(directory):
        held.set()
        time.sleep(60)


def hold_until_noted(path: Path, held, log: Path, text: str) -> None:
    """Keep a lock until a line was written."""
    with locked(path):
        held.set()
        while not log.exists() or text not in log.read_text():
            time.sleep(0.05)


def note_if_free(lock: Path, path: Path, text: str, report: Report) -> None:
    """Write a line, or leave it for later while another process holds the lock."""
    with locked(lock, 0.2) as held:
        if not held:
            raise PutOff
        note(path, text, report)


def take_part(folder: Path, names: str, who: str) -> None:
    """Do tasks that another process does too, one at a time."""
    tasks = [Task(name, once_among_processes, (folder, name, who)) for name in names]
    run_tasks(tasks, [{}], PlainWatcher(tasks, 1))


def once_among_processes(folder: Path, name: str, who: str, report: Report) -> None:
    """What a job of the lab does: nothing if it is done, nothing yet if another process is at it."""
    with locked(folder / f"{name}.lock", 0.1) as held:
        if not held:
            raise PutOff
        if not (folder / name).exists():
            time.sleep(0.5)
            note(folder / name, who, report)


def compute_slowly(settings: Profile, root: Path, counter: Path) -> None:
    """A fine-tuning's result that leaves a mark each time it is computed."""

    def compute(_: Path) -> dict[str, str]:
        with counter.open("a") as stream:
            stream.write("x")
        time.sleep(1)
        return {"adapter_sha256": "a"}

    Lab(settings, root).once("finetune", run_spec(Run("arc_easy", "full", 0)), compute)


def compute_everything(settings: Profile, root: Path) -> None:
    """All of a profile's results."""
    Lab(settings, root).compute(all_jobs(settings))


def run_here(tasks: Sequence[Task], slots: Sequence[dict[str, str]], watcher: Watcher) -> list[Outcome]:
    """pool.run_tasks without processes, in the order given."""
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        if any(outcomes[name].status != "done" for name in task.after if name in outcomes):
            outcomes[task.name] = Outcome(task.name, "skipped")
            continue
        try:
            task.work(*task.arguments, lambda *done: None)
            outcomes[task.name] = Outcome(task.name, "done")
        except UserError as error:
            outcomes[task.name] = Outcome(task.name, "failed", error=str(error), refused=True)
    return list(outcomes.values())


def attempt_here(tasks: Sequence[Task], slots: Sequence[dict[str, str]], watcher: Watcher) -> list[Outcome]:
    """The same, and what fails is an outcome as it is in a worker."""
    outcomes: dict[str, Outcome] = {}
    for task in tasks:
        lost = any(outcomes[name].status != "done" for name in task.after if name in outcomes)
        status, rest = ("skipped", ()) if lost else attempt(task.work, task.arguments, lambda *done: None)
        outcomes[task.name] = Outcome(task.name, status, 0.0, *rest)
    return list(outcomes.values())


def perform_on_cluster(*arguments) -> None:
    """A job of qtale_lib.cluster, in a process of its own."""
    from qtale_lib.cluster import _perform

    _perform(*arguments, lambda *done: None)


def note_process(path: Path, report: Report) -> None:
    """Write the worker's number."""
    note(path, str(os.getpid()), report)
