"""Peak memory of a stage, from the base's shape and the lengths of the rows alone. Needs no torch.

What a training step keeps for its backward pass is counted tensor by tensor; a test holds the count against
what autograd really keeps, and slow ones hold whole stages against the measured peaks of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale_lib import efficiency
from qtale_lib.efficiency import LLAMA2_7B, Shape, layer_linears, model_bytes
from qtale_lib.jobs import ROUTED

if TYPE_CHECKING:
    from qtale_lib.config import Profile

MIB, GIB = 2**20, 2**30
BYTES = {"float32": 4, "bfloat16": 2}
FLOAT, MASK = 4, 1  # bytes of a float32, and of a dropout mask's element on a GPU (on a CPU it is a float)
# What a process holds before it has a model, and after its first step without one: torch and the libraries
# around it. Measured with torch's CPU build; on a GPU, what cuBLAS allocates.
PROCESS = {"cpu": 610 * MIB, "gpu": 64 * MIB}
# On the GPU itself, besides what torch allocates: the CUDA context, and what its allocator cannot fill.
CONTEXT, FRAGMENTED = 512 * MIB, 0.08
# Share of scoring's own memory that the system's allocator holds on to, freed, as shapes vary; seen on Linux.
HELD = {"cpu": 0.6, "gpu": 0.0}
MOMENTS = 2**30  # of inputs, which quantization gathers at once (statistics.PASS_BYTES)
CAPTURED_TOKENS = 4096  # statistics.BATCH_TOKENS


@dataclass(frozen=True)
class Batch:
    """What one forward pass is fed: rows, all padded to so many tokens; answers: positions whose logits are
    asked for, over all rows.
    """

    rows: int
    tokens: int
    answers: int

    @property
    def size(self) -> int:
        """Tokens fed, padding included."""
        return self.rows * self.tokens


Parts = dict[str, float]


def training(shape: Shape, profile: Profile, method: str, batch: Batch, device: str) -> Parts:
    """Bytes by part of a fine-tuning on its largest micro-batch; their sum is the peak.

    device: "cpu" or "gpu". Parts: process, weights, trainable (LoRA and routers: weights, gradients, AdamW's
    two moments), activations (kept for the backward pass), working (of the layer or logits at work).
    """
    routed = method != "full"
    learning = lora_weights(shape, profile) + (router_weights(shape, profile) if method in ROUTED else 0)
    frozen = router_weights(shape, profile) if method == "noisy_full" else 0
    working = max(_working(shape, profile, batch, routed), _logits(shape, profile, batch, 2))
    plain, layers = _kept_by_layer(shape, profile, batch, device), shape.num_hidden_layers
    gated = _kept_by_gate(shape, profile, batch) if routed else 0
    routers = _kept_by_router(shape, profile, batch) if routed else 0
    with_gates = layers - profile.routing.always_run_layers
    if profile.compute.gradient_checkpointing:  # of a layer its input, and of one layer all, computed again
        kept = layers * batch.size * BYTES[profile.dtype] * shape.hidden_size + with_gates * routers
        working += plain + gated
    else:
        kept = layers * plain + with_gates * (gated + routers)
    weights = base_bytes(shape, profile)
    return {
        "process": PROCESS[device],
        "weights": weights / (profile.compute.processes if profile.compute.sharding == "fsdp" else 1),
        "trainable": FLOAT * (4 * learning + frozen),
        "activations": kept,
        "working": working,
    }


def _kept_by_layer(shape: Shape, profile: Profile, batch: Batch, device: str) -> float:
    """What a plain layer keeps: norms' inputs, LoRA's inputs after dropout and their masks, q, k, v and the
    attention's output, three tensors of the MLP.
    """
    width, linears = BYTES[profile.dtype], layer_linears(shape)
    q, kv = linears["q_proj"][0], linears["k_proj"][0]
    mask = {"gpu": MASK, "cpu": FLOAT}[device] if profile.lora.dropout else 0
    adapted = sum((FLOAT + mask) * linears[name][1] + FLOAT * profile.lora.r for name in _adapted(profile))
    norms = 2 * FLOAT * shape.hidden_size
    activations = 2 * (q + kv) + 3 * shape.intermediate_size
    return batch.size * (adapted + norms + width * activations)


def _kept_by_gate(shape: Shape, profile: Profile, batch: Batch) -> float:
    """What a gated layer keeps besides: attention over all pairs of tokens twice (its values in place of the
    output), and both ends of the gate.
    """
    width, d = BYTES[profile.dtype], shape.hidden_size
    pairs = batch.tokens * shape.num_attention_heads * (FLOAT + width)
    ends = width * d if width == FLOAT else 2 * width * d  # in float32 one of them is kept anyway
    return batch.size * (pairs + ends - width * layer_linears(shape)["q_proj"][0])


def _kept_by_router(shape: Shape, profile: Profile, batch: Batch) -> float:
    """What a router keeps: its input in float32, and four tensors of its hidden width."""
    own = 0 if profile.dtype == "float32" else FLOAT * shape.hidden_size
    return batch.size * (own + 4 * FLOAT * efficiency.router_hidden(shape, profile.routing))


def _working(shape: Shape, profile: Profile, batch: Batch, routed: bool) -> float:
    """Gradients of one layer: of its MLP, or of its attention, whose scores are explicit under a gate."""
    width = BYTES[profile.dtype]
    mlp = batch.size * (3 * width * shape.intermediate_size + 2 * FLOAT * shape.hidden_size)
    scores = batch.size * batch.tokens * shape.num_attention_heads * (2 * FLOAT + width)
    return max(mlp, scores) if routed else mlp


def _logits(shape: Shape, profile: Profile, batch: Batch, floats: int) -> float:
    """Logits in the base's type, and so many float32 tensors of their size."""
    own = BYTES[profile.dtype] if profile.dtype != "float32" else 0
    return batch.answers * shape.vocab_size * (own + floats * FLOAT)


