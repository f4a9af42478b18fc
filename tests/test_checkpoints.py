"""Checkpoints: what they are made of, which one a restart takes, and that a restart changes nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_run import llama, profile, rows, save_base
from transformers import TrainerCallback

from qtale_lib import checkpoints, training
from qtale_lib.adaptive import record_routes
from qtale_lib.checkpoints import last_complete, load_generators, save_generators
from qtale_lib.data import load_task
from qtale_lib.data.encoding import collate
from qtale_lib.probes import ProbeCallback
from qtale_lib.training import finetune, make_trainer, prepare_model

STEPS = 9  # three epochs of three


class Tokenizer:
    pad_token_id = 0


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


class Draw(TrainerCallback):
    """Uses every generator in every step, as training itself leaves Python's and numpy's alone."""

    def on_step_begin(self, args, state, control, **_):
        drawn = [random.random(), random.gauss(), np.random.rand(), np.random.normal(), torch.rand(()).item()]
        state.log_history.append({"drawn": drawn})


def made(directory: Path, method: str = "qtale", *callbacks: TrainerCallback, **recipe):
    settings = profile(
        max_steps=STEPS, lora={"dropout": 0.1}, training={"batch_size": 8, "save_steps": 4, **recipe}
    )
    model = prepare_model(llama(), settings, method, 0)
    probe = [ProbeCallback(rows(12), 8, 0)] if method != "full" else []
    data = rows(24 * settings.training.gradient_accumulation)
    return make_trainer(
        model, Tokenizer(), data, settings, method, 0, directory, [*probe, Draw(), *callbacks]
    )


def killed(directory: Path, method: str = "qtale", at: int = 5, **recipe) -> Path:
    """The folder of checkpoints that a run killed at the end of a step leaves."""
    with pytest.raises(Killed):
        made(directory, method, Kill(at), **recipe).train()
    return directory / "checkpoints"


def final(trainer, resume: Path | None = None):
    """Everything that a run comes to: weights, log, the generators, and routes under noise."""
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
    if torch.cuda.is_available():
        state.append(torch.cuda.get_rng_state().tolist())
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return weights, trainer.state.log_history, state, routes(trainer)


def routes(trainer) -> list:
    if not trainer.objective.routed:
        return []
    batch = {name: tensor.to(trainer.args.device) for name, tensor in collate(rows(12)).items()}
    with record_routes(trainer.model.train()) as seen, torch.no_grad():
        trainer.model(**batch)
    return seen.gates.tolist()


def assert_same(whole, resumed):
    assert whole[0].keys() == resumed[0].keys()
    assert all(torch.equal(tensor, resumed[0][name]) for name, tensor in whole[0].items())
    assert whole[1:] == resumed[1:]


def spoil_generators():
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


@pytest.mark.parametrize(
    ("method", "save_steps", "logged_every", "accumulation"),
    [
        ("qtale", 4, 1, 1),  # within an epoch
        ("qtale", 3, 1, 1),  # at the end of one: its probe comes after the checkpoint
        ("qtale", 5, 2, 1),  # between two logged steps; the run ends between two as well
        ("qtale", 4, 3, 2),
        ("full", 5, 2, 1),
    ],
)
def test_a_killed_run_goes_on_from_its_checkpoint_as_if_nothing_had_been(
    tmp_path, monkeypatch, method, save_steps, logged_every, accumulation
):
    monkeypatch.setattr(training, "LOGGED_POINTS", STEPS // logged_every)
    recipe = {"save_steps": save_steps, "gradient_accumulation": accumulation}
    whole = final(made(tmp_path / "whole", method, **recipe))
    folder = killed(tmp_path / "cut", method, at=save_steps + 1, **recipe)
    resumed = made(tmp_path / "cut", method, **recipe)
    spoil_generators()
    assert_same(whole, final(resumed, folder / f"checkpoint-{save_steps}"))
    logged = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert logged == list(range(logged_every, STEPS + 1, logged_every))


def test_a_run_killed_twice_goes_on_twice(tmp_path):
    whole = final(made(tmp_path / "whole", save_steps=2))
    folder = killed(tmp_path / "cut", save_steps=2, at=3)
    with pytest.raises(Killed):
        made(tmp_path / "cut", "qtale", Kill(7), save_steps=2).train(str(last_complete(folder)))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-6"]
    assert_same(whole, final(made(tmp_path / "cut", save_steps=2), last_complete(folder)))


def test_a_checkpoint_holds_safetensors_and_json_and_no_pickle(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    checkpoint = last_complete(killed(tmp_path))
    files = sorted(checkpoint.rglob("*"))
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    made(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def flip_a_bit(folder):
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two whole checkpoints, of steps 4 and 12."""
    folder = killed(tmp_path_factory.mktemp("two"))
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-12")
    return folder


