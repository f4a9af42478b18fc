"""A fine-tuning on two processes is the one on one, and so are accumulation and checkpointed activations."""

from __future__ import annotations

import multiprocessing
import subprocess
import time
from pathlib import Path

import pytest
import torch
from distributed_work import finetune
from safetensors.torch import load_file
from small_run import profile, rows, save_base
from test_training import Gradients, trained

from qtale_lib import stages
from qtale_lib.data.encoding import collate
from qtale_lib.errors import UserError
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab, run_spec
from qtale_lib.losses import rate_loss, share_of_mean_rate
from qtale_lib.routed_layers import NoiseKey
from qtale_lib.training import share_of_batch, trainer_arguments

KEYED = {"gate_noise": "keyed", "rate_target": 0.85}  # some tokens lie above it, some below
RUN = Run("arc_easy", "qtale", 0)


# Noise that follows from the row.


def test_a_rows_noise_is_its_own_wherever_it_lies():
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    noise = NoiseKey(3, 7, [10, 4]).draw(6, valid)
    assert noise.shape == (6, 2, 5, 2) and (noise[:, ~valid] == 0).all()
    alone = NoiseKey(3, 7, [4]).draw(6, torch.ones(1, 5, dtype=torch.bool))
    assert torch.equal(alone[:, 0], noise[:, 1])
    padded = NoiseKey(3, 7, [4, 10]).draw(6, torch.nn.functional.pad(valid.flip(0), (0, 3)))
    assert torch.equal(padded[:, 0, :5], noise[:, 1]) and torch.equal(padded[:, 1, :3], noise[:, 0, :3])


@pytest.mark.parametrize("other", [NoiseKey(4, 7, [1]), NoiseKey(3, 8, [1]), NoiseKey(3, 7, [2])])
def test_seed_step_and_row_each_change_it(other):
    valid = torch.ones(1, 5, dtype=torch.bool)
    assert not torch.isclose(NoiseKey(3, 7, [1]).draw(6, valid), other.draw(6, valid)).any()


def test_it_is_gumbels():
    noise = NoiseKey(0, 0, list(range(50))).draw(8, torch.ones(50, 40, dtype=torch.bool))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)  # standard error 0.007
    assert noise.var().item() == pytest.approx(1.645, abs=0.1)


# The batch and its loss.


