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
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import psutil

from qtale_lib.errors import UserError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE_SECONDS = 5.0
PUT_OFF = "put off"
WORKER_BYTES = 1.5 * 2**30  # torch, its imports, the activations of a small model
SMALL_BYTES = 2**28  # a model below leaves a GPU idle most of the time: several workers share it
COPIES = 3  # of the model's weights in a worker's memory, at most: while it loads, merges or searches


@dataclass(frozen=True)
class Task:
    """One job for the pool: `work(*arguments, report)` in a worker, after the tasks named in `after`.

    cost: expected seconds, in any unit common to all tasks; rank: ready tasks of a lower rank go first.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    cost: float = 1.0
    rank: int = 0


class PutOff(Exception):
    """Raised by a task's work if another process is at it: it is tried again after all that are ready."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: "done", "failed" or "skipped" (something it builds on failed); "put off" is no end.

    refused: it failed by a UserError, whose sentence is `error`.
    """

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""
    detail: str = ""
    refused: bool = False


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None
    started: float = 0.0


class Watcher(Protocol):
    """Is told, in the caller's process, what the tasks do."""

    def started(self, task: Task) -> None:
        """A worker took the task."""

    def progressed(self, task: Task, fraction: float) -> None:
        """The task reported the share of it that is done."""

    def put_off(self, task: Task) -> None:
        """The task was given back, to be tried again later."""

    def restarted(self, task: Task, reason: str) -> None:
        """The task was lost with its worker and begins again; a cluster does that."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """The task is over, one way or another."""


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
                    workers[index] = _give(worker or _start(slots[index]), pending.pop(task.name))
            for index in _busy(workers):
                workers[index] = _listen(workers[index], watcher, finish)
    finally:
        _dismiss([worker for worker in workers if worker])
    return list(outcomes.values())


def worker_slots(tasks: int, model_bytes: int = 0) -> list[dict[str, str]]:
    """Environments of the workers: one per GPU, else one per core with one thread, as memory allows.

    A GPU takes as many workers with small models as cores and its memory allow.
    model_bytes: one copy of the model in memory. UserError if not even that fits, before any work is begun.
    """
    gpus = _gpus()
    if gpus and model_bytes >= SMALL_BYTES:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in list(gpus)[:tasks]]
    if gpus:
        room = min(gpus.values()) // worker_bytes(model_bytes)
        share = max(1, min(usable_cores() // len(gpus), room))
        threads = dict.fromkeys(THREAD_VARIABLES, "1")
        return [{"CUDA_VISIBLE_DEVICES": gpu, **threads} for _ in range(share) for gpu in gpus][:tasks]
    free = psutil.virtual_memory().available
    if model_bytes > free:
        raise UserError(
            f"The base model takes {model_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are "
            "free; set dtype: bfloat16 or choose a smaller base."
        )
    room = free // worker_bytes(model_bytes)
    return [dict.fromkeys(THREAD_VARIABLES, "1")] * max(1, min(usable_cores(), room, tasks))


def worker_bytes(model_bytes: int) -> int:
    """Memory that a worker takes, at most, with a model of so many bytes."""
    return int(WORKER_BYTES + COPIES * model_bytes)


def usable_cores() -> int:
    """Cores that this process may use: affinity and a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (limits := quota.read_text().split())[0] != "max":
        cores = min(cores, max(1, int(limits[0]) // int(limits[1])))
    return cores


def _gpus() -> dict[str, int]:
    """Ids of the visible GPUs and their free bytes; another process asks torch, so this one stays light."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd")):
        return {}
    ask = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    free = [int(text) for text in done.stdout.split()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(len(free)))
    return dict(zip(names, free, strict=False))


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
                watcher.progressed(task, value)
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


def _start(slot: dict[str, str]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, slot), daemon=True)
    with _environment(slot):  # libraries read thread counts and visible GPUs when they are first imported
        process.start()
    theirs.close()
    return _Worker(process, ours)


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
        connection.send(attempt(work, arguments, lambda done: connection.send(("progress", done))))


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
    work: Callable[..., Any], arguments: tuple[Any, ...], report: Callable[[float], None]
) -> tuple[str, tuple[Any, ...]]:
    """Do a task's work, in its worker: an outcome's status, and its error, detail and refused."""
    try:
        work(*arguments, report)
    except PutOff:
        return PUT_OFF, ()
    except UserError as error:
        return "failed", (str(error), "", True)
    except Exception as error:
        return "failed", (f"{type(error).__name__}: {error}", traceback.format_exc())
    return "done", ()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
