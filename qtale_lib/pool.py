"""A pool of processes that outlives its workers: one per core on CPU, one or more per GPU otherwise.

Tasks wait for the tasks they build on; among the ready ones the longest goes first, and those last that
another process was found at. A task that fails, or whose process is killed, is reported and takes only the
tasks that build on it along.
Workers die with their parent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from qtale_lib import machine
from qtale_lib.errors import MachineError, UserError, of_machine

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE_SECONDS = 5.0
Report = Callable[..., None]  # report(share done, where it is or nothing), called by a task's work
PUT_OFF = "put off"


@dataclass(frozen=True)
class Task:
    """One job for the pool: `work(*arguments, report)` in a worker, after the tasks named in `after`.

    cost: expected seconds, in any unit common to all tasks; rank: ready tasks of a lower rank go first;
    stage: what it is counted with.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    cost: float = 1.0
    rank: int = 0
    stage: str = "jobs"


class PutOff(Exception):
    """Raised by a task's work if another process is at it: it is tried again after all that are ready."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: "done", "failed" or "skipped" (something it builds on failed); "put off" is no end.

    refused: the exit code of the UserError that it failed by, whose sentence is `error`; 0: by none.
    """

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""
    detail: str = ""
    refused: int = 0


@dataclass
class _Worker:
    process: Any
    connection: Connection
    slot: dict[str, str]
    task: Task | None = None
    started: float = 0.0


class Watcher(Protocol):
    """Is told, in the caller's process, what the tasks do."""

    def started(self, task: Task) -> None:
        """A worker took the task."""

    def progressed(self, task: Task, fraction: float, note: str = "") -> None:
        """The task reported the share of it that is done, and where it is."""

    def put_off(self, task: Task) -> None:
        """The task was given back, to be tried again later."""

    def restarted(self, task: Task, reason: str) -> None:
        """The task was lost with its worker and begins again; a cluster does that."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """The task is over, one way or another."""


_kept: list[_Worker] | None = None  # idle ones, within workers_kept


@contextlib.contextmanager
def workers_kept(small: bool = True) -> Iterator[None]:
    """Within it a worker that has nothing left to do stays for the next `run_tasks`, with the libraries that
    it has loaded: many small pools, one after another, then start as one.

    small: whether what such a worker still holds of memory is no matter; if it is, none stays.
    """
    global _kept
    if _kept is not None or not small:
        yield
        return
    _kept = []
    try:
        yield
    finally:
        idle, _kept = _kept, None
        _dismiss(idle)


def run_tasks(tasks: Sequence[Task], slots: Sequence[dict[str, str]], watcher: Watcher) -> list[Outcome]:
    """Do every task on one process per slot and return the outcomes in order of ending.

    slots: each worker's environment variables. Interrupted (Ctrl-C), it ends its workers first.
    """
    names = {task.name for task in tasks}
    pending = {task.name: replace(task, after=tuple(names & set(task.after))) for task in tasks}
    outcomes: dict[str, Outcome] = {}
    workers: list[_Worker | None] = [None] * min(len(slots), len(tasks))

    def finish(task: Task, outcome: Outcome) -> None:
        if outcome.status == PUT_OFF:
            rank = 1 + max(other.rank for other in (task, *pending.values()))
            pending[task.name] = replace(task, rank=rank)
            watcher.put_off(task)
            return
        outcomes[task.name] = outcome
        watcher.ended(task, outcome)

    try:
        while pending or any(worker and worker.task for worker in workers):
            for task in doomed(pending, outcomes):
                del pending[task.name]
                finish(task, Outcome(task.name, "skipped", error="what it builds on failed"))
            for index, worker in enumerate(workers):
                task = None if worker and worker.task else next_task(pending, outcomes)
                if task:
                    watcher.started(task)
                    workers[index] = _give(worker or _hire(slots[index]), pending.pop(task.name))
            for index in _busy(workers):
                workers[index] = _listen(workers[index], watcher, finish)
    finally:
        _let_go([worker for worker in workers if worker])
    return list(outcomes.values())


def worker_slots(
    tasks: int, worker_bytes: float = 0, small: bool = False, processes: int = 1
) -> list[dict[str, str]]:
    """Environments of the workers: one per GPU, else one per core with one thread, as memory allows.

    worker_bytes: the most that one holds; what not even one can hold is refused earlier (preflight.py).
    small: a GPU takes as many workers as cores and its memory allow.
    processes: that a fine-tuning is spread over: a worker then has as many GPUs, or cores, to itself.
    """
    now = machine.look()
    gpus = now.gpus
    if gpus and processes > 1:
        return _groups([gpu.id for gpu in gpus], processes)[:tasks]
    if gpus and not small:
        return [{"CUDA_VISIBLE_DEVICES": gpu.id} for gpu in gpus[:tasks]]
    threads = dict.fromkeys(THREAD_VARIABLES, "1")
    if gpus:
        room = int(min(gpu.free for gpu in gpus) // max(worker_bytes, 1))
        share = max(1, min(now.cores // len(gpus), room))
        return [{"CUDA_VISIBLE_DEVICES": gpu.id, **threads} for _ in range(share) for gpu in gpus][:tasks]
    room = int(now.free // max(worker_bytes, 1))
    return [threads] * max(1, min(now.cores // processes, room // processes, tasks))


def _groups(gpus: list[str], processes: int) -> list[dict[str, str]]:
    """The GPUs in groups of so many, each a worker's; MachineError if there are too few for one group."""
    if len(gpus) < processes:
        raise MachineError(
            f"The profile asks for {processes} processes a fine-tuning, one GPU each, and {len(gpus)} are "
            "visible; set compute.processes to as many at most."
        )
    whole = range(0, len(gpus) - processes + 1, processes)
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + processes])} for first in whole]