@pytest.mark.parametrize(
    ("recipe", "processes", "share"),
    [((8, 1), 2, (4, 1)), ((1, 8), 4, (1, 2)), ((2, 6), 3, (2, 2)), ((3, 1), 1, (3, 1))],
)
def test_processes_share_the_recipes_batch(recipe, processes, share):
    batch = {"batch_size": recipe[0], "gradient_accumulation": recipe[1], **KEYED}
    assert share_of_batch(profile(training=batch, compute={"processes": processes})) == share


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"training": {"batch_size": 4, **KEYED}, "compute": {"processes": 3}},
            "divides neither batch_size 4",
        ),
        ({"compute": {"processes": 2}}, 'gate_noise .= "?stream"?. must be "keyed"'),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(changes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        trainer_arguments(profile(**changes), 0, 24, tmp_path)


def test_shares_of_the_mean_rate_add_up_to_it_and_so_do_their_gradients():
    gates = torch.rand(4, 6, 9, dtype=torch.float64, requires_grad=True)
    counted = torch.rand(6, 9) < 0.7
    whole = rate_loss(gates, counted, 0.45, "mean")
    (expected,) = torch.autograd.grad(whole, gates)
    rate, tokens = gates.detach().mean(0)[counted].mean(), counted.sum()
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    shares = [share_of_mean_rate(gates[:, part], counted[part], 0.45, rate, tokens) for part in parts]
    (found,) = torch.autograd.grad(sum(shares), gates)
    torch.testing.assert_close(sum(shares), whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rate_loss", ["per_token", "mean"])
@pytest.mark.parametrize("method", ["dllm", "qtale"])
def test_accumulated_steps_are_those_of_the_whole_batch_with_noise_too(tmp_path, method, rate_loss):
    taken = []
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        seen = Gradients()
        recipe = {"batch_size": batch_size, "gradient_accumulation": accumulation, "lambda1": 50.0}
        recipe |= {"rate_loss": rate_loss, "lr": 0.003, "router_lr": 0.03, **KEYED}
        trained(tmp_path, method, rows(16), [seen], max_steps=4, training=recipe).train()
        taken.append(seen.steps)
    for whole, *others in zip(*taken, strict=True):
        for name, gradient in whole.items():
            for other in others:
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_mean_rate_is_found_before_training_without_using_up_random_numbers(tmp_path):
    """Gates' noise as it comes, and dropout: the same passes are made in training afterwards."""
    recipe = {"batch_size": 2, "gradient_accumulation": 2, "rate_loss": "mean"}
    trainer = trained(tmp_path, "qtale", training=recipe, lora={"dropout": 0.3})
    batches = [collate(rows(2, seed=seed)) for seed in (0, 1)]
    before = torch.get_rng_state()
    batches, counts = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    trainer.state.max_steps = 1
    for batch in batches:
        trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=counts)
    assert float(counts.rate) == pytest.approx(float(trainer._sums["loss_ratio"]), abs=1e-6)


# Whole fine-tunings.


def finetuned(base: Path, root: Path, **changes) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and value of a run in the store."""
    recipe = {"batch_size": 8, "lr": 0.003, "router_lr": 0.03, **KEYED, **changes.pop("training", {})}
    settings = profile(base, max_steps=6, lora={"dropout": 0.0}, training=recipe, **changes)
    lab = Lab(settings, root)
    value = stages.finetune_run(lab, RUN, lambda share: None)["value"]
    files = sorted(lab.files("finetune", run_spec(RUN)).glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}, value


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for entry, other in zip(found[1]["history"], expected[1]["history"], strict=True):
        assert entry == pytest.approx(other, rel=1e-4, abs=1e-5)
    for probe, other in zip(found[1]["probes"], expected[1]["probes"], strict=True):
        assert probe["ratio"] == pytest.approx(other["ratio"], abs=1e-6)


@pytest.mark.parametrize("rate_loss", ["per_token", "mean"])
def test_checkpointed_activations_give_the_same_fine_tuning(base, tmp_path, rate_loss):
    training = {"rate_loss": rate_loss}
    whole = finetuned(base, tmp_path / "a", training=training)
    compute = {"gradient_checkpointing": True}
    assert_same(finetuned(base, tmp_path / "b", training=training, compute=compute), whole)


@pytest.mark.slow
@pytest.mark.parametrize(("rate_loss", "accumulation"), [("per_token", 1), ("mean", 2)])
def test_two_processes_give_the_fine_tuning_of_one(base, tmp_path, rate_loss, accumulation):
    training = {
        "rate_loss": rate_loss,
        "gradient_accumulation": accumulation,
        "batch_size": 8 // accumulation,
    }
    whole = finetuned(base, tmp_path / "one", training=training)
    several = finetuned(base, tmp_path / "two", training=training, compute={"processes": 2})
    assert_same(several, whole)
    left = {path.name for path in (tmp_path / "two").rglob("*") if path.is_file()}
    assert not left & {"order.json", "outcome.json", "stderr.txt"}


@pytest.mark.slow
def test_two_processes_killed_go_on_from_their_checkpoint(base, tmp_path):
    """Dropout differs by process: each has its own random numbers back."""
    changes = {"training": {"batch_size": 8, "save_steps": 2, **KEYED}, "compute": {"processes": 2}}
    settings = profile(base, max_steps=60, lora={"dropout": 0.1}, **changes)
    whole = finetune(settings, tmp_path / "whole", RUN)
    folder = tmp_path / "cut"
    process = multiprocessing.get_context("spawn").Process(target=finetune, args=(settings, folder, RUN))
    process.start()
    while not any(folder.rglob("digest.json")):
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    time.sleep(5)  # its processes die with it
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    assert not left.split()
    again = finetune(settings, folder, RUN)
    assert again["history"] == whole["history"] and again["adapter_sha256"] == whole["adapter_sha256"]


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_said_in_one_sentence(base, tmp_path):
    with pytest.raises(UserError, match="Training diverged at step"):
        finetuned(base, tmp_path, training={"lr": 1e30}, compute={"processes": 2})
    assert not list(tmp_path.rglob("stderr.txt"))
