"""A batch split over micro-batches, or over processes, trains as a whole one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spread_run import train, train_spread

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
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n} {m}")
    for entry, other_entry in zip(history, other_history, strict=True):
        assert entry.keys() == other_entry.keys()
        for key in entry.keys() - {"probe"}:
            assert other_entry[key] == pytest.approx(entry[key], abs=atol), key
        if "probe" in entry:
            assert other_entry["probe"]["gap"][2:] == pytest.approx(entry["probe"]["gap"][2:], abs=1e-4)


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> Path:
    """What two processes make of every kind: a batch halved; its micro-batches halved and layers run twice."""
    directory = tmp_path_factory.mktemp("spread")
    train_spread(
        [
            spread_case
            for kind in KINDS
            for spread_case in (
                case("two", *kind, 8, 1, **TWO),
                case("accumulating", *kind, 2, 4, compute={"processes": 2, "gradient_checkpointing": True}),
            )
        ],
        directory,
    )
    return directory


@pytest.mark.parametrize(("method", "kind"), KINDS)
def test_however_a_batch_is_split_training_is_the_same(tmp_path, spread, method, kind):
    whole = case("whole", method, kind, 8, 1)
    train(**whole, directory=tmp_path)
    for other in (case("parts", method, kind, 4, 2), case("again", method, kind, 8, 1, **CHECKPOINTED)):
        train(**other, directory=tmp_path)
        assert_close(outcome(tmp_path, whole["name"]), outcome(tmp_path, other["name"]))
    for name in ("two", "accumulating"):
        assert_close(outcome(tmp_path, whole["name"]), outcome(spread, f"{name}-{method}-{kind}"))
