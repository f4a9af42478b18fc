"""Fewer layers: some for all tokens (ShortGPT, SLEB), or the last ones for tokens that are confident.

What the paper's Section 2 names beside token-adaptive execution. `block_influence` (Men et al., 2024) removes
at once the layers that turn the hidden states least; `sleb` (Song et al., 2024) one after another, each time
the layer without which the calibration loss is least. With `leave_early` a token stops at the first layer
after which the final norm and lm_head give some token a probability of at least `confidence`: its hidden
state goes on unchanged, and later tokens attend to keys and values made from it (as in CALM, Schuster et al.,
2022). A routed model does otherwise: it skips in the middle, and by what it learned in training.

Execution is counted in (token, layer) pairs, as for routed models. That favours early exit: lm_head after
every layer, and keys and values of tokens that left, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.statistics import calibration_loss, enter, pass_layer


@dataclass
class Executed:
    """What the last pass executed, by layer of the unpruned model: for all, or bool [batch, tokens]."""

    layers: list[bool | Tensor] = field(default_factory=list)

    def of(self, valid: Tensor) -> Tensor:
        """The same as bool [layers, batch, tokens]; valid: bool [batch, tokens], for its shape."""
        whole = torch.ones_like(valid)
        return torch.stack([whole & ran if isinstance(ran, Tensor) else whole * ran for ran in self.layers])


def executed_layers(model: nn.Module, valid: Tensor) -> Tensor | None:
    """What the last pass executed, bool [layers, batch, tokens]; None for a model that misses no layer."""
    executed = getattr(model, "executed", None)
    return None if executed is None else executed.of(valid)


# Which layers to remove.


def least_influence(model: nn.Module, rows: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` layers of the lowest block influence."""
    influence = block_influence(model, rows)
    return sorted(sorted(range(len(influence)), key=influence.__getitem__)[:count])


def block_influence(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[float]:
    """Of each layer: 1 − the mean over tokens of the cosine between its input and its output."""
    batches, found = enter(model, rows), []
    for i in range(len(model.model.layers)):
        before = [batch.hidden for batch in batches]
        pass_layer(model, i, batches)
        cosines = [
            nn.functional.cosine_similarity(old.float(), batch.hidden.float(), -1)[batch.valid]
            for old, batch in zip(before, batches, strict=True)
        ]
        found.append(1 - torch.cat(cosines).mean().item())
    return found


def greedy(model: nn.Module, rows: Sequence[Sequence[int]], count: int) -> list[int]:
    """`count` layers by SLEB's search: each time the one without which the loss on `rows` is least."""
    _check_count(model, count)
    removed: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(model.model.layers)) if i not in removed]
        losses = {i: _loss_without(model, rows, {*removed, i}) for i in left}
        removed.append(min(losses, key=losses.get))
    return sorted(removed)


def _loss_without(model: nn.Module, rows: Sequence[Sequence[int]], removed: set[int]) -> float:
    with _without(model, removed):
        return calibration_loss(model, rows)


CHOICES = {"block_influence": least_influence, "sleb": greedy}


# Removing them.


def remove_layers(model: nn.Module, method: str, removed: list[int]) -> dict[str, Any]:
    """Remove these decoder layers in place; returns what was done."""
    _check_count(model, len(removed))
    ran = [i not in removed for i in range(len(model.model.layers))]
    _set_layers(model, [layer for layer, stays in zip(model.model.layers, ran, strict=True) if stays], ran)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i  # its place in a cache
    model.executed = Executed(list(ran))
    return {"layers": f"{method} {len(removed)}", "removed": removed}


def _check_count(model: nn.Module, count: int) -> None:
    layers = len(model.model.layers)
    if not 0 < count < layers:
        raise UserError(f"{count} layers cannot be removed of {layers}; at least one must be, and one stay.")


def _set_layers(model: nn.Module, layers: Iterable[nn.Module], stays: Sequence[bool]) -> None:
    model.model.layers = nn.ModuleList(layers)
    config = model.config
    config.num_hidden_layers = len(model.model.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for kind, kept in zip(config.layer_types, stays, strict=True) if kept]


@contextmanager
def _without(model: nn.Module, removed: set[int]) -> Iterator[None]:
    """The model without some layers meanwhile."""
    layers, types = model.model.layers, getattr(model.config, "layer_types", None)
    stays = [i not in removed for i in range(len(layers))]
    _set_layers(model, [layer for layer, kept in zip(layers, stays, strict=True) if kept], stays)
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, len(layers)
        if types is not None:
            model.config.layer_types = types


# Early exit.


def leave_early(model: nn.Module, confidence: float) -> dict[str, Any]:
    """Let tokens leave once they are confident, in every pass from now on; returns what was done."""
    if not 0 < confidence < 1:
        raise UserError(f"a confidence is above 0 and below 1, which {confidence:g} is not.")
    model.executed = Executed()
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(partial(_leave, model, confidence, i))
    return {"layers": f"early_exit {confidence:g}"}


def _leave(
    model: nn.Module, confidence: float, i: int, _: nn.Module, inputs: tuple, output: Tensor
) -> Tensor:
    """A layer's output [batch, tokens, d], in which tokens that left keep their input."""
    executed = model.executed
    if i == 0:
        executed.layers = [torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)]
    output = torch.where(executed.layers[i][..., None], output, inputs[0])
    if i + 1 < len(model.model.layers):
        logits = model.lm_head(model.model.norm(output)).float()  # [batch, tokens, vocabulary]
        confident = logits.softmax(-1).amax(-1) >= confidence
        executed.layers.append(executed.layers[i] & ~confident)
    return output
