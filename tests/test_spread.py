"""A batch split over micro-batches or processes trains as a whole one does; a base in shards, too."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import profile, save_base
from spread_run import finetune_into_store, train, train_spread

from qtale_lib import distributed
from qtale_lib.adaptive import load_routed
from qtale_lib.errors import UserError
from qtale_lib.jobs import Run
from qtale_lib.training import finetune

TWO = {"compute": {"processes": 2}}
CHECKPOINTED = {"compute": {"gradient_checkpointing": True}}
KINDS = [("full", "per_token"), *((m, k) for m in ("dllm", "qtale") for k in ("per_token", "mean"))]


def case(name: str, method: str, kind: str, batch_size: int, accumulation: int, **more) -> dict:
    recipe = {"rate_loss": kind, "batch_size": batch_size, "gradient_accumulation": accumulation}
    recipe |= more.pop("training", {})
    return {"name": f"{name}-{method}-{kind}", "method": method, "training": recipe, **more}


def outcome(directory: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return load_file(directory / f"{name}.safetensors"), json.loads((directory / f"{name}.json").read_text())


def assert_close(one, other, atol: float = 1e-5) -> None:
    (weights, history), (other_weights, other_history) = one, other
    assert weights.keys() == other_weights.keys() and len(history) == len(other_history)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            other_weights[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n} {m}"
        )
    for entry, other_entry in zip(history, other_history, strict=True):
        assert entry.keys() == other_entry.keys()
        for key in entry.keys() - {"probe"}:
            assert other_entry[key] == pytest.approx(entry[key], abs=atol), key
        if "probe" in entry:
            assert other_entry["probe"]["gap"][2:] == pytest.approx(entry["probe"]["gap"][2:], abs=1e-4)


SAVING = {"training": {"noise": "keyed", "batch_size": 8, "save_steps": 3}, "lora": {"dropout": 0.1}, **TWO}
RESUMED = [
    {"name": "uncut", "method": "qtale", **SAVING},
    {"name": "cut", "method": "qtale", "stop": 5, **SAVING},
    {"name": "cut", "method": "qtale", **SAVING},
]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    """What two processes make of every kind: a batch halved; micro-batches shared out, layers run twice."""
    directory = tmp_path_factory.mktemp("spread")
    train_spread(
        [
            spread_case
            for kind in KINDS
            for spread_case in (
                case("two", *kind, 8, 1, **TWO),
                case("accumulating", *kind, 2, 4, compute={"processes": 2, "gradient_checkpointing": True}),
            )
        ]
        + RESUMED,
        directory,
    )
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), KINDS)
def test_however_a_batch_is_split_training_is_the_same(tmp_path, spread, method, kind):
    whole = case("whole", method, kind, 8, 1)
    train(**whole, directory=tmp_path)
    for other in (case("parts", method, kind, 4, 2), case("again", method, kind, 8, 1, **CHECKPOINTED)):
        train(**other, directory=tmp_path)
        assert_close(outcome(tmp_path, whole["name"]), outcome(tmp_path, other["name"]))
    for name in ("two", "accumulating"):
        assert_close(outcome(tmp_path, whole["name"]), outcome(spread, f"{name}-{method}-{kind}"))


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_as_if_nothing_had_been(spread):
    """With dropout, so that each process needs its own generators back."""
    (weights, history), (cut, cut_history) = outcome(spread, "uncut"), outcome(spread, "cut")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in weights.items())
    assert_close((weights, history), (cut, cut_history))
    assert [entry["step"] for entry in cut_history if "ce" in entry] == list(range(1, 8))
    kept = spread / "cut" / "checkpoints" / "checkpoint-6"
    assert {"generators.json", "generators-1.json"} <= {path.name for path in kept.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_fine_tuning_in_two_processes_leaves_the_files_and_the_record_of_one(tmp_path, sharding):
    base = save_base(tmp_path / "base")
    recipe = {"noise": "keyed", "batch_size": 4, "gradient_accumulation": 2}
    settings = {"lora": {"dropout": 0.0}, "training": recipe, "methods": ["qtale"], "max_length": 40}
    compute = {"processes": 2, "gradient_checkpointing": True, "sharding": sharding}
    one = finetune(profile(base, **settings), "arc_easy", "qtale", 0, tmp_path / "one")
    reports = []
    spread_over = profile(base, compute=compute, **settings)
    asked = ("arc_easy", "qtale", 0, tmp_path / "two")
    two = distributed.finetune(spread_over, *asked, lambda *done: reports.append(done))
    assert one.keys() == two.keys() and reports[-1][0] == 1.0
    assert re.match(r"epoch 2.0 of 2, step 6 of 6, loss [\d.]+, R 0\.\d+, ", reports[-1][1])
    assert [one[key] for key in ("rows", "steps", "epochs", "trainable_parameters")] == [
        two[key] for key in ("rows", "steps", "epochs", "trainable_parameters")
    ]
    assert [entry["ce"] for entry in two["history"]] == pytest.approx(
        [e["ce"] for e in one["history"]], abs=1e-4
    )
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
    models = [load_routed(tmp_path / name) for name in ("one", "two")]  # and so of one base, by its sha256
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_processes_die_with_the_one_that_started_them_and_the_run_goes_on_afterwards(tmp_path):
    base = save_base(tmp_path / "base")
    training = {"batch_size": 8, "save_steps": 2, "noise": "keyed"}
    settings = profile(base, max_steps=60, lora={"dropout": 0.1}, training=training, **TWO)
    run, folder = Run("arc_easy", "qtale", 0), tmp_path / "cut"
    whole = finetune_into_store(settings, tmp_path / "whole", run)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=finetune_into_store, args=(settings, folder, run))
    process.start()
    while not any(folder.rglob("digest.json")):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    for _ in range(60):
        left = subprocess.run(
            ["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False
        ).stdout
        if not left.split():
            break
        time.sleep(1)
    assert not left.split()
    again = finetune_into_store(settings, folder, run)
    assert again["history"] == whole["history"] and again["adapter_sha256"] == whole["adapter_sha256"]


@pytest.mark.slow
def test_divergence_in_two_processes_is_told_once(tmp_path):
    base = save_base(tmp_path / "base")
    recipe = {"lr": 1e30, "warmup_fraction": 0.0, "save_steps": None}
    settings = profile(base, methods=["full"], max_length=40, training=recipe, **TWO)
    with pytest.raises(UserError, match=r"^Training diverged at step \d: .* in layer 0; lower training.lr"):
        distributed.finetune(settings, "arc_easy", "full", 0, tmp_path / "run", lambda *done: None)
    assert not (tmp_path / "run" / "processes").exists()


def test_what_processes_cannot_share_is_refused():
    for changes, complaint in (
        (
            {"compute": {"processes": 3}},
            "compute.processes .= 3. cannot share batch_size 8 × gradient_accumulation 1",
        ),
        ({"compute": {"sharding": "fsdp"}}, "compute.sharding .= .fsdp.. needs several processes"),
        ({"compute": {"processes": 2}, "training": {"noise": "stream"}}, "set training.noise: keyed"),
    ):
        with pytest.raises(UserError, match=complaint):
            profile(**{"training": {"noise": "keyed"}, **changes}).split_batch()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "shared"),
    [(8, 1, 1, (8, 1)), (8, 1, 8, (1, 1)), (1, 8, 8, (1, 1)), (2, 4, 2, (2, 2)), (4, 2, 4, (2, 1))],
)
def test_processes_share_micro_batches_first_and_rows_then(batch_size, accumulation, processes, shared):
    recipe = {"noise": "keyed", "batch_size": batch_size, "gradient_accumulation": accumulation}
    assert profile(training=recipe, compute={"processes": processes}).split_batch() == shared
    assert shared[0] * shared[1] * processes == batch_size * accumulation


@pytest.mark.parametrize(("method", "kind"), KINDS[1:])
def test_a_split_batch_and_layers_run_twice_train_as_a_whole_batch_does(tmp_path, method, kind):
    names = []
    for name, split, more in (("whole", (8, 1), {}), ("parts", (4, 2), CHECKPOINTED)):
        settings = case(name, method, kind, *split, **more)
        train(**settings, directory=tmp_path)
        names.append(settings["name"])
    assert_close(*(outcome(tmp_path, name) for name in names))
