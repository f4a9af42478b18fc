"""What AWQ needs to know about a layer's inputs, gathered in forward passes of the float model.

A linear layer with weight error D answers x with the error D x, so its mean square output error over the
calibration tokens is tr(D M Dᵀ) / out with M = mean of x xᵀ: the second moment of the inputs is all a search
needs, and exact.

In a routed model a layer's tokens are those that execute it, at the model's own θ; padding never counts. One
that runs no token but the reserved first of each sequence is judged on all tokens, and named in the report:
θ is searched after quantization, and may yet send others through it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError

# The linears that read one common input, by the module that produces it (and takes AWQ's scale into itself).
READERS: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
PASS_BYTES = 2**30  # second moments held at once; a model that needs more is gathered in several passes
BATCH_TOKENS = 4096


@dataclass
class InputStatistics:
    """Inputs x [tokens, in] of one group of readers.

    moment: mean of x xᵀ [in, in]; mean_abs: mean of |x| [in]; tokens: how many counted; chosen: how many of
    them ran by the router's decision rather than as a sequence's reserved first ones (all, where there is no
    router).
    """

    moment: Tensor
    mean_abs: Tensor
    tokens: int
    chosen: int


@dataclass(frozen=True)
class CalibrationRecord:
    """Which token rows calibrated a model: so that two quantized models can be compared honestly."""

    texts: int
    kept: int
    dropped_empty: int
    dropped_long: int
    max_length: int
    tokens: int
    token_ids_sha256: str

    def as_dict(self) -> dict:
        return asdict(self)


def tokenize(tokenizer, texts: Iterable[str], max_length: int) -> tuple[list[list[int]], CalibrationRecord]:
    """Token rows of `texts`, empty and over-long ones left out and counted; UserError if none is left."""
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    kept = [row for row in rows if 0 < len(row) <= max_length]
    if not kept:
        raise UserError(f"none of {len(rows)} calibration texts has between 1 and {max_length} tokens.")
    digest = hashlib.sha256("\n".join(" ".join(map(str, row)) for row in kept).encode()).hexdigest()
    empty = sum(not row for row in rows)
    tokens = sum(map(len, kept))
    return kept, CalibrationRecord(
        len(rows), len(kept), empty, len(rows) - len(kept) - empty, max_length, tokens, digest
    )


def gather(
    model: nn.Module, rows: Sequence[Sequence[int]], layers: Sequence[int], executed_only: bool = True
) -> dict[int, dict[str, InputStatistics]]:
    """Statistics {layer: {producer: InputStatistics}} of `layers` over token `rows` (producers: `READERS`).

    In a routed model only the tokens that execute the layer count, unless `executed_only` is False.
    """
    sums: dict[tuple[int, str], InputStatistics] = {}
    device = next(model.parameters()).device
    with torch.no_grad(), _evaluating(model), _captured_inputs(model, layers) as captured:
        for ids, valid in _batches(rows, device):
            counted = _counted(model, ids, valid, executed_only)
            chosen = counted[:, :, _reserved_tokens(model) :].sum((1, 2)).tolist()
            for (layer, producer), inputs in captured.items():
                _add(sums, (layer, producer), inputs[counted[layer]].float(), chosen[layer])
            captured.clear()
    for entry in sums.values():
        entry.moment /= max(entry.tokens, 1)
        entry.mean_abs /= max(entry.tokens, 1)
    return {layer: {producer: sums[layer, producer] for producer in READERS} for layer in layers}


def layer_blocks(model: nn.Module) -> Iterator[list[int]]:
    """Layer indices in runs whose second moments fit in `PASS_BYTES`."""
    layers = model.model.layers
    widths = [layers[0].get_submodule(readers[0]).in_features for readers in READERS.values()]
    size = max(1, PASS_BYTES // sum(4 * width**2 for width in widths))
    for start in range(0, len(layers), size):
        yield list(range(start, min(start + size, len(layers))))


def is_routed(model: nn.Module) -> bool:
    """Whether `model` carries routers."""
    return hasattr(model.model, "routing")


def _reserved_tokens(model: nn.Module) -> int:
    """First tokens of every sequence that run whatever a router says; rows here are padded on the right."""
    return model.model.routing.config.always_run_tokens if is_routed(model) else 0


def _counted(model: nn.Module, ids: Tensor, valid: Tensor, executed_only: bool) -> Tensor:
    """Run the model once; which tokens count in each layer, bool [layers, batch, tokens]."""
    everywhere = valid.expand(len(model.model.layers), *valid.shape)
    if not (executed_only and is_routed(model)):
        model(input_ids=ids, attention_mask=valid.long(), use_cache=False, logits_to_keep=1)
        return everywhere
    from qtale_lib.adaptive import record_routes

    with record_routes(model) as routes:
        model(input_ids=ids, attention_mask=valid.long(), use_cache=False, logits_to_keep=1)
    return everywhere & routes.executed.to(valid.device)


def _add(sums: dict, key: tuple[int, str], inputs: Tensor, chosen: int) -> None:
    """Add one batch's inputs [tokens, in] to the sums of `key`."""
    moment, mean_abs = inputs.T @ inputs, inputs.abs().sum(0)
    if key not in sums:
        sums[key] = InputStatistics(torch.zeros_like(moment), torch.zeros_like(mean_abs), 0, 0)
    entry = sums[key]
    entry.moment += moment
    entry.mean_abs += mean_abs
    entry.tokens += len(inputs)
    entry.chosen += chosen


def _batches(rows: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (ids, valid) [batch, tokens], rows of like length together."""
    batch: list[Sequence[int]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > BATCH_TOKENS:
            yield _pad(batch, device)
            batch = []
        batch.append(row)
    yield _pad(batch, device)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(device), valid.to(device)


def _capture(captured: dict, key: tuple[int, str], linear: nn.Module, args: tuple) -> None:
    captured[key] = args[0]


@contextmanager
def _captured_inputs(model: nn.Module, layers: Sequence[int]):
    """A dict that forward passes fill with {(layer, producer): inputs [batch, tokens, in]}."""
    captured: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for layer in layers:
        for producer, readers in READERS.items():
            linear = model.model.layers[layer].get_submodule(readers[0])
            hooks.append(linear.register_forward_pre_hook(partial(_capture, captured, (layer, producer))))
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
