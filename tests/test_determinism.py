"""A seed gives one set of weights, routes, tables and figures: whatever the order, the workers, the batches.

Bit for bit where the same sums are taken. Where a batch of evaluation or a number of threads takes them in
another order: numbers to TOLERANCE, and the same decisions, answers and θ. docs/promises.md tells users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from kill_run import everything, unmeasured
from pool_work import run_here
from small_run import profile, save_base

from qtale_lib import (
    ablation_tables,
    efficiency_tables,
    jobs,
    layer_tables,
    pool,
    results,
    tables,
    token_tables,
    win_rates,
)
from qtale_lib import lab as lab_module
from qtale_lib.config import Profile
from qtale_lib.jobs import Job
from qtale_lib.lab import Lab
from qtale_lib.measurements import Measurements
from qtale_lib.pool import Outcome, Task, Watcher
from qtale_lib.store import read_json

TOLERANCE = 1e-4  # nats, logits and means of them, absolute or as a share
QUANTIZED_TOLERANCE = 0.02  # of nats below 16 bits, as a share, where a search may end a step beside
DECIDED = {"theta", "execution_ratio", "loss_ratio", "ratio", "flip", "acc", "executed"}
TABLES = (
    layer_tables.lowest_table, layer_tables.unevenness_table, layer_tables.gaps_table,
    layer_tables.flips_table, results.accuracy_table, results.changes_table,
    efficiency_tables.efficiency_table, ablation_tables.ablation_table, token_tables.worth_table,
    win_rates.win_table,
)  # fmt: skip
FRAMES: dict[str, Callable[[Measurements], pd.DataFrame]] = {  # each figure is drawn from its CSV alone
    "figure_2": lambda store: store.ratios_by_layer("qtale"),
    "figure_3": lambda store: store.lowest_by_epoch("dllm"),
    "figure_5": lambda store: store.histograms("dllm"),
    "figure_6": lambda store: store.histograms("qtale"),
    "figure_7": lambda store: store.lowest_by_epoch("dllm", "qtale"),
    "figure_12_skipping": token_tables.frame,
    "table_4_theta_curves": Measurements.theta_curves,
}

Runner = Callable[[Sequence[Task], Sequence[dict[str, str]], Watcher], list[Outcome]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def settings(base: Path, **changes: Any) -> Profile:
    grid = {"tasks": ["arc_easy", "alpaca"], "methods": ["dllm", "qtale"], "bits": [16, 4]}
    return profile(base, **grid, generation={"summaries": False}, **changes)


def computed(chosen: Profile, root: Path, runner: Runner = run_here) -> Lab:
    """Every result of a profile, with the tables and the figures' data."""
    lab = Lab(chosen, root)
    compute(lab, jobs.wanted_by(chosen, ("05", "12")), runner)
    store = Measurements(lab)
    for table in TABLES:
        tables.save(table(store), lab.tables)
    for name, frame in FRAMES.items():
        frame(store).to_csv(lab.tables / f"{name}_data.csv", index=False)
    return lab


def compute(lab: Lab, wanted: Sequence[Job], runner: Runner) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab_module, "run_tasks", runner)
        outcomes = lab.compute(wanted)
    assert {outcome.status for outcome in outcomes} == {"done"}, outcomes


@pytest.fixture(scope="module")
def plain(tmp_path_factory, base) -> Lab:
    """One after the other in this process, with one thread."""
    return computed(settings(base), tmp_path_factory.mktemp("plain"))


def backwards(tasks: Sequence[Task], slots: Sequence[dict[str, str]], watcher: Watcher) -> list[Outcome]:
    """One after the other in this process: of those that are ready, always the last."""
    left, ordered = list(tasks), []
    while left:
        waiting = {task.name for task in left}
        ordered.append([task for task in left if not waiting & set(task.after)][-1])
        left.remove(ordered[-1])
    assert [task.name for task in ordered] != [task.name for task in tasks]
    return run_here(ordered, slots, watcher)


def two_workers(tasks: Sequence[Task], slots: Sequence[dict[str, str]], watcher: Watcher) -> list[Outcome]:
    """In two processes that share the tasks out as they come."""
    return pool.run_tasks(tasks, slots[:1] * 2, watcher)


@pytest.mark.parametrize("runner", [backwards, two_workers])
def test_a_seed_gives_the_same_bytes_in_any_order_on_any_number_of_workers(plain, base, tmp_path, runner):
    other = computed(settings(base), tmp_path, runner)
    expected, found = everything(plain.directory), everything(other.directory)
    assert {Path(name).suffix for name in expected} == {".safetensors", ".json", ".md", ".csv", ".tex"}
    assert [name for name in expected.keys() | found if expected.get(name) != found.get(name)] == []


def test_another_seed_gives_other_weights(plain, base, tmp_path):
    other = Lab(settings(base, seeds=[1]), tmp_path)
    compute(other, [Job(run) for run in jobs.runs(other.profile)], run_here)
    digests = [set(lab.finetunes().adapter_sha256) for lab in (plain, other)]
    assert [len(each) for each in digests] == [4, 4] and not digests[0] & digests[1]


# Where sums are taken in another order.


def values(lab: Lab) -> dict[str, Any]:
    """Every result's value, without what is measured, by kind and name."""
    found = (read_json(path) for path in sorted(lab.store.root.glob("*/*.json")))
    return {f"{each['kind']} {lab_module.address_of(each)[1]}": unmeasured(each["value"]) for each in found}


def leaves(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number and text of a JSON value, with the way to it."""
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if inner is None:
        yield where, value
        return
    for name, item in inner:
        yield from leaves(item, (*where, name))


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Numbers with a fraction to TOLERANCE; all else, and what follows from decisions alone, equal."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    assert ours.keys() == theirs.keys() and len(ours) > 1000
    for where, value in ours.items():
        exact = not isinstance(value, float) or DECIDED & set(where)
        assert theirs[where] == (value if exact else pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE)), (
            where
        )


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_another_batch_of_evaluation_decides_the_same_from_the_same_weights(plain, base, tmp_path, size):
    other = computed(settings(base, training={"eval_batch_size": size}), tmp_path)
    ours, theirs = everything(plain.directory), everything(other.directory)
    assert ours.keys() == theirs.keys()  # keys of results among them
    weights = [name for name in ours if name.endswith(".safetensors")]
    assert len(weights) > 8 and all(ours[name] == theirs[name] for name in weights)
    assert_close(values(plain), values(other))


def test_more_threads_decide_the_same_in_16_bits_and_stay_near_in_fewer(plain, base, tmp_path):
    """Weights that differ in their last bits may be given another step of a quantizer's search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 3)
    try:
        other = computed(settings(base), tmp_path)
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (values(lab) for lab in (plain, other))
    assert ours.keys() == theirs.keys()
    for found in (ours, theirs):
        for name in [name for name in found if name.startswith("finetune ")]:
            del found[name]["adapter_sha256"]
    whole = [name for name in ours if ".b4" not in name]
    assert_close(*({name: found[name] for name in whole} for found in (ours, theirs)))
    scored = [name for name in ours if name.startswith("evaluation ") and name not in whole]
    assert len(scored) == 12
    for name in scored:
        assert theirs[name]["nll"] == pytest.approx(ours[name]["nll"], rel=QUANTIZED_TOLERANCE), name
        assert theirs[name]["execution_ratio"] == pytest.approx(ours[name]["execution_ratio"], abs=0.01), name
