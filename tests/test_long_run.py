"""A store of thousands of results: memory and the time of a look stay as they were with few."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from pathlib import Path

import pytest
from small_run import profile, save_base

from qtale_lib import lab as lab_module
from qtale_lib import status
from qtale_lib.jobs import all_jobs, evaluation_specs, rules, runs
from qtale_lib.lab import Lab, run_spec
from qtale_lib.log import logged
from qtale_lib.store import Store

MANY, BATCH = 2000, 200
ANSWERS = [0, 1] * 500


def filled(lab: Lab, many: int) -> list[float]:
    """Put so many evaluations, and what they build on, into the store; seconds of each of their looks-up."""
    seconds, put = [], 0
    for run in runs(lab.profile):
        trained = {"adapter_sha256": run.name, "theta": 0.2}
        for kind, spec in (("finetune", run_spec(run)), ("threshold", run_spec(run, bits=16))):
            lab.store.put(*lab.address(kind, spec), spec=spec, value=trained, provenance=PROVENANCE)
        for spec in evaluation_specs(lab.profile, run):
            value = {"acc": 0.5, "correct": ANSWERS}
            lab.store.put(*lab.address("evaluation", spec), spec=spec, value=value, provenance=PROVENANCE)
            started = time.perf_counter()
            assert lab.find("evaluation", **spec)
            seconds.append(time.perf_counter() - started)
            put += 1
            if put == many:
                return seconds
    raise AssertionError("too small a grid")


PROVENANCE = {"seconds": 1.0, "finished_at": "now"}


@pytest.fixture
def lab(tmp_path) -> Lab:
    base = save_base(tmp_path / "base")
    sweep = [round(0.001 * step, 3) for step in range(1, 400)]
    wide = profile(base, tasks=["arc_easy"], methods=["qtale"], bits=[16], seeds=6, theta_sweep=sweep)
    return Lab(wide, tmp_path / "results")


def test_looks_take_as_long_and_memory_stays_with_thousands_of_results(lab: Lab):
    filled(lab, 10)  # what is read once
    tracemalloc.start()
    try:
        filled(lab, BATCH)
        few = tracemalloc.get_traced_memory()[0]
        seconds = filled(lab, MANY)
        many = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert many - few < 2 * 2**20, many - few  # 2,000 results have some 10 MiB
    first, last = (statistics.median(part) for part in (seconds[:BATCH], seconds[-BATCH:]))
    assert last < 5 * first, (first, last)


def test_a_status_reads_the_heads_of_results_only(lab: Lab, monkeypatch):
    filled(lab, MANY)
    whole: list[Path] = []
    again = Lab(lab.profile, lab.directory.parent)
    original = lab_module.Store.get
    monkeypatch.setattr(
        lab_module.Store, "get", lambda self, *address: whole.append(address[0]) or original(self, *address)
    )
    with logged(again.directory) as log:
        for percent in range(100):
            for job in all_jobs(again.profile):
                log.write("at", job.name, f"{percent} %, epoch 1.0 of 10, loss 1.0, R 0.6, 0.61 GiB")
    started = time.process_time()
    lines = status.describe([again])
    assert time.process_time() - started < 3  # about 1
    whole_runs = MANY // len(rules(lab.profile, "qtale"))
    # the evaluations of a run make one job; a fine-tuning is more
    assert lines[:2] == [
        f"fine-tunings         {whole_runs + 1} of 6",
        f"results at 16 bit    {whole_runs} of 6",
    ]
    assert "evaluation" not in whole


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: "", lambda text: text[50:]])
def test_a_result_that_is_cut_off_does_not_even_seem_done(tmp_path, damage):
    store = Store(tmp_path)
    assert not store.has("finetune", "n", "k")
    store.put("finetune", "n", "k", spec={}, value={"x": [1] * 99}, provenance={})
    assert store.has("finetune", "n", "k") and not store.has("finetune", "n", "other")
    path = store.path("finetune", "n", "k")
    path.write_text(damage(path.read_text()))
    assert not store.has("finetune", "n", "k")
