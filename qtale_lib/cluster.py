"""A grid's jobs on a Ray cluster in place of the pool: one per GPU, or one per core where there are no GPUs.

Only the caller writes to the run store. A job is sent off with the results that it builds on, is worked at
in a scratch folder where it lands, and what it made comes back through Ray: nodes need the same checkout,
base and data, but no common disk and no locks across machines. Where they share the results' folder, the
scratch folder lies in it, and a job whose worker died goes on from its last checkpoint.
Ray is an optional extra, imported when it is asked for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale_lib import machine, pool
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.pool import Outcome, Report, Task, Watcher
from qtale_lib.preflight import gib, peak_bytes
from qtale_lib.progress import watcher
from qtale_lib.store import Parcel, locked, read_json, write_json

if TYPE_CHECKING:
    from qtale_lib.config import Profile
    from qtale_lib.jobs import Job

LOCAL = "local"
LOCK_FILE = "requirements-cluster.lock"
RETRIES = 3  # of a task whose worker or node is lost
POLL = 0.5  # seconds between two looks at what runs
KNOCK = 10.0  # seconds for a cluster's port to answer
PATIENCE = 600.0  # seconds that a cluster may be without a node for a task
OBJECT_STORE = 512 * 2**20  # bytes, of a Ray that is started here: adapters and scales pass through it
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0", on any system: Ray binds to 127.0.0.1
SCRATCH = "scratch"
MEMO = "base.json"


def compute(lab: Lab, wanted: Iterable[Job], address: str) -> list[Outcome]:
    """Lab.compute on the Ray cluster at an address, or on one that is started on this machine ("local").

    Raises:
        UserError: for what can be known to fail before any work is begun: also, Ray is not installed, no
            cluster answers, none of its nodes has room for one job, or another such call is at the profile.
    """
    _ray(address)
    jobs = {job.name: job for job in lab.missing(wanted)}
    if not jobs:
        return []
    tasks = [replace(lab.task(job), work=_perform) for job in jobs.values()]
    with _alone(lab), joined(address):
        need = room(int(peak_bytes(lab, list(jobs.values()), "cpu")), lab.profile.compute.processes)
        with watcher(tasks, slots(need), lab.directory) as watching:
            return run_tasks(
                tasks,
                need,
                watching,
                send=lambda task: (*task.arguments, _pack(lab, jobs[task.name])),
                receive=lambda task, parcels: _take(lab, jobs[task.name], parcels),
            )


@contextlib.contextmanager
def _alone(lab: Lab) -> Iterator[None]:
    """Two callers would work in the same scratch folders."""
    with locked(lab.store.root / "locks" / "cluster", 0.0) as held:
        if not held:
            raise UserError(
                f"Another run of profile {lab.profile.name} is on a cluster; wait for its end, or stop it."
            )
        yield
    with contextlib.suppress(OSError):  # it holds what killed workers left, or is not there
        (lab.directory / SCRATCH).rmdir()


# The cluster.


def _ray(address: str = "") -> Any:
    private = {LOOPBACK: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    settings = SETTINGS | (private if address == LOCAL else {})
    for name, value in settings.items():  # read when Ray is first imported
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise UserError(
            "--cluster needs Ray, which is not installed; install it by "
            f"`python -m pip install --require-hashes --no-deps -r {LOCK_FILE}`."
        ) from None
    return ray


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Be with the cluster at an address; "local" starts one here, and stops it at the end.

    Raises:
        UserError: if no cluster answers there.
    """
    ray, here = _ray(address), {}
    if address == LOCAL:
        here = {"num_cpus": machine.usable_cores(), "object_store_memory": OBJECT_STORE}
        here["include_dashboard"] = False
    stopped = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(address, logging_level="ERROR", log_to_driver=False, **here)
        signal.signal(signal.SIGTERM, stopped)  # Ray's own says where it was in C++
    except Exception as error:  # Ray knows no narrower kind
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f'--cluster (= "{address}") leads to no Ray cluster ({why}); start one by `ray start --head` '
            "and give the address that it prints, or say --cluster local."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK).close()


