"""Jobs on a Ray cluster: what they take along and bring back, and what a lost worker or node costs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pool_work import die, die_first, fail, note, perform_on_cluster, refuse, run_here
from small_run import profile, save_base

from qtale_lib import cluster, jobs, pool
from qtale_lib import lab as lab_module
from qtale_lib.config import Profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run
from qtale_lib.lab import Lab
from qtale_lib.pool import Task
from qtale_lib.provenance import ROOT

RUN = Run("arc_easy", "qtale", 0)
NOT_NUMBERS = ("training_seconds", "probe_seconds")  # what a second run need not repeat
TOLD = "Ray is not installed; ./run_tests.sh --all installs it"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def small(base: Path, **changes) -> Profile:
    return profile(base, **{"tasks": ["arc_easy"], "methods": ["full", "qtale"], **changes})


def contents(lab: Lab) -> dict[str, object]:
    """Every result's value, or a file's bytes, by its path in the store."""
    found = {}
    for path in lab.store.root.glob("[!l]*/**/*"):
        if path.is_file():
            found[str(path.relative_to(lab.store.root))] = path.read_bytes()
    for name in [name for name in found if name.endswith(".json")]:
        value = json.loads(found[name])
        if name.count("/") == 1:
            value = {key: value["value"][key] for key in value["value"] if key not in NOT_NUMBERS}
        found[name] = value
    return found


# Without Ray: parcels, and a job away from the store.


def test_a_parcel_brings_a_result_and_its_files_whole(tmp_path):
    here, there = (lab_module.Store(tmp_path / name) for name in ("here", "there"))
    address = ("finetune", "a.full.s0", "key")
    assert here.parcel(*address) is None
    (here.files(*address) / "deep").mkdir(parents=True)
    (here.files(*address) / "deep" / "x.safetensors").write_bytes(b"\0\1")
    result = here.put(*address, spec={"seed": 0}, value={"acc": 0.1 + 0.2}, config={}, provenance={})
    there.take(here.parcel(*address))
    assert there.get(*address) == result
    assert (there.files(*address) / "deep" / "x.safetensors").read_bytes() == b"\0\1"


def test_what_is_there_is_not_replaced_by_a_parcel(tmp_path):
    here, there = (lab_module.Store(tmp_path / name) for name in ("here", "there"))
    for store, value in ((here, 1), (there, 2)):
        store.put("threshold", "a", "key", spec={}, value={"theta": value}, provenance={})
    there.take(here.parcel("threshold", "a", "key"))
    assert there.get("threshold", "a", "key")["value"] == {"theta": 2}


@pytest.fixture(scope="module")
def sequential(tmp_path_factory, base) -> Lab:
    """All results of the small grid of two seeds, computed one after the other in this process."""
    lab = Lab(small(base, seeds=2), tmp_path_factory.mktemp("sequential"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "run_tasks", run_here)
        assert {outcome.status for outcome in lab.compute(jobs.all_jobs(lab.profile))} == {"done"}
    return lab


@pytest.mark.parametrize("shared", [True, False])
def test_a_job_away_from_the_store_brings_the_same_results(tmp_path, monkeypatch, sequential, shared):
    """In a scratch folder beside the store where a node sees it, in the temporary folder elsewhere."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    lab = Lab(sequential.profile, tmp_path / "results")
    root = lab.directory.parent if shared else tmp_path / "nowhere"
    seen = []

    def report(*_: object) -> None:
        places = [lab.directory, tmp_path / "temporary"]
        seen.append([any(place.rglob("scratch/*/*/store")) for place in places])

    for job in (Job(RUN), Job(RUN, 4)):
        lab.store.root.mkdir(parents=True, exist_ok=True)
        luggage = cluster._pack(lab, job)
        brought = cluster._perform(lab.profile, root, job, luggage, report)
        assert not lab.is_done(job)
        cluster._take(lab, job, brought)
        assert lab.is_done(job)
    assert {tuple(places) for places in seen} == {(shared, not shared)}
    assert not list(tmp_path.rglob("scratch/*"))
    expected = contents(sequential)
    found = contents(lab)
    assert len(found) > 5 and found == {name: expected[name] for name in found}


def test_a_job_goes_on_from_what_a_killed_worker_left(tmp_path, base):
    lab = Lab(small(base, max_steps=60, training={"save_steps": 5}), tmp_path)
    lab.store.root.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    arguments = (lab.profile, tmp_path, Job(RUN), cluster._pack(lab, Job(RUN)))
    worker = context.Process(target=perform_on_cluster, args=arguments)
    worker.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("checkpoint-10/*")):
        assert time.monotonic() < deadline and worker.is_alive()
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    shares = []
    cluster._take(lab, Job(RUN), cluster._perform(*arguments, lambda share, note: shares.append(share)))
    assert shares[0] > 5 / 60 and lab.result("finetune", **lab_module.run_spec(RUN))["value"]["steps"] == 60


