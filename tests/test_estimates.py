"""Estimates: what a training step keeps is what autograd keeps; whole stages, as processes measure them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import llama, profile, save_base
from transformers import PreTrainedModel

from qtale_lib import efficiency, estimates, memory, workload
from qtale_lib.adaptive import record_routes
from qtale_lib.config import Profile, load_profile
from qtale_lib.efficiency import Shape
from qtale_lib.estimates import STAGES, Speed, stages
from qtale_lib.jobs import Job, Run, all_jobs
from qtale_lib.lab import Lab
from qtale_lib.memory import Batch
from qtale_lib.preflight import config_of, workloads
from qtale_lib.provenance import ROOT
from qtale_lib.trainer import is_router, response_loss
from qtale_lib.training import prepare_model

NEAR = 0.2  # how far an estimate may be off
HUB_PROFILES = ("smollm2-135m", "llama3.2-1b", "llama3.2-3b", "llama2-7b", "llama3.1-8b")


def shape_of(model: PreTrainedModel) -> Shape:
    return estimates.shape_of(model.config.to_dict())


def kept_for_backward(model: PreTrainedModel, batch: Batch) -> int:
    """Bytes that autograd holds at the end of a forward pass, besides the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage  # kept alive, so that no other takes its place
        return tensor

    ids = torch.randint(model.config.vocab_size, (batch.rows, batch.tokens))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if any(is_router(name) for name, _ in model.named_parameters()):
            with record_routes(model):
                loss = response_loss(model, ids, torch.ones_like(ids), labels)
        else:
            loss = response_loss(model, ids, torch.ones_like(ids), labels)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "dllm", "qtale"])
@pytest.mark.parametrize(
    ("batch", "sizes", "lora"),
    [
        (Batch(2, 64, 2), {}, {}),
        (Batch(1, 200, 1), {"hidden_size": 64, "num_hidden_layers": 6}, {"r": 2}),
        (Batch(4, 48, 4), {"num_key_value_heads": 4}, {"target_modules": ["q_proj", "down_proj"]}),
        (Batch(2, 64, 2), {"intermediate_size": 256}, {"dropout": 0.0}),
    ],
)
def test_a_step_keeps_what_is_counted(dtype, method, batch, sizes, lora):
    settings = profile(dtype=dtype, routing={"hidden": None}, lora=lora)
    base = llama(**{"hidden_size": 96, **sizes}).to(getattr(torch, dtype))
    shape = shape_of(base)
    model = prepare_model(base, settings, method, seed=0).train()
    parts = memory.training(shape, settings, method, batch, "cpu")
    assert parts["activations"] == pytest.approx(kept_for_backward(model, batch), rel=0.15)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts["trainable"] == 16 * learning
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert parts["weights"] == frozen


@pytest.mark.parametrize(
    ("base", "published"),
    [
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_shapes_of_shipped_bases_have_the_published_number_of_parameters(base, published):
    assert estimates.download_bytes(efficiency.ON_THE_HUB[base]) == 2 * published


@pytest.mark.parametrize("name", HUB_PROFILES)
def test_the_group_size_of_a_shipped_profile_divides_its_base(name):
    shipped = load_profile(name)
    shape = efficiency.ON_THE_HUB[shipped.base]
    assert not [width for _, width in efficiency.layer_linears(shape).values() if width % shipped.group_size]


def hub_stages(profile: Profile, device: str = "gpu", speed: Speed | None = None):
    work = [workload.typical(profile, task) for task in profile.tasks]
    return stages(profile, efficiency.ON_THE_HUB[profile.base], work, all_jobs(profile), device, speed)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 8), longer=st.integers(1, 512), method=st.sampled_from(["full", "dllm", "qtale"]),
    device=st.sampled_from(["cpu", "gpu"]),
)  # fmt: skip
def test_more_rows_or_longer_ones_never_take_less(batch, longer, method, device):
    shipped = load_profile("llama3.2-1b")
    shape = efficiency.LLAMA32_1B
    small, wide, long = (
        sum(memory.training(shape, shipped, method, Batch(rows, tokens, rows), device).values())
        for rows, tokens in ((batch, 256), (batch + 1, 256), (batch, 256 + longer))
    )
    assert small < wide and small < long
    full = sum(memory.training(shape, shipped, "full", Batch(batch, 256, batch), device).values())
    assert full <= small


def test_checkpointing_and_sharding_take_less():
    shape, batch = efficiency.LLAMA31_8B, Batch(1, 1024, 1024)
    plain, frugal, shared = (
        memory.training(shape, load_profile("llama3.1-8b", compute=compute), "qtale", batch, "gpu")
        for compute in ({}, {"gradient_checkpointing": True}, {"processes": 4, "sharding": "fsdp"})
    )
    inputs = shape.num_hidden_layers * batch.size * 2 * shape.hidden_size
    assert inputs < frugal["activations"] < plain["activations"] / 5
    assert sum(frugal.values()) < sum(plain.values())
    assert shared["weights"] == plain["weights"] / 4


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "rows"), [(4, 2, 2, 4), (4, 1, 2, 2), (1, 8, 8, 1), (4, 2, 1, 4)]
)
def test_processes_share_the_accumulation_or_the_batch(batch, accumulation, processes, rows):
    changes = {"batch_size": batch, "gradient_accumulation": accumulation, "noise": "keyed"}
    shared = load_profile("tiny", training=changes, compute={"processes": processes})
    assert workload.typical(shared, "piqa").training_batch(shared).rows == rows
    assert shared.split_batch()[0] == rows


