"""What AWQ needs to know about a layer's inputs, gathered in forward passes of the float model.

A linear layer with weight error D answers x with the error D x, so its mean square output error over the
calibration tokens is tr(D M Dᵀ) / out with M = mean of x xᵀ: the second moment of the inputs is all a search
needs, and exact.

Calibration goes layer by layer: `enter` brings the rows to the first layer, `run_layer` through one more. So
only the layer at work need have its weights (streaming.py); what the rows are between two layers stays in
memory, in the model's dtype.

In a routed model a layer's tokens are those that execute it, at the model's own θ; padding never counts. One
that runs no token but the reserved first of each sequence is judged on all tokens, and named in the report:
θ is searched after quantization, and may yet send others through it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

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


@dataclass
class Batch:
    """Rows between two layers.

    hidden: [batch, tokens, d], what enters the next layer; valid: bool [batch, tokens], False on padding.
    arguments: by layer, the keywords that the decoder calls it with (masks, rotary tables, routing).
    """

    hidden: Tensor
    valid: Tensor
    arguments: list[dict[str, Any]]

    def counted(self, layer: int) -> Tensor:
        """Tokens that executed a layer which has run, bool [batch, tokens]."""
        routing = self.arguments[layer].get("routing")
        return self.valid if routing is None else routing.executed.get(layer, self.valid)


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


def enter(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Batch]:
    """Token rows in batches, before the first layer; embeddings and the last norm must have their weights."""
    device = next(model.parameters()).device
    batches = []
    with torch.no_grad(), evaluating(model), _recorded_calls(model) as calls:
        for ids, valid in padded(rows, device):
            model.model(input_ids=ids, attention_mask=valid.long(), use_cache=False)
            batches.append(Batch(calls[0][0], valid, [arguments for _, arguments in calls]))
            calls.clear()
    return batches


def run_layer(
    model: nn.Module, i: int, batches: Sequence[Batch], executed_only: bool = True
) -> tuple[dict[str, InputStatistics], list[Tensor]]:
    """Statistics by producer (`READERS`) of layer `i` over `batches`, and what each enters the next one as.

    In a routed model only the tokens that execute the layer count, unless `executed_only` is False.
    """
    sums: dict[str, InputStatistics] = {}
    outputs = []
    layer = model.model.layers[i]
    with torch.no_grad(), evaluating(model), _recording(model), _captured_inputs(layer) as captured:
        for batch in batches:
            outputs.append(layer(batch.hidden, **batch.arguments[i]))
            counted = batch.counted(i) if executed_only else batch.valid
            chosen = counted[:, _reserved_tokens(model) :].sum().item()
            for producer in READERS:
                _add(sums, producer, captured.pop(producer)[counted].float(), chosen)
    for entry in sums.values():
        entry.moment /= max(entry.tokens, 1)
        entry.mean_abs /= max(entry.tokens, 1)
    return sums, outputs


def pass_layer(model: nn.Module, i: int, batches: Sequence[Batch]) -> None:
    """Take `batches` through layer `i`, without statistics."""
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            batch.hidden = model.model.layers[i](batch.hidden, **batch.arguments[i])


def calibration_loss(model: nn.Module, rows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood, in nats, of all tokens of `rows` but each row's first."""
    total, count = 0.0, 0
    with torch.no_grad(), evaluating(model):
        for ids, valid in padded(rows, next(model.parameters()).device):
            logits = model(input_ids=ids, attention_mask=valid.long(), use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
            )  # [batch, tokens - 1]
            total += loss[valid[:, 1:]].double().sum().item()
            count += valid[:, 1:].sum().item()
    return total / max(count, 1)


def is_routed(model: nn.Module) -> bool:
    """Whether `model` carries routers."""
    return hasattr(model.model, "routing")


def _reserved_tokens(model: nn.Module) -> int:
    """First tokens of every sequence that run whatever a router says; rows here are padded on the right."""
    return model.model.routing.config.always_run_tokens if is_routed(model) else 0


def _add(sums: dict, key: str, inputs: Tensor, chosen: int) -> None:
    """Add one batch's inputs [tokens, in] to the sums of `key`."""
    moment, mean_abs = inputs.T @ inputs, inputs.abs().sum(0)
    if key not in sums:
        sums[key] = InputStatistics(torch.zeros_like(moment), torch.zeros_like(mean_abs), 0, 0)
    entry = sums[key]
    entry.moment += moment
    entry.mean_abs += mean_abs
    entry.tokens += len(inputs)
    entry.chosen += chosen


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
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


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[tuple[Tensor, dict]]]:
    """A list that passes of the decoder fill with every layer's (hidden states, keywords); no layer runs."""
    calls: list[tuple[Tensor, dict]] = []

    def record(hidden: Tensor, **arguments) -> Tensor:
        calls.append((hidden, arguments))
        return hidden

    for layer in model.model.layers:
        layer.forward = record
    try:
        yield calls
    finally:
        for layer in model.model.layers:
            del layer.forward


def _recording(model: nn.Module) -> AbstractContextManager:
    """Routers say meanwhile what they decide; nothing in a model without them."""
    if not is_routed(model):
        return nullcontext()
    from qtale_lib.adaptive import record_routes

    return record_routes(model)


@contextmanager
def _captured_inputs(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict that calls of `layer` fill with {producer: inputs [batch, tokens, in]}."""
    captured: dict[str, Tensor] = {}

    def capture(producer: str, linear: nn.Linear, args: tuple) -> None:
        captured[producer] = args[0]

    hooks = [
        layer.get_submodule(readers[0]).register_forward_pre_hook(partial(capture, producer))
        for producer, readers in READERS.items()
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