def test_results_made_from_something_else_are_refused(tmp_path, sequential):
    lab = Lab(sequential.profile, tmp_path)
    other = Lab(sequential.profile.model_copy(update={"max_steps": 7}), sequential.directory.parent)
    for brought in ([], other.parcels([Job(RUN)])):
        with pytest.raises(UserError, match="make them the same on every node"):
            cluster._take(lab, Job(RUN), brought)


def nodes(*resources: dict[str, float]):
    return lambda: [{"Resources": each} for each in resources]


def test_a_job_takes_a_gpu_or_else_a_core_and_memory(monkeypatch):
    large, small = {"CPU": 4.0, "memory": 10.0}, {"CPU": 1.0, "memory": 3.0}
    monkeypatch.setattr(cluster, "_nodes", nodes(large, small, {"memory": 99.0}))
    assert cluster.slots(cluster.room(3)) == 3 + 1
    assert cluster.slots(cluster.room(4)) == 2
    with pytest.raises(UserError, match=r"No node of the Ray cluster has room for a job"):
        cluster.room(100)
    monkeypatch.setattr(cluster, "_nodes", nodes(large, {**small, "GPU": 8.0}, {"CPU": 9.0, "GPU": 2.0}))
    assert cluster.slots(cluster.room(100)) == 1 + 2


