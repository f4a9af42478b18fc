"""Sparse weights: by magnitude, and by Wanda (Sun et al., 2024), which weighs a weight by its inputs' size.

Magnitude leaves out the smallest |w| of a linear. Wanda leaves out, in each output row, the smallest
|w| · ‖x‖, ‖x‖ being the norm of that weight's input over the calibration tokens; a layer's inputs are those
behind the layers pruned before it, as in the authors' code. Nothing is trained or updated.

In a routed model, inputs are those of the tokens that execute the layer (all, where only reserved ones do);
routers read the stream before the pruned linears and keep their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.statistics import READERS, Batch, enter, pass_layer, run_layer


def prune_weights(
    model: nn.Module, method: str, pattern: str, rows: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    """Set weights of every decoder linear to zero, in place; returns what was done.

    Args:
        method: "magnitude", or "wanda", which calibrates on token `rows`.
        pattern: a share such as "0.5", or "2:4": two of every four neighbours of a row stay.
    Raises:
        UserError: if the pattern does not divide a linear's inputs.
    """
    batches = enter(model, rows) if method == "wanda" else []
    for i in range(len(model.model.layers)):
        _prune_layer(model, i, pattern, batches)
    linears = decoder_linears(model).values()
    zeros = sum((linear.weight == 0).sum().item() for linear in linears)
    share = zeros / sum(linear.weight.numel() for linear in linears)
    return {"weights": f"{method} {pattern}", "zeros": share}


def _prune_layer(model: nn.Module, i: int, pattern: str, batches: list[Batch]) -> None:
    """By Wanda on `batches`, which then stand behind the pruned layer; by magnitude without any."""
    layer, statistics = model.model.layers[i], {}
    if batches:
        statistics, _ = run_layer(model, i, batches)
        if statistics["input_layernorm"].chosen == 0:
            statistics, _ = run_layer(model, i, batches, executed_only=False)
    for producer, readers in READERS.items():
        norms = statistics[producer].moment.diagonal().sqrt() if batches else None
        for name in readers:
            weight = layer.get_submodule(name).weight
            kept = kept_weights(scores(weight, norms), pattern, by_row=norms is not None)
            weight.mul_(kept)
    if batches:
        pass_layer(model, i, batches)


def scores(weight: Tensor, norms: Tensor | None) -> Tensor:
    """How much each weight [out, in] counts: |w|, times its input's norm [in] where that is known."""
    size = weight.float().abs()
    return size if norms is None else size * norms


def kept_weights(score: Tensor, pattern: str, by_row: bool) -> Tensor:
    """Which weights stay, bool [out, in], the highest `score` [out, in] among those compared.

    pattern: a share to leave out, of each row if `by_row` and else of all; or "n:m": n of m neighbours stay.
    """
    if ":" in pattern:
        stay, of = map(int, pattern.split(":"))
        if score.shape[1] % of:
            raise UserError(
                f"{pattern} sparsity needs inputs in groups of {of}; a linear has {score.shape[1]}."
            )
        return _highest(score.unflatten(1, (-1, of)), stay).flatten(1)
    compared = score if by_row else score.flatten()
    count = compared.shape[-1]
    return _highest(compared, count - round(float(pattern) * count)).view_as(score)


def _highest(score: Tensor, count: int) -> Tensor:
    """True at the `count` highest of the last dimension; of equal ones, the first."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)