def test_of_whole_checkpoints_the_one_of_the_last_step_is_taken(two, tmp_path):
    shutil.copytree(two / "checkpoint-4", tmp_path / "checkpoint-4")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    shutil.copytree(two / "checkpoint-12", tmp_path / "checkpoint-12")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-12"


def test_where_there_is_no_checkpoint_none_is_taken(tmp_path):
    assert last_complete(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-3").write_text("a file")
    assert last_complete(tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        remove("digest.json"),
        remove("generators.json"),
        remove("trainable.safetensors"),
        cut_short("trainer_state.json"),
        cut_short("trainable.safetensors"),
        cut_short("digest.json"),
        flip_a_bit,
        empty,
    ],
    ids=[
        "no digest",
        "no generators",
        "no weights",
        "half a state",
        "half the weights",
        "half a digest",
        "bit",
        "empty",
    ],
)
def test_a_damaged_checkpoint_does_not_count(two, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    damage(folder / "checkpoint-12")
    assert last_complete(folder) == folder / "checkpoint-4"
    damage(folder / "checkpoint-4")
    assert last_complete(folder) is None


@pytest.mark.parametrize("part", ["save_optimizer", "save_generators", "save_sums", "file_digest"])
def test_a_run_killed_while_writing_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch, part):
    whole = final(made(tmp_path / "whole", save_steps=2))
    written = getattr(checkpoints, part)

    def kill_the_second(*arguments):
        if (tmp_path / "cut" / "checkpoints" / "checkpoint-4").exists():
            raise Killed
        return written(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints, part, kill_the_second)
        made(tmp_path / "cut", save_steps=2).train()
    folder = tmp_path / "cut" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert last_complete(folder) == folder / "checkpoint-2"
    assert_same(whole, final(made(tmp_path / "cut", save_steps=2), last_complete(folder)))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-8"]


@pytest.mark.parametrize("damaged", [False, True])
def test_finetune_goes_on_where_it_can_and_begins_anew_where_it_cannot(tmp_path, damaged):
    settings = profile(save_base(tmp_path / "base"), training={"save_steps": 2}, max_length=40)
    examples = load_task("arc_easy", "train")[:24]

    def run(name, report):
        outcome = finetune(settings, "arc_easy", "qtale", 0, tmp_path / name, report, examples)
        return {key: value for key, value in outcome.items() if not key.endswith("_seconds")}

    def kill(share, where):
        if share > 0.7:
            raise Killed

    whole, shares = run("whole", lambda *_: None), []
    with pytest.raises(Killed):
        run("cut", kill)
    if damaged:
        (tmp_path / "cut" / "checkpoints" / "checkpoint-4" / "sums.json").unlink()
    assert run("cut", lambda share, where: shares.append(share)) == whole
    assert len(shares) == (6 if damaged else 2)
    assert not (tmp_path / "cut" / "checkpoints").exists()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return [random.random(), random.gauss(), *np.random.normal(size=3), *torch.randn(3).tolist()]

    spoil_generators()
    draw()  # an odd number of normals: numpy's generator holds the next one back
    save_generators(tmp_path)
    expected = draw()
    draw()
    load_generators(tmp_path)
    assert draw() == expected


def test_the_generator_of_the_gpu_is_kept_too(tmp_path, monkeypatch):
    """On a stand-in for torch.cuda, as tests run without one."""
    there, given = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    save_generators(tmp_path)
    load_generators(tmp_path)
    assert torch.equal(*given, there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load_generators(tmp_path)
    assert len(given) == 1