def test_stages_are_those_of_the_jobs_and_time_needs_a_speed():
    shipped = load_profile("llama2-7b")
    assert [stage.name for stage in hub_stages(shipped)] == list(STAGES)
    assert all(stage.seconds is None for stage in hub_stages(shipped))
    slow, fast = (hub_stages(shipped, speed=Speed(flops, flops, 1)) for flops in (1e12, 1e14))
    assert all(a.seconds > b.seconds > 0 for a, b in zip(slow, fast, strict=True))
    work = [workload.typical(shipped, "piqa")]
    trained = stages(shipped, efficiency.LLAMA2_7B, work, [Job(Run("piqa", "full", 0))], "gpu")
    assert [stage.name for stage in trained] == ["fine-tune"] and trained[0].worst == "piqa, full"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 s"), (119, "119 s"), (130, "2 min"), (7300, "2 h"), (172800, "2 days")],
)
def test_times_are_told_roughly(seconds, text):
    assert estimates.roughly(seconds) == text


def test_without_a_tokenizer_characters_stand_for_tokens(tmp_path):
    lab = Lab(profile(save_base(tmp_path / "base")), tmp_path)
    known = workload.measured(lab, "arc_easy", None)
    assert known.measured and known.train == 24 and known.test == 10 and known.searched == 8
    assert 1 < known.trained.mean <= known.trained.longest <= lab.profile.max_length
    trained_only = workload.measured(lab, "arc_easy", None, scored=False)
    assert (trained_only.test, trained_only.searched) == (0, 0)


# Whole stages, in a process each, against the peaks that their results record

WORK = """
import json, sys
from pathlib import Path
from qtale_lib import stages
from qtale_lib.config import load_profile
from qtale_lib.jobs import Job, Run
from qtale_lib.lab import Lab, run_spec
lab = Lab(load_profile(sys.argv[1], **json.loads(sys.argv[2])), Path(sys.argv[3]))
run, bits = Run(lab.profile.tasks[0], "qtale", 0), json.loads(sys.argv[4])
stages.perform(lab, Job(run, bits), lambda *done: None)
kinds = ["evaluation", "threshold", "quantization"] if bits else ["finetune"]
peaks = {r["kind"]: r["provenance"]["peak_memory_bytes"] for r in lab.stored([Job(run, bits)], kinds)}
print(json.dumps(peaks))
"""


def measured_peaks(source: str, changes: dict, root: Path) -> dict[str, int]:
    """Peak bytes by stage, each of a process of its own."""
    found = {}
    for bits in (None, 16, 3):
        command = [sys.executable, "-c", WORK, source, json.dumps(changes), str(root), json.dumps(bits)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        peaks = json.loads(done.stdout.splitlines()[-1])
        name = "fine-tune" if bits is None else "search and evaluate" if bits == 16 else "quantize"
        found[name] = peaks["quantization"] if bits == 3 else max(peaks.values())
    return found


def assert_near(source: str, changes: dict, root: Path) -> None:
    lab = Lab(load_profile(source, **changes), root)
    jobs, shape = all_jobs(lab.profile), estimates.shape_of(config_of(lab.profile))
    expected = {s.name: s.peak for s in stages(lab.profile, shape, workloads(lab, jobs), jobs, "cpu")}
    for name, peak in measured_peaks(source, changes, root).items():
        assert expected[name] == pytest.approx(peak, rel=NEAR), name


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured per stage on Linux")
@pytest.mark.parametrize("task", ["arc_easy", "alpaca"])
def test_peaks_on_tiny_are_near_the_measured(tmp_path, task):
    changes = {"tasks": [task], "methods": ["qtale"], "bits": [16, 3], "max_steps": 125}
    assert_near("tiny", changes, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured per stage on Linux")
@pytest.mark.skipif("QTALE_TEST_MODELS" not in os.environ, reason="QTALE_TEST_MODELS is not set")
@pytest.mark.skipif("QTALE_TEST_DATA" not in os.environ, reason="QTALE_TEST_DATA is not set")
@pytest.mark.parametrize("task", ["arc_easy", "alpaca"])
def test_peaks_on_stories_are_near_the_measured(tmp_path, task):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"base: {os.environ['QTALE_TEST_MODELS']}/stories260K\ndata_dir: {os.environ['QTALE_TEST_DATA']}\n"
        f"tasks: [{task}]\nmethods: [qtale]\nbits: [16, 3]\nprompt: dllm\nmax_length: 512\n"
        "limit: {train: 300, calibration: 40, test: 60}\ntraining: {epochs: 1}\n"
        "quantization: {calibration_texts: 16}\nprobes: {samples: 32}\n"
    )
    assert_near(str(mine), {}, tmp_path)
