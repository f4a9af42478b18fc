"""What a profile will take, before it is run: peak memory and time of each stage, and disk.

Memory follows from shapes (memory.py) and is meant to be right within a fifth. Time is rough: floating-point
operations over what the machine multiplies, and a cost for every layer and pass that no work hides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtale_lib import memory
from qtale_lib.efficiency import Shape, flops_per_token, layer_linears
from qtale_lib.jobs import Job, rules
from qtale_lib.memory import BYTES, FLOAT
from qtale_lib.workload import Workload

if TYPE_CHECKING:
    from qtale_lib.config import Profile

STAGES = ("fine-tune", "quantize", "search and evaluate")
UTILISED = 0.4  # of the speed of a bare matrix product
# Seconds that a layer costs in a training step, whatever its size. Seen on one core with the embedded model;
# for a GPU, which the same calls keep waiting, it is stated, not measured.
LAYER = {"cpu": 3e-3, "gpu": 2e-3}
FORWARD, ROUTED = 0.12, 1.35  # of LAYER: a pass without gradients; a layer with a router
START, QUESTION = 1.0, 1e-3  # seconds of a job and of a question scored, seen with the embedded model
ALPHAS, RATIOS, MEASURED = 21, 10, 2  # what AWQ tries on a layer's inputs and groups, and the report's errors
ANSWER_BYTES = 60  # of a question in an evaluation's JSON


@dataclass(frozen=True)
class Speed:
    """FLOP/s of bare matrix products, in the profile's type and in float32, of each of so many workers."""

    own: float
    float32: float
    workers: int


