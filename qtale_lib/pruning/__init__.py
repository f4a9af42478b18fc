"""Other compression than quantization, of a merged model in 16 bits: weights or whole layers left out.

    prune(model, tokenizer, texts, weights="wanda 2:4")    # in place
    prune(model, tokenizer, texts, layers="sleb 3")
    print(model.pruning)

weights (weights.py): "magnitude 0.5" or "wanda 0.5" sets half of every decoder linear to zero, "… 2:4" two of
every four neighbours; a routed model is pruned as any other. layers (layers.py): "block_influence 3" or
"sleb 3" removes three decoder layers, "early_exit 0.9" lets a token skip all layers once it is confident.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qtale_lib.errors import UserError
from qtale_lib.pruning.layers import CHOICES, leave_early, remove_layers
from qtale_lib.pruning.weights import prune_weights
from qtale_lib.quantization.statistics import is_routed, tokenize

__all__ = ["prune"]


@torch.no_grad()
def prune(
    model: nn.Module,
    tokenizer=None,
    texts: Iterable[str] | None = None,
    weights: str = "none",
    layers: str = "none",
    max_length: int = 512,
) -> nn.Module:
    """Prune `model` in place; what was done is then in `model.pruning`, ready for JSON.

    Args:
        texts: to calibrate on; magnitude and early_exit need none.
        weights, layers: as above, or "none"; one of them.
        max_length: longer texts, in tokens, are left out.
    Raises:
        UserError: for both or neither, a routed model whose layers are to be removed, a method that misses
            its texts, or a number that does not fit the model.
    """
    if (weights == "none") == (layers == "none"):
        raise UserError("prune either weights or layers: one of the two must say how, the other none.")
    method, _, amount = (weights if layers == "none" else layers).partition(" ")
    rows = None
    if method not in ("magnitude", "early_exit"):
        if texts is None:
            raise UserError(f"{method} calibrates on text; pass a tokenizer and a list of texts.")
        rows, _ = tokenize(tokenizer, texts, min(max_length, model.config.max_position_embeddings))
    if weights != "none":
        model.pruning = prune_weights(model, method, amount, rows)
        return model
    if is_routed(model):
        raise UserError("layers are removed from models without routers: routers skip layers themselves.")
    if method == "early_exit":
        model.pruning = leave_early(model, float(amount))
    else:
        model.pruning = remove_layers(model, method, CHOICES[method](model, rows, int(amount)))
    return model