def doomed(pending: dict[str, Task], outcomes: dict[str, Outcome]) -> list[Task]:
    """Waiting tasks that build on one that failed or was skipped."""
    lost = {name for name, outcome in outcomes.items() if outcome.status != "done"}
    return [task for task in pending.values() if lost & set(task.after)]


def next_task(pending: dict[str, Task], outcomes: dict[str, Outcome]) -> Task | None:
    """The ready task that goes first: of the lowest rank, the longest."""
    done = {name for name, outcome in outcomes.items() if outcome.status == "done"}
    ready = [task for task in pending.values() if done.issuperset(task.after)]
    return min(ready, key=lambda task: (task.rank, -task.cost), default=None)


def _busy(workers: list[_Worker | None]) -> list[int]:
    """Wait until a busy worker speaks or dies; the indices of those that did."""
    ends = {}
    for index, worker in enumerate(workers):
        if worker and worker.task:
            ends[worker.connection] = ends[worker.process.sentinel] = index
    return sorted({ends[end] for end in wait(list(ends))}) if ends else []


def _give(worker: _Worker, task: Task) -> _Worker:
    worker.task, worker.started = task, time.monotonic()
    with contextlib.suppress(OSError):  # a dead worker is noticed when it is listened to
        worker.connection.send((task.work, task.arguments))
    return worker


def _listen(worker: _Worker, watcher: Watcher, finish: Callable) -> _Worker | None:
    """Take a worker's messages; None if it is gone and a fresh one is to take its slot."""
    task = worker.task
    try:
        while worker.connection.poll():
            kind, value = worker.connection.recv()
            if kind == "progress":
                watcher.progressed(task, *value)
                continue
            worker.task = None
            seconds = time.monotonic() - worker.started
            finish(task, Outcome(task.name, kind, seconds, *value))
            return worker
        if worker.process.is_alive():
            return worker
    except (EOFError, ConnectionError):
        pass
    worker.process.join()
    seconds = time.monotonic() - worker.started
    reason = f"its process ended with exit code {worker.process.exitcode} (killed, or out of memory)"
    finish(task, Outcome(task.name, "failed", seconds, reason))
    return None


def _hire(slot: dict[str, str]) -> _Worker:
    """A worker with the slot's environment: a kept one, or a new one."""
    for worker in _kept or ():
        if worker.slot == slot and worker.process.is_alive():
            _kept.remove(worker)
            return worker
    return _start(slot)


def _let_go(workers: list[_Worker]) -> None:
    """Keep the idle ones, if they are to be kept, and end the others."""
    if _kept is not None:
        _kept.extend(worker for worker in workers if not worker.task)
        workers = [worker for worker in workers if worker.task]
    _dismiss(workers)


def _start(slot: dict[str, str]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, slot), daemon=True)
    with _environment(slot):  # libraries read thread counts and visible GPUs when they are first imported
        process.start()
    theirs.close()
    return _Worker(process, ours, slot)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _serve(connection: Connection, slot: dict[str, str]) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        try:
            work, arguments = connection.recv()
        except EOFError:
            return
        connection.send(attempt(work, arguments, lambda *done: connection.send(("progress", done))))


def _dismiss(workers: list[_Worker]) -> None:
    """End every worker: an idle one ends by itself when its connection closes, a busy one is stopped."""
    for worker in workers:
        worker.connection.close()
        if worker.task:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(GRACE_SECONDS)
        worker.process.kill()


def attempt(
    work: Callable[..., Any], arguments: tuple[Any, ...], report: Report
) -> tuple[str, tuple[Any, ...]]:
    """Do a task's work, in its worker: an outcome's status, and its error, detail and refused."""
    try:
        work(*arguments, report)
    except PutOff:
        return PUT_OFF, ()
    except UserError as error:
        return "failed", (str(error), "", error.exit_code)
    except Exception as error:
        if refusal := of_machine(error):
            return "failed", (str(refusal), traceback.format_exc(), refusal.exit_code)
        return "failed", (f"{type(error).__name__}: {error}", traceback.format_exc())
    return "done", ()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
