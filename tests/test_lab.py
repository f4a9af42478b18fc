"""The run store, the pool and the lab: each result once and whole, and only what depends on a change anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_work import (
    compute_everything,
    compute_slowly,
    die,
    fail,
    hold,
    hold_until_noted,
    note,
    note_if_free,
    note_process,
    refuse,
    run_here,
    take_part,
)
from small_run import llama, profile, save_base

from qtale_lib import jobs, pool, stages
from qtale_lib import lab as lab_module
from qtale_lib.adaptive import routing_state
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run
from qtale_lib.lab import Lab
from qtale_lib.machine import Gpu, Machine
from qtale_lib.pool import Task, run_tasks, workers_kept
from qtale_lib.preflight import check
from qtale_lib.progress import PlainWatcher
from qtale_lib.provenance import Stopwatch
from qtale_lib.store import Store, digest, locked, read_json, write_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
TWO = [{"OMP_NUM_THREADS": "1"}] * 2


# The store.


@settings(max_examples=30, deadline=None)
@given(value=JSON)
def test_what_is_written_is_read(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "x.json", {"ppl": float("inf"), "list": [float("nan"), 1.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"ppl": None, "list": [None, 1.5]}


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_run_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    lab = Lab(profile(), tmp_path)
    names = {"of a living writer": ".x.json.abcd1234", "stale": ".y.json.abcd1234", "result": "y.json"}
    paths = {what: lab.store.root / "finetune" / name for what, name in names.items()}
    paths["of a notebook, stale"] = lab.directory / "notebooks" / ".01.json.abcd_123"
    for what, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
        if what != "of a living writer":
            os.utime(path, (time.time() - 90_000,) * 2)
    lab.compute([])
    assert {what for what, path in paths.items() if path.exists()} == {"of a living writer", "result"}


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(st.text(max_size=4), st.integers(), min_size=1, max_size=4))
def test_digests_follow_content_not_order(value):
    assert digest(value) == digest(dict(reversed(value.items())))
    changed = {**value, next(iter(value)): value[next(iter(value))] + 1}
    assert digest(value) != digest(changed)


@pytest.mark.parametrize(
    "damage", ["", "{", '{"schema": 1}', "[]", '{"schema": 1, "key": "other", "status": "done", "value": {}}']
)
def test_a_damaged_result_counts_as_missing(tmp_path, damage):
    store = Store(tmp_path)
    store.put("kind", "name", "key", spec={}, value={"x": 1}, config={}, provenance={})
    assert store.get("kind", "name", "key")["value"] == {"x": 1}
    store.path("kind", "name", "key").write_text(damage)
    assert store.get("kind", "name", "key") is None


def test_a_lock_dies_with_its_owner(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    owner = context.Process(target=hold, args=(tmp_path / "lock", held), daemon=True)
    owner.start()
    assert held.wait(30)
    os.kill(owner.pid, signal.SIGKILL)
    started = time.monotonic()
    with locked(tmp_path / "lock"):
        assert time.monotonic() - started < 10


# The pool.


class Silent:
    def __init__(self):
        self.begun, self.reports = [], []

    def started(self, task):
        self.begun.append(task.name)

    def progressed(self, task, fraction, note):
        self.reports.append((task.name, fraction, note))

    def put_off(self, task):
        self.reports.append((task.name, None))

    def ended(self, task, outcome): ...


def test_a_failing_and_a_killed_task_take_only_what_builds_on_them(tmp_path):
    log, watcher = tmp_path / "log", Silent()
    tasks = [
        Task("fails", fail),
        Task("refuses", refuse),
        Task("dies", die),
        Task("child", note, (log, "child"), after=("dies",)),
        Task("grandchild", note, (log, "grandchild"), after=("child",)),
        Task("first", note, (log, "first"), rank=1),
        Task("second", note, (log, "second"), after=("first", "not among these")),
    ]
    outcomes = {outcome.name: outcome for outcome in run_tasks(tasks, TWO, watcher)}
    status = {name: outcome.status for name, outcome in outcomes.items()}
    failed = dict.fromkeys(("fails", "refuses", "dies"), "failed")
    assert status == {
        **failed, "child": "skipped", "grandchild": "skipped", "first": "done", "second": "done",
    }  # fmt: skip
    assert log.read_text().split() == ["first", "second"]
    assert "ValueError: no good" in outcomes["fails"].error and "Traceback" in outcomes["fails"].detail
    assert (outcomes["refuses"].error, outcomes["refuses"].detail) == ("do this instead", "")
    assert [name for name, outcome in outcomes.items() if outcome.refused] == ["refuses"]
    assert "-9" in outcomes["dies"].error
    assert ("first", 0.5, "half way") in watcher.reports


def test_kept_workers_serve_pool_after_pool_and_are_gone_afterwards(tmp_path):
    path, (slot, other) = tmp_path / "numbers", ({"QTALE_SLOT": "a"}, {"QTALE_SLOT": "b"})
    noted = Task("it", note_process, (path,))

    def once(slot: dict[str, str], task: Task = noted) -> str:
        (outcome,) = run_tasks([task], [slot], PlainWatcher([task], 1))
        return outcome.status

    with workers_kept():
        assert [once(slot), once(slot), once(other), once(slot, Task("it", die)), once(slot)] == [
            "done", "done", "done", "failed", "done",
        ]  # fmt: skip
    assert once(slot) == "done"
    numbers = path.read_text().split()
    assert numbers[0] == numbers[1] and len(set(numbers)) == 4
    assert not any(psutil.pid_exists(int(number)) for number in numbers)


def test_the_longest_ready_task_goes_first(tmp_path):
    watcher = Silent()
    tasks = [
        Task(name, note, (tmp_path / "log", name), cost=cost, rank=rank)
        for name, cost, rank in (("short", 1, 1), ("long", 9, 1), ("middle", 5, 1), ("now", 1, 0))
    ]
    run_tasks(tasks, TWO[:1], watcher)
    assert watcher.begun == ["now", "long", "middle", "short"]


def test_a_task_that_another_process_is_at_comes_last_and_is_done_when_that_is_over(tmp_path):
    context, log, watcher = multiprocessing.get_context("spawn"), tmp_path / "log", Silent()
    held = context.Event()
    other = context.Process(target=hold_until_noted, args=(tmp_path / "lock", held, log, "c"), daemon=True)
    other.start()
    assert held.wait(30)
    tasks = [
        Task("held", note_if_free, (tmp_path / "lock", log, "held"), cost=9),
        Task("child", note, (log, "child"), after=("held",), cost=8),
        *(Task(name, note, (log, name)) for name in "abc"),
    ]
    outcomes = run_tasks(tasks, TWO[:1], watcher)
    assert [outcome.status for outcome in outcomes] == ["done"] * 5
    assert log.read_text().split() == ["a", "b", "c", "held", "child"]
    assert watcher.begun[:4] == ["held", "a", "b", "c"] and ("held", None) in watcher.reports
    assert watcher.begun[-2:] == ["held", "child"]


def test_workers_are_as_many_as_cores_tasks_and_memory_allow(monkeypatch):
    def on(*gpus: Gpu) -> None:
        monkeypatch.setattr(pool.machine, "look", lambda: Machine(gpus, 2**34, 10 * 2**30, 8))

    on()
    assert [len(pool.worker_slots(tasks, 1.5 * 2**30)) for tasks in (1, 3, 99)] == [1, 3, 6]
    assert len(pool.worker_slots(99)) == 8 and len(pool.worker_slots(99, 11 * 2**30)) == 1
    assert pool.worker_slots(1)[0]["OMP_NUM_THREADS"] == "1"
    on(Gpu("0", "A", 2**36, 40 * 2**30), Gpu("3", "B", 2**36, 20 * 2**30))
    assert pool.worker_slots(99, 2**34) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "3"}]
    shared = [slot["CUDA_VISIBLE_DEVICES"] for slot in pool.worker_slots(99, 2**30, small=True)]
    assert shared == ["0", "3"] * 4  # 8 cores for two GPUs
    assert len(pool.worker_slots(5, 2**30, small=True)) == 5
    on(Gpu("0", "A", 2**36, 4 * 2**30))
    assert len(pool.worker_slots(99, 2**31, small=True)) == 2  # what its memory allows


def test_a_worker_has_as_many_gpus_or_cores_as_a_fine_tuning_has_processes(monkeypatch):
    def on(*gpus: Gpu) -> None:
        monkeypatch.setattr(pool.machine, "look", lambda: Machine(gpus, 2**34, 100 * 2**30, 8))

    on()
    assert len(pool.worker_slots(99, 2**30, processes=3)) == 2
    on(*(Gpu(name, "A", 2**36, 2**35) for name in "01234"))
    groups = [slot["CUDA_VISIBLE_DEVICES"] for slot in pool.worker_slots(99, 2**20, processes=2)]
    assert groups == ["0,1", "2,3"]
    with pytest.raises(UserError, match="8 processes a fine-tuning, one GPU each, and 5 are visible"):
        pool.worker_slots(99, 2**20, processes=8)


def test_peak_memory_counts_from_the_start_of_the_work():
    watch = Stopwatch()
    before = watch.provenance()["peak_memory_bytes"]
    ballast = bytearray(64 * 2**20)
    grown = watch.provenance()["peak_memory_bytes"]
    assert grown - before > 48 * 2**20
    del ballast
    assert sys.platform != "linux" or Stopwatch().provenance()["peak_memory_bytes"] < grown - 32 * 2**20


# Which jobs a notebook needs.


def test_notebooks_need_what_they_show():
    chosen = profile(tasks=["arc_easy", "siqa", "alpaca"], bits=[16, 4, 3], seeds=2)
    everything = jobs.all_jobs(chosen)
    assert len(everything) == 3 * 3 * 2 * 4
    for number in ("00", "05", "06"):
        assert set(jobs.needs(chosen, number)) == set(everything)
    assert jobs.needs(chosen, "01_figure_4.ipynb") == []
    for number in ("02", "03", "04"):  # 03 and 04 draw ARC-easy alone, but judge by all CSQA tasks
        assert {(job.run.task, job.run.method, job.bits) for job in jobs.needs(chosen, number)} == {
            (task, method, None) for task in ("arc_easy", "siqa") for method in ("dllm", "qtale")
        }
    assert {job.bits for job in jobs.needs(chosen, "07")} == {None, 16, 4, 3}
    assert {job.run.method for job in jobs.needs(chosen, "07")} == {"dllm", "qtale"}


def test_a_sweep_adds_evaluations_of_routed_models_to_their_jobs_and_no_job():
    plain, swept = profile(), profile(theta_sweep=[0.5, 0.25, 1e-4])
    assert jobs.all_jobs(swept) == jobs.all_jobs(plain)
    assert jobs.rules(swept, "full") == jobs.rules(plain, "full") == ("none",)
    assert jobs.rules(swept, "qtale") == (*jobs.rules(plain, "qtale"), "0.25", "0.0001")  # 0.5 is arg max
    named = ("none", "argmax", "zero", "0.25", "0.0001")
    assert [jobs.fixed_theta(rule) for rule in named] == [None, 0.5, 0.0, 0.25, 1e-4]


def test_a_profile_without_the_papers_tasks_shows_what_it_has():
    chosen = profile(tasks=["alpaca", "mmlu"], bits=[3])
    for number in ("02", "03"):
        assert {job.run.task for job in jobs.needs(chosen, number)} == {"alpaca", "mmlu"}
    assert {job.bits for job in jobs.needs(chosen, "07")} == {None, 3}


# Keys.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def key(root: Path, base: Path, kind: str, spec: dict, **changes) -> str:
    """The key of a result, its fine-tuning and θ search taken as done."""
    lab = Lab(profile(base, **changes), root)
    lab.find = lambda kind, **spec: {"value": {"adapter_sha256": "a", "theta": 0.2}}
    return lab.address(kind, spec)[2]


FINETUNED = {"task": "arc_easy", "method": "qtale", "seed": 0}
EVALUATED = {**FINETUNED, "bits": 4, "theta": "searched"}


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"seeds": 3}, ""),
        ({"theta_sweep": [0.1]}, ""),
        ({"bits": [16, 4, 3]}, ""),
        ({"tasks": ["arc_easy", "siqa"]}, ""),
        ({"training": {"eval_batch_size": 5}}, ""),
        ({"training": {"lambda2": 0.25}}, "qtale"),
        ({"training": {"noise": "stream"}}, ""),
        ({"training": {"noise": "keyed"}}, "qtale dllm noisy"),
        ({"compute": {"processes": 2, "gradient_checkpointing": True, "sharding": "fsdp"}}, ""),
        ({"training": {"lambda1": 3}}, "qtale dllm"),
        ({"probes": {"samples": 3}}, "qtale dllm"),
        ({"routing": {"hidden": 4}}, "qtale dllm noisy"),
        ({"lora": {"r": 4}}, "qtale dllm full noisy"),
        ({"max_steps": 5}, "qtale dllm full noisy"),
        ({"limit": {"train": 20}}, "qtale dllm full noisy four"),
        ({"limit": {"test": 5}}, "four sixteen"),
        ({"group_size": 16}, "four threshold"),
        ({"quantization": {"method": "rtn"}}, "four threshold"),
        ({"calibration": {"tolerance": 0.3}}, "threshold"),
        ({"calibration": {"questions": 5}}, "threshold"),
    ],
)
def test_a_setting_changes_the_keys_of_what_depends_on_it(tmp_path, base, changes, changed):
    results = {
        "qtale": ("finetune", FINETUNED),
        "dllm": ("finetune", {**FINETUNED, "method": "dllm"}),
        "full": ("finetune", {**FINETUNED, "method": "full"}),
        "noisy": ("finetune", {**FINETUNED, "method": "noisy_full"}),
        "threshold": ("threshold", {**FINETUNED, "bits": 4}),
        "four": ("evaluation", EVALUATED),
        "sixteen": ("evaluation", {**EVALUATED, "bits": 16, "theta": "argmax"}),
    }
    if "four" in changed and "train" in str(changes):
        changed += " threshold"  # the quantizer's texts are training rows
    different = {
        name for name, (kind, spec) in results.items()
        if key(tmp_path, base, kind, spec) != key(tmp_path, base, kind, spec, **changes)
    }  # fmt: skip
    assert different == set(changed.split())


def test_another_base_changes_every_key(tmp_path, base):
    other = save_base(tmp_path / "other", seed=1)
    for kind, spec in (("finetune", FINETUNED), ("evaluation", EVALUATED)):
        assert key(tmp_path, base, kind, spec) != key(tmp_path, other, kind, spec)


def test_a_searched_theta_is_part_of_the_key(tmp_path, base):
    keys = set()
    for theta in (0.2, 0.3):
        lab = Lab(profile(base), tmp_path)
        lab.find = lambda kind, theta=theta, **spec: {"value": {"adapter_sha256": "a", "theta": theta}}
        keys.add(lab.address("evaluation", EVALUATED)[2])
    assert len(keys) == 2


def test_reading_what_is_missing_says_what_to_run(tmp_path, base):
    lab = Lab(profile(base), tmp_path)
    with pytest.raises(UserError, match="python -m qtale_lib run --profile smoke"):
        lab.result("evaluation", **EVALUATED)
    assert lab.evaluations().empty and lab.finetunes().empty and lab.thresholds().empty


def test_base_facts_are_those_of_the_files(tmp_path, base):
    facts = Lab(profile(base), tmp_path).base()
    model = llama(facts["config"]["vocab_size"])
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["decoder"] == sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("size", [1, 2, 16, 32, -1])
def test_a_group_size_that_divides_every_layer_is_taken(tmp_path, base, size):
    lab = Lab(profile(base, group_size=size), tmp_path)
    check(lab, jobs.all_jobs(lab.profile))


def test_another_group_size_is_refused_before_any_work(tmp_path, base):
    lab = Lab(profile(base, group_size=24), tmp_path)
    with pytest.raises(
        UserError, match=r"group_size \(= 24\) does not divide the 32 columns .* divisor of 32"
    ):
        lab.compute(jobs.all_jobs(lab.profile))
    assert not (lab.store.root / "finetune").exists()


def test_reading_needs_no_torch():
    code = "import sys, qtale_lib.lab, qtale_lib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=lab_module.ROOT, check=False).returncode == 0


def test_a_seed_is_finished_before_the_next_is_begun(tmp_path, base):
    lab = Lab(profile(base, tasks=["arc_easy", "alpaca"], methods=["full", "qtale"], seeds=[3, 1]), tmp_path)
    ranks = {seed: [] for seed in lab.profile.seeds}
    for job in jobs.all_jobs(lab.profile):
        ranks[job.run.seed].append(lab.task(job).rank)
    assert max(ranks[3]) < min(ranks[1]) and len(set(ranks[3])) == 2


# Everything together, on a model of four layers.


@pytest.fixture(scope="module")
def computed(tmp_path_factory, base) -> Lab:
    lab = Lab(
        profile(base, tasks=["arc_easy"], methods=["full", "qtale"]), tmp_path_factory.mktemp("results")
    )
    assert [o for o in lab.compute(jobs.all_jobs(lab.profile)) if o.status != "done"] == []
    return lab


@pytest.fixture
def in_process(monkeypatch):
    """No worker processes: they would import torch anew."""
    monkeypatch.setattr(lab_module, "run_tasks", run_here)


def anew(lab: Lab, **changes) -> Lab:
    """The same store, read from the disk again."""
    return Lab(lab.profile.model_copy(update=changes), lab.directory.parent)


def times(lab: Lab) -> dict[str, int]:
    """Of the results; what lies in the store's own folder are hashes, kept."""
    return {path.name: path.stat().st_mtime_ns for path in lab.store.root.rglob("*/*.json")}