def test_without_ray_a_sentence_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    places = {"QTALE_RESULTS_DIR": str(tmp_path / "r"), "QTALE_FIGURES_DIR": str(tmp_path / "f")}
    done = subprocess.run(
        [sys.executable, "-m", "qtale_lib", "run", "--profile", "smoke", "--cluster", "local"],
        env={**os.environ, **places, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--cluster needs Ray" in done.stderr and f"-r {cluster.LOCK_FILE}" in done.stderr
    assert (ROOT / cluster.LOCK_FILE).is_file()


# With Ray: two nodes on this machine, one core each.


class Told:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.again: list[str] = []
        self.reports: list[tuple[str, float, str]] = []

    def started(self, task: Task) -> None:
        self.begun.append(task.name)

    def progressed(self, task: Task, fraction: float, note: str = "") -> None:
        self.reports.append((task.name, fraction, note))

    def restarted(self, task: Task, reason: str) -> None:
        self.again.append(task.name)

    def ended(self, task: Task, outcome: pool.Outcome) -> None: ...


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[object]:
    """A Ray of a head and one more node, on 127.0.0.1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv(cluster.LOOPBACK, "0")
        pytest.importorskip("ray", reason=TOLD)
        from ray.cluster_utils import Cluster

        settings = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        made = Cluster(initialize_head=True, connect=False, head_node_args=settings)
        made.second = made.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        made.wait_for_nodes()
        yield made
        made.shutdown()


@pytest.mark.slow
def test_a_task_that_dies_is_done_again_and_one_that_fails_is_not(two_nodes, tmp_path):
    log, recovering, watcher, received = tmp_path / "log", tmp_path / "recovering", Told(), {}
    tasks = [
        Task("fails", fail),
        Task("refuses", refuse),
        Task("dies", die),
        Task("recovers", die_first, (recovering,)),
        Task("child", note, (log, "child"), after=("dies",)),
        Task("grandchild", note, (log, "grandchild"), after=("child",)),
        Task("first", note, (log, "first"), rank=1),
        Task("second", note, (log, "second"), after=("first", "recovers", "not among these")),
    ]
    with cluster.joined(two_nodes.address):
        need = cluster.room(2**20)
        assert cluster.slots(need) == 2
        ended = cluster.run_tasks(
            tasks, need, watcher, receive=lambda task, value: received.update({task.name: value})
        )
    outcomes = {outcome.name: outcome for outcome in ended}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("fails", "refuses", "dies"), "failed"),
        **dict.fromkeys(("child", "grandchild"), "skipped"),
        **dict.fromkeys(("recovers", "first", "second"), "done"),
    }  # fmt: skip
    assert watcher.again.count("dies") == cluster.RETRIES and watcher.again.count("recovers") == 1
    assert set(watcher.again) == {"dies", "recovers"} and len(watcher.begun) == len(set(watcher.begun))
    assert log.read_text().split() == ["first", "second"] and recovering.read_text().split() == ["x", "x"]
    assert received == {"recovers": "done at last", "first": None, "second": None}
    assert "ValueError: no good" in outcomes["fails"].error and "Traceback" in outcomes["fails"].detail
    assert (outcomes["refuses"].error, outcomes["refuses"].refused) == ("do this instead", 2)
    assert "4 times" in outcomes["dies"].error
    # what a task that ends at once has reported may not be seen; of four, some is
    assert {report[1:] for report in watcher.reports} == {(0.5, "half way")}


@pytest.mark.slow
def test_a_grid_survives_the_loss_of_a_node(two_nodes, sequential, tmp_path, capsys):
    lab = Lab(sequential.profile, tmp_path)
    raylet = psutil.Process(two_nodes.second.all_processes["raylet"][0].process.pid)
    lost_in = []

    def lose_a_node() -> None:
        """Once a result is there, while the node is at a job: two run at a time, on one core each."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            at_work = list((lab.directory / "scratch").glob("*"))
            if len(at_work) == 2 and list(lab.store.root.glob("finetune/*.json")):
                for process in (raylet, *raylet.children(recursive=True)):
                    process.kill()
                lost_in.extend(path.name for path in at_work)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=lose_a_node)
    thread.start()
    outcomes = cluster.compute(lab, jobs.all_jobs(lab.profile), two_nodes.address)
    thread.join()
    (again,) = [line for line in capsys.readouterr().out.splitlines() if "begun again, as its worker" in line]
    assert again.split(":")[0].replace(" ", "_") in lost_in and len(lost_in) == 2
    assert [outcome.name for outcome in outcomes if outcome.status != "done"] == []
    assert sorted(outcome.name for outcome in outcomes) == sorted(j.name for j in jobs.all_jobs(lab.profile))
    assert contents(lab) == contents(sequential)
    assert not (lab.directory / "scratch").exists()
    assert cluster.compute(lab, jobs.all_jobs(lab.profile), two_nodes.address) == []


@pytest.mark.slow
def test_two_callers_are_not_at_one_profile(two_nodes, sequential, tmp_path):
    lab = Lab(sequential.profile, tmp_path)
    with cluster._alone(lab), pytest.raises(UserError, match="Another run of profile smoke is on a cluster"):
        cluster.compute(lab, jobs.all_jobs(lab.profile), two_nodes.address)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere"])
def test_where_no_cluster_is_a_sentence_says_so(address):
    pytest.importorskip("ray", reason=TOLD)
    with pytest.raises(UserError, match=f'= "{address}"\\) leads to no Ray cluster'), cluster.joined(address):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_processes(tmp_path, base, stop):
    pytest.importorskip("ray", reason=TOLD)
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: smoke\nbase: {base}\ntasks: [arc_easy]\nmax_steps: 5000\ngroup_size: 32\n")
    places = {"QTALE_RESULTS_DIR": str(tmp_path / "results"), "QTALE_FIGURES_DIR": str(tmp_path / "figures")}
    mark = f"cluster-test-{os.getpid()}-{stop}"
    running = subprocess.Popen(
        [sys.executable, "-m", "qtale_lib", "run", "--profile", path, "--cluster", "local"],
        env={**os.environ, **places, "PYTHONPATH": str(ROOT), "QTALE_MARK": mark},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("results/mine/scratch/*/mine/store/finetune/*")):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.1)
    assert any("raylet" in process.name() for process in marked(mark))
    running.send_signal(stop)
    said = running.communicate(timeout=60)[1]
    # Ray makes what SIGTERM ends with into a 1
    assert running.returncode in {signal.SIGINT: (130,), signal.SIGTERM: (143, 1)}.get(stop, (-stop,)), said
    assert stop != signal.SIGINT or "Stopped. The same command goes on from here." in said
    deadline = time.monotonic() + 30
    while left := marked(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("QTALE_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


# The Slurm script, with stand-ins for Slurm's commands: both nodes are this machine, and Ray is real.

STAND_INS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "hostname": "echo 127.0.0.2 10.0.0.9",
    "srun": """for option; do case $option in --*) shift ;; *) break ;; esac; done
[ "$1" != ray ] || set -- "$@" --object-store-memory 100000000
exec "$@" """,
    "python": """case "$*" in
  "-m qtale_lib run --profile"*) exec {python} {driver} "$5" "$7" ;;
  *) exec {python} "$@" ;;
esac""",
}
DRIVER = """
import sys, time
from qtale_lib import cluster
profile, address = sys.argv[1:]
with cluster.joined(address):
    need = cluster.room(1)
    deadline = time.monotonic() + 120
    while cluster.slots(need) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    print(profile, "has", cluster.slots(need), "slots")
sys.exit(3 if profile == "bad" else 0)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_slurm_script_starts_ray_on_every_node_runs_the_profiles_and_ends_all(tmp_path):
    pytest.importorskip("ray", reason=TOLD)
    commands, driver = tmp_path / "bin", tmp_path / "driver.py"
    commands.mkdir()
    driver.write_text(DRIVER)
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text.format(python=sys.executable, driver=driver)}\n")
        (commands / name).chmod(0o755)
    mark = f"slurm-test-{os.getpid()}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "2"}
    paths = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "cluster.slurm", "smoke", "bad"],
        env={**os.environ, **job, **paths, "QTALE_MARK": mark},
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    logs = {path.name.split("-")[2]: path.read_text() for path in tmp_path.glob("slurm-*.log")}
    assert done.returncode == 3, done.stdout + done.stderr
    assert {name: text.splitlines()[-1] for name, text in logs.items()} == {
        "smoke.log": "smoke has 4 slots", "bad.log": "bad has 4 slots",
    }  # fmt: skip
    deadline = time.monotonic() + 30
    while left := marked(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