@dataclass(frozen=True)
class Stage:
    """peak: bytes of the worst of its jobs, `worst` being its task and method; seconds: of all, if known."""

    name: str
    peak: float
    worst: str
    seconds: float | None


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a config.json says."""
    heads = config["num_attention_heads"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return Shape(
        *(config[name] for name in sizes),
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        vocab_size=config["vocab_size"],
        model_type=config.get("model_type", "llama"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        head_dim=config.get("head_dim"),
    )


def stages(
    profile: Profile,
    shape: Shape,
    work: Sequence[Workload],
    jobs: Iterable[Job],
    device: str,
    speed: Speed | None = None,
) -> list[Stage]:
    """Peak and time of each stage of the jobs on a "cpu" or "gpu"; stages without a job are left out."""
    by_task, found = {one.task: one for one in work}, []
    for name, chosen in zip(STAGES, _by_stage(list(jobs)), strict=True):
        if not chosen:
            continue
        parts = [(profile, shape, job, by_task[job.run.task], device) for job in chosen]
        peaks = [PEAKS[name](*part) for part in parts]
        worst = chosen[peaks.index(max(peaks))].run
        seconds = None
        if speed:
            seconds = sum(TIMES[name](*part, speed) for part in parts) / min(speed.workers, len(parts))
        found.append(Stage(name, max(peaks), f"{worst.task}, {worst.method}", seconds))
    return found


def _by_stage(jobs: list[Job]) -> tuple[list[Job], list[Job], list[Job]]:
    scored = [job for job in jobs if job.bits]
    return [job for job in jobs if not job.bits], [job for job in scored if job.bits < 16], scored


def _training_peak(profile: Profile, shape: Shape, job: Job, work: Workload, device: str) -> float:
    parts = memory.training(shape, profile, job.run.method, work.training_batch(profile), device)
    return sum(parts.values())


def _quantizing_peak(profile: Profile, shape: Shape, job: Job, work: Workload, device: str) -> float:
    return sum(memory.quantizing(shape, profile, job.run.method, device).values())


def _scoring_peak(profile: Profile, shape: Shape, job: Job, work: Workload, device: str) -> float:
    parts = memory.scoring(shape, profile, job.run.method, work.scoring_batch(profile), device)
    return sum(parts.values())


def _training_seconds(
    profile: Profile, shape: Shape, job: Job, work: Workload, device: str, speed: Speed
) -> float:
    recipe, lengths = profile.training, work.trained
    rows = recipe.epochs * work.train
    if profile.max_steps:
        rows = profile.max_steps * recipe.batch_size * recipe.gradient_accumulation
    once = _forward(shape, lengths.mean, lengths.answer)
    probed = min(profile.probes.samples, work.train) * (recipe.epochs + 1) if job.run.routed else 0
    flops = (2 * rows + probed) * once  # base weights get no gradient: backward costs as much as forward
    layers = shape.num_hidden_layers * LAYER[device] * (1 if job.run.method == "full" else ROUTED)
    return START + flops / (UTILISED * speed.own) + math.ceil(rows / recipe.batch_size) * layers


def _scoring_seconds(
    profile: Profile, shape: Shape, job: Job, work: Workload, device: str, speed: Speed
) -> float:
    search, method = profile.calibration, job.run.method
    points = round(0.5 / search.coarse_step) + 2 * round(search.coarse_step / search.fine_step)
    questions = len(rules(profile, method)) * work.test + points * work.searched * job.run.routed
    once = _forward(shape, work.scored.mean, work.scored.answer)
    batches = math.ceil(questions * work.sequences / profile.training.eval_batch_size)
    layers = shape.num_hidden_layers * LAYER[device] * FORWARD * (1 if method == "full" else ROUTED)
    flops = questions * work.sequences * once
    return START + questions * QUESTION + flops / (UTILISED * speed.own) + batches * layers


def _quantizing_seconds(
    profile: Profile, shape: Shape, job: Job, work: Workload, device: str, speed: Speed
) -> float:
    linears, group = layer_linears(shape).values(), profile.group_size
    search = sum(
        out * width * ((ALPHAS + MEASURED) * width + RATIOS * (width if group == -1 else group))
        for out, width in linears
    )
    tokens = profile.quantization.calibration_texts * work.trained.mean
    gathered = tokens * sum(width**2 for _, width in linears)
    return 2 * shape.num_hidden_layers * (search + gathered) / (UTILISED * speed.float32)


def _forward(shape: Shape, tokens: float, answers: float) -> float:
    """FLOPs of a row in one pass: linears and attention of every layer, lm_head where it predicts."""
    flops = flops_per_token(shape)
    attention = 4 * shape.num_hidden_layers * layer_linears(shape)["q_proj"][0] * tokens
    return tokens * (flops["layers"] + attention) + answers * flops["lm_head"]


Peak = Callable[["Profile", Shape, Job, Workload, str], float]
PEAKS: dict[str, Peak] = dict(zip(STAGES, (_training_peak, _quantizing_peak, _scoring_peak), strict=True))
TIMES = dict(zip(STAGES, (_training_seconds, _quantizing_seconds, _scoring_seconds), strict=True))


def roughly(seconds: float) -> str:
    """A time in whole minutes, hours or days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def results_bytes(profile: Profile, shape: Shape, work: Sequence[Workload], jobs: Iterable[Job]) -> float:
    """Bytes on disk of the jobs' adapters, searches and answers, and of one run's two checkpoints."""
    tests = {one.task: one.test for one in work}
    lora, routers = memory.lora_weights(shape, profile), memory.router_weights(shape, profile)
    total = 0.0
    for job in jobs:
        adapter = FLOAT * (lora + (routers if job.run.method != "full" else 0))
        if job.bits is None:
            total += adapter
        else:
            total += ANSWER_BYTES * tests[job.run.task] * len(rules(profile, job.run.method))
            total += _search_bytes(profile, shape) if job.bits < 16 else 0
    checkpoints = 2 * 3 * FLOAT * (lora + routers) if profile.training.save_steps else 0
    return total + checkpoints


def _search_bytes(profile: Profile, shape: Shape) -> float:
    group = profile.group_size
    clips = (
        out * (1 if group == -1 else width // group)
        for name, (out, width) in layer_linears(shape).items()
        if name not in ("q_proj", "k_proj")
    )
    return FLOAT * shape.num_hidden_layers * sum(clips)


def download_bytes(shape: Shape) -> float:
    """Bytes of a base as hubs hold it, in 16 bits."""
    return memory.base_bytes_in(shape, BYTES["bfloat16"])