def test_every_result_is_there_with_its_provenance(computed):
    lab = anew(computed)
    frame = lab.evaluations()
    rules = {(row.method, row.bits, row.theta_rule) for row in frame.itertuples()}
    assert rules == {(m, b, r) for m in ("full", "qtale") for b in (16, 4) for r in jobs.RULES[m]}
    assert (frame["count"] == 10).all() and frame.acc.between(0, 1).all()
    zero = frame[(frame.method == "qtale") & (frame.theta_rule == "zero")]
    assert (zero.execution_ratio == 1).all() and (zero.theta == 0).all()
    searched = frame[frame.theta_rule == "searched"].set_index("bits").theta
    assert searched.equals(lab.thresholds().set_index("bits").theta)
    for spec in jobs.evaluation_specs(lab.profile, Run("arc_easy", "qtale", 0)):
        provenance = lab.result("evaluation", **spec)["provenance"]
        trained = lab.result("finetune", **FINETUNED)
        assert provenance["made_from"]["adapter"] == trained["value"]["adapter_sha256"]
        assert provenance["base_hash"] == lab.base()["sha256"]
        assert provenance["threads"] == 1 and provenance["seconds"] > 0
        assert (
            provenance["peak_memory_bytes"] > 2**26
            and provenance["device"]
            and provenance["versions"]["torch"]
        )
    assert [probe["epoch"] for probe in lab.probes("arc_easy", "qtale", 0)][:2] == [0, 1]