def room(memory: int, processes: int = 1) -> dict[str, float]:
    """What a task takes of a node: a GPU where the cluster has any, else a core and so many bytes of memory;
    as often as a fine-tuning has processes.

    Raises:
        UserError: if no node has it.
    """
    need = {"CPU": float(processes), "memory": float(processes * memory)}
    if any(node["Resources"].get("GPU", 0) >= 1 for node in _nodes()):
        need = {"CPU": float(processes), "GPU": float(processes)}
    if not slots(need):
        most = max((node["Resources"].get("memory", 0.0) for node in _nodes()), default=0.0)
        raise UserError(
            f"No node of the Ray cluster has room for a job, which takes {_told(need)} (the largest node has "
            f"{gib(most)} of memory); add a larger one, set dtype: bfloat16 or choose a smaller "
            "base."
        )
    return need


def _told(need: dict[str, float]) -> str:
    if "GPU" in need:
        return f"{need['GPU']:.0f} GPUs"
    return f"{need['CPU']:.0f} cores and {gib(need['memory'])} of memory"


def slots(need: dict[str, float]) -> int:
    """How many tasks the nodes that are alive can do at a time."""
    return sum(
        min(int(node["Resources"].get(name, 0.0) // amount) for name, amount in need.items())
        for node in _nodes()
    )


def _nodes() -> list[dict[str, Any]]:
    return [node for node in _ray().nodes() if node["Alive"]]


# The tasks.


class _Board:
    """An actor that holds what each running task reported last until it is asked."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[Any, ...]] = {}

    def put(self, name: str, *report: Any) -> None:
        self.reports[name] = report

    def take(self) -> dict[str, tuple[Any, ...]]:
        taken, self.reports = self.reports, {}
        return taken


@dataclass(frozen=True)
class _Ended:
    """What comes back of a task: its outcome's parts, what its work returned, and from which machine."""

    status: str
    rest: tuple[Any, ...]
    value: Any
    seconds: float
    machine: str


def _work(board: Any, name: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> _Ended:
    """In a worker of the cluster."""
    started, made = time.monotonic(), []
    status, rest = pool.attempt(
        lambda report: made.append(work(*arguments, report)), (), lambda *done: board.put.remote(name, *done)
    )
    seconds = time.monotonic() - started
    return _Ended(status, rest, made[0] if made else None, seconds, socket.gethostname())


def run_tasks(
    tasks: Sequence[Task],
    need: dict[str, float],
    watching: Watcher,
    send: Callable[[Task], tuple[Any, ...]] = lambda task: task.arguments,
    receive: Callable[[Task, Any], None] = lambda task, value: None,
) -> list[Outcome]:
    """pool.run_tasks on the cluster that this process is with.

    A task whose worker or node is lost is done again, wherever there is room, up to RETRIES times; one that
    fails by itself is not.

    need: what a task takes of a node (`room`); send: makes a task's arguments, here, when it is sent off;
    receive: takes, here, what its work returned, and may refuse it by a UserError.

    Raises:
        UserError: if no node for a task has been there for PATIENCE.
    """
    dispatch = _Dispatch(tasks, need, watching, send, receive)
    try:
        dispatch.run()
    finally:
        dispatch.end()
    return list(dispatch.outcomes.values())


class _Dispatch:
    """The tasks of one call: which wait, which run, how the others ended."""

    def __init__(
        self,
        tasks: Sequence[Task],
        need: dict[str, float],
        watching: Watcher,
        send: Callable[[Task], tuple[Any, ...]],
        receive: Callable[[Task, Any], None],
    ) -> None:
        self.ray, self.need, self.watching, self.send, self.receive = _ray(), need, watching, send, receive
        names = {task.name for task in tasks}
        self.pending = {task.name: replace(task, after=tuple(names & set(task.after))) for task in tasks}
        self.running: dict[Any, Task] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.tries: dict[str, int] = {}
        self.board = self.ray.remote(_Board).options(num_cpus=0, scheduling_strategy=self._here()).remote()
        self.work = self.ray.remote(_work).options(**_options(need))

    def _here(self) -> Any:
        """The board lives on the caller's node, without which there is no caller either."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)

    def run(self) -> None:
        seen = time.monotonic()
        while self.pending or self.running:
            for task in pool.doomed(self.pending, self.outcomes):
                del self.pending[task.name]
                self._finish(task, Outcome(task.name, "skipped", error="what it builds on failed"))
            width = slots(self.need)
            seen = time.monotonic() if width else seen
            if time.monotonic() - seen > PATIENCE:
                raise UserError(f"The Ray cluster has had no node for a job for {PATIENCE:.0f} s; add one.")
            while len(self.running) < width and (task := pool.next_task(self.pending, self.outcomes)):
                self._submit(self.pending.pop(task.name))
            self._listen()

    def end(self) -> None:
        """Stop what still runs."""
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.ray.kill(self.board)

    def _submit(self, task: Task) -> None:
        if task.name not in self.tries:
            self.watching.started(task)
        self.tries[task.name] = self.tries.get(task.name, 0) + 1
        self.running[self.work.remote(self.board, task.name, task.work, self.send(task))] = task

    def _listen(self) -> None:
        """Wait a moment for a task that ends; tell how far the others are."""
        if not self.running:
            time.sleep(POLL)
            return
        ended, _ = self.ray.wait(list(self.running), timeout=POLL)
        reports = self.ray.get(self.board.take.remote())
        for task in self.running.values():
            if task.name in reports:
                self.watching.progressed(task, *reports[task.name])
        for reference in ended:
            self._end(self.running.pop(reference), reference)

    def _end(self, task: Task, reference: Any) -> None:
        errors = self.ray.exceptions
        try:
            outcome = self._outcome(task, self.ray.get(reference))
        except errors.RayTaskError as error:  # before the work was begun: a node has not this package, say
            outcome = Outcome(task.name, "failed", 0.0, str(error).strip().splitlines()[-1], str(error))
        except errors.RayError as error:  # of the worker, its raylet, its node, or what they held
            return self._lost(task, error)
        self._finish(task, outcome)

    def _lost(self, task: Task, error: Exception) -> None:
        reason = f"its worker was lost ({type(error).__name__}: killed, out of memory, or with its node)"
        if self.tries[task.name] > RETRIES:
            reason += f", {self.tries[task.name]} times"
            self._finish(task, Outcome(task.name, "failed", 0.0, reason, str(error)))
        else:
            self.pending[task.name] = task
            self.watching.restarted(task, reason)

    def _outcome(self, task: Task, ended: _Ended) -> Outcome:
        if ended.status != "done":
            return Outcome(task.name, ended.status, ended.seconds, *ended.rest)
        try:
            self.receive(task, ended.value)
        except UserError as error:
            return Outcome(
                task.name, "failed", ended.seconds, f"{ended.machine}: {error}", "", error.exit_code
            )
        return Outcome(task.name, "done", ended.seconds)

    def _finish(self, task: Task, outcome: Outcome) -> None:
        self.outcomes[task.name] = outcome
        self.watching.ended(task, outcome)


def _options(need: dict[str, float]) -> dict[str, Any]:
    """Ray's options for a task; it is retried from here, with the watcher told."""
    set_here = {} if "GPU" in need else dict.fromkeys(pool.THREAD_VARIABLES, "1")
    set_here |= {name: os.environ[name] for name in ("QTALE_MODELS_DIR",) if name in os.environ}
    resources = {"num_cpus": need["CPU"], "num_gpus": need.get("GPU"), "memory": need.get("memory")}
    return {**resources, "max_retries": 0, "runtime_env": {"env_vars": set_here}}


# A job away from the store.


@dataclass(frozen=True)
class _Luggage:
    """What a job takes along: results that it builds on or has already, and the base's facts."""

    parcels: list[Parcel]
    memo: Any


def _pack(lab: Lab, job: Job) -> _Luggage:
    return _Luggage(lab.parcels([replace(job, bits=None), job]), read_json(lab.store.root / MEMO))


def _perform(profile: Profile, root: Path, job: Job, luggage: _Luggage, report: Report) -> list[Parcel]:
    """Do a job in a scratch folder of its own and return the results that it added.

    The folder goes at the end; where a worker was killed it stays, and the next one goes on from it.
    """
    from qtale_lib import stages  # torch is loaded in the workers only

    shared = root / profile.name
    home = shared if shared.is_dir() else Path(tempfile.gettempdir()) / "qtale" / profile.name
    scratch = home / SCRATCH / job.name.replace(" ", "_")
    lab = Lab(profile, scratch)
    for parcel in luggage.parcels:
        lab.store.take(parcel)
    if luggage.memo:
        write_json(lab.store.root / MEMO, luggage.memo)
    try:
        stages.perform(lab, job, report)
        known = {parcel.address for parcel in luggage.parcels}
        return [parcel for parcel in lab.parcels([job]) if parcel.address not in known]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take(lab: Lab, job: Job, parcels: list[Parcel]) -> None:
    for parcel in parcels:
        lab.store.take(parcel)
    if not lab.is_done(job):
        raise UserError(
            "its results were made from another base, other data or another version of this suite than here; "
            "make them the same on every node."
        )