def scoring(shape: Shape, profile: Profile, method: str, batch: Batch, device: str) -> Parts:
    """Bytes by part of θ search and evaluation on their largest batch: process, weights, working."""
    width, linears = BYTES[profile.dtype], layer_linears(shape)
    q, kv = linears["q_proj"][0], linears["k_proj"][0]
    stream = (3 * width + FLOAT) * shape.hidden_size
    mask = batch.tokens * (1 + width)  # which keys a token sees: as told, and as attention takes it
    layer = max(4 * width * shape.intermediate_size, mask + width * (2 * q + 4 * kv))
    working = batch.size * stream + max(batch.size * layer, _logits(shape, profile, batch, 2))
    routers = FLOAT * router_weights(shape, profile) if method != "full" else 0
    return {
        "process": PROCESS[device],
        "weights": base_bytes(shape, profile) + routers,
        "working": working * (1 + HELD[device]),
    }


def quantizing(shape: Shape, profile: Profile, method: str, device: str) -> Parts:
    """Bytes by part of a quantization: process, weights, grids, working (inputs' moments, one search)."""
    linears, layers, group = layer_linears(shape), shape.num_hidden_layers, profile.group_size
    groups = sum(out * (1 if group == -1 else width // group) for out, width in linears.values())
    inputs = [linears[name][1] for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    moments = FLOAT * sum(width**2 for width in inputs)
    at_once = max(1, min(layers, MOMENTS // moments))
    captured = CAPTURED_TOKENS * at_once * BYTES[profile.dtype] * sum(inputs)
    widest = 2 * max(out * width for out, width in linears.values())  # gate and up are searched together
    search = FLOAT * (max(inputs) ** 2 + 5 * widest)
    model = scoring(shape, profile, method, Batch(0, 0, 0), device)
    return {
        "process": model["process"],
        "weights": model["weights"],
        "grids": layers * groups * (2 * FLOAT + 1),  # steps and zeros to round with, clips
        "working": at_once * moments + max(captured, search),
    }


def base_bytes(shape: Shape, profile: Profile) -> float:
    """Bytes of the base's weights in the profile's type."""
    return base_bytes_in(shape, BYTES[profile.dtype])


def base_bytes_in(shape: Shape, width: int) -> float:
    """Bytes of the base's weights, each of so many."""
    return model_bytes(shape, 16)["total"] * width / 2


def lora_weights(shape: Shape, profile: Profile) -> int:
    """Trainable weights of LoRA."""
    linears = layer_linears(shape)
    per_layer = sum(sum(linears[name]) for name in _adapted(profile))
    return shape.num_hidden_layers * profile.lora.r * per_layer


def router_weights(shape: Shape, profile: Profile) -> int:
    """Weights of all routers."""
    return efficiency.routed_layers(shape, profile.routing) * efficiency.router_weights(
        shape, profile.routing
    )


def _adapted(profile: Profile) -> list[str]:
    """The linears of a decoder layer that get LoRA."""
    targets = profile.lora.target_modules
    return [
        name for name in layer_linears(LLAMA2_7B) if any(target.split(".")[-1] == name for target in targets)
    ]