def test_a_second_time_nothing_is_computed(computed):
    before = times(computed)
    assert anew(computed).compute(jobs.all_jobs(computed.profile)) == []
    assert times(computed) == before


def test_a_lost_and_a_cut_off_result_are_computed_again_and_nothing_else(computed, in_process):
    before = times(computed)
    lab = anew(computed)
    lost = lab.store.path(*lab.address("evaluation", {**EVALUATED, "theta": "zero"}))
    cut = lab.store.path(*lab.address("threshold", {**FINETUNED, "bits": 16}))
    values = [json.loads(path.read_text())["value"] for path in (lost, cut)]
    lost.unlink()
    cut.write_text(cut.read_text()[:50])
    outcomes = anew(computed).compute(jobs.all_jobs(computed.profile))
    assert {outcome.name for outcome in outcomes} == {
        f"evaluate arc_easy.qtale.s0 at {b} bit" for b in (16, 4)
    }
    after = times(computed)
    assert {name for name in after if after[name] != before.get(name)} == {lost.name, cut.name}
    assert [json.loads(path.read_text())["value"] for path in (lost, cut)] == values


def test_what_is_forgotten_is_computed_again_and_nothing_else(computed, in_process, tmp_path):
    shutil.copytree(computed.directory, tmp_path / computed.profile.name)
    lab = Lab(computed.profile, tmp_path)

    def there() -> set[tuple[str, str]]:
        return {(path.parent.name, path.name.split("-")[0]) for path in lab.store.root.glob("*/*.*-*")}

    before = there()
    lab.forget([Job(Run("arc_easy", "qtale", 0), 4)])
    name = "arc_easy.qtale.s0.b4"
    evaluations = {("evaluation", f"{name}.{rule}") for rule in jobs.RULES["qtale"]}
    assert before - there() == {("quantization", name), ("threshold", name), *evaluations}
    outcomes = lab.compute(jobs.all_jobs(lab.profile))
    assert [outcome.name for outcome in outcomes] == ["evaluate arc_easy.qtale.s0 at 4 bit"]
    assert there() == before


def test_noisy_full_runs_every_layer_where_it_is_quantized_and_evaluated(
    tmp_path, base, in_process, monkeypatch
):
    thetas = []

    def quantize(model, *arguments, **settings):
        thetas.append(routing_state(model).theta)
        return original(model, *arguments, **settings)

    original = stages.quantize
    monkeypatch.setattr(stages, "quantize", quantize)
    lab = Lab(profile(base, tasks=["arc_easy"], methods=["noisy_full"], bits=[4]), tmp_path)
    assert {outcome.status for outcome in lab.compute(jobs.all_jobs(lab.profile))} == {"done"}
    (row,) = lab.evaluations().itertuples()
    assert thetas == [0.0] and (row.theta_rule, row.theta, row.execution_ratio) == ("zero", 0.0, 1.0)
    assert lab.thresholds().empty and lab.probes("arc_easy", "noisy_full", 0) == []


def test_a_further_seed_computes_only_itself(computed, in_process):
    lab = anew(computed, seeds=(0, 1), methods=("full",), bits=(16,))
    outcomes = lab.compute(jobs.all_jobs(lab.profile))
    names = ["fine-tune arc_easy.full.s1", "evaluate arc_easy.full.s1 at 16 bit"]
    assert [outcome.name for outcome in outcomes] == names


def test_what_fails_is_named_and_the_rest_is_computed(tmp_path, base, in_process, monkeypatch, capsys):
    # 18 tokens hold an Alpaca row but for its end of text, which the preflight does not count
    settings = profile(base, tasks=["arc_easy", "alpaca"], methods=["full"], bits=[16], max_length=18)
    outcomes = {o.name: o for o in Lab(settings, tmp_path).compute(jobs.all_jobs(settings))}
    bad = outcomes["fine-tune alpaca.full.s0"]
    assert bad.status == "failed" and "No training row of alpaca fits" in bad.error
    assert outcomes["evaluate alpaca.full.s0 at 16 bit"].status == "skipped"
    assert outcomes["evaluate arc_easy.full.s0 at 16 bit"].status == "done"
    with pytest.raises(UserError, match=r"results of notebook 05 failed.*No training row"):
        Lab(settings, tmp_path).ensure("05")
    monkeypatch.setenv("QTALE_READ_ONLY", "1")
    Lab(settings, tmp_path).ensure("05")
    assert "2 of 4 jobs failed and are left out: fine-tune alpaca.full.s0" in capsys.readouterr().out


def test_two_processes_share_the_jobs_of_one_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    names = "abcdefgh"
    both = [context.Process(target=take_part, args=(tmp_path, names, who)) for who in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    done = [(tmp_path / name).read_text().split() for name in names]
    assert all(len(by) == 1 for by in done)  # once each
    assert min(done.count(["one"]), done.count(["two"])) >= 2


def test_two_processes_compute_a_result_once(tmp_path, base):
    context = multiprocessing.get_context("spawn")
    arguments = (profile(base), tmp_path, tmp_path / "count")
    both = [context.Process(target=compute_slowly, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "x"


def test_a_run_killed_in_the_middle_goes_on_with_the_next_missing_result(tmp_path, base):
    settings = profile(base, tasks=["arc_easy"], methods=["full"], bits=[16])
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=compute_everything, args=(settings, tmp_path))
    process.start()
    lab = Lab(settings, tmp_path)
    trained = lab.store.root / "finetune"
    deadline = time.monotonic() + 120
    while not list(trained.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert lab.is_done(Job(Run("arc_easy", "full", 0)))
    before = times(lab)
    outcomes = Lab(settings, tmp_path).compute(jobs.all_jobs(settings))
    assert all(outcome.name.startswith("evaluate") and outcome.status == "done" for outcome in outcomes)
    assert Lab(settings, tmp_path).is_done(Job(Run("arc_easy", "full", 0), 16))
    assert {name: when for name, when in times(lab).items() if name in before} == before
