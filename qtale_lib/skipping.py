"""Skipping execution: a layer computes the tokens that execute it, and no other (QTALE Sec. 3.1, inference).

The executed tokens of all rows are gathered, run through the layer's own modules and put back into the
residual stream. Where every row has as many of them, one row included, they stay a batch [B, m, d]; otherwise
everything but attention runs on them packed, [1, N, d], and attention on rows filled up to the longest.
The host learns the numbers of executed tokens once a layer: on a GPU that is its one synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward  # the same in all four families

from qtale_lib.gated_attention import attending_by
from qtale_lib.kv_cache import FREE, ExecutedLayer


@dataclass
class Step:
    """One layer in one forward pass.

    run: forward method of the decoder layer; attention: its attention module.
    positions: int64 [T], places of the new tokens in their sequences, padding counted.
    position_embeddings: cos and sin, [B or 1, T, D].
    store: the layer's cache, or None.
    past: how many tokens came before.
    """

    run: Callable[..., Tensor]
    attention: nn.Module
    positions: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    store: ExecutedLayer | None
    past: int

    @property
    def eager(self) -> bool:
        return self.attention.config._attn_implementation == "eager"

    @property
    def window_matters(self) -> bool:
        """The sequence is longer than this layer's sliding window."""
        window = _window(self.attention)
        return window is not None and self.past + len(self.positions) > window

    def mask(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """What each query may see, by positions: int64 [B, m], [B, K] -> [B, 1, m, K], additive if eager."""
        queries, keys = queries[:, None, :, None], keys[:, None, None]
        seen = keys <= queries
        if self.window_matters:
            seen &= keys > queries - _window(self.attention)
        if self.eager:
            return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return seen


def _window(attention: nn.Module) -> int | None:
    """Sliding window of a layer: Qwen's hang on the layer, Mistral's on the model."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def run_executed(step: Step, hidden_states: Tensor, executed: Tensor) -> Tensor:
    """A layer's output, where tokens that bypass it keep their hidden state; the cache gains the others.

    Args:
        hidden_states: [B, T, d].
        executed: bool [B, T], False on padding.
    """
    batch, length = executed.shape
    if step.store is not None:
        step.store.seen = step.past + length
    if batch * length == 1 and (step.store is None or step.store.even):  # decoding one sequence
        return _run_all(step, hidden_states) if executed.item() else hidden_states
    chosen = _choose(executed, step.store)
    if chosen is None:
        return hidden_states
    if chosen.even and len(chosen.flat) == batch * length:
        return _run_all(step, hidden_states)
    output = (_run_even if chosen.even else _run_ragged)(step, hidden_states, chosen)
    stream = hidden_states.flatten(0, 1)
    return stream.index_copy(0, chosen.flat, output.flatten(0, 1)).view_as(hidden_states)


@dataclass
class Claimed:
    """Slots in a layer's cache for its new tokens; stands for the cache while the layer runs."""

    store: ExecutedLayer
    slots: slice | tuple[Tensor, Tensor]

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Called by transformers' attention with the new keys and values; returns all of them."""
        return self.store.write(key, value, self.slots)


@dataclass
class Chosen:
    """Which of B × T tokens run, N of them.

    flat, row, column: int64 [N], row by row; rank: [N], a token's number among those of its row.
    counts: int64 [B], how many of each row; most: the greatest of them.
    ends: filled cache slots of each row afterwards.
    even: all rows have as many, now and in the cache.
    """

    flat: Tensor
    row: Tensor
    column: Tensor
    rank: Tensor
    counts: Tensor
    ends: list[int]
    most: int
    even: bool

    def gather(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """[B or 1, T, width] -> [*shape, width], shape being (B, m) or (1, N)."""
        index = self.column if len(tokens) == 1 else self.flat
        return tokens.flatten(0, 1).index_select(0, index).view(*shape, -1)


def _choose(executed: Tensor, store: ExecutedLayer | None) -> Chosen | None:
    """None where no token runs. Synchronises once."""
    (batch, length), counts = executed.shape, executed.sum(1)
    held = counts.new_zeros(batch) if store is None or store.lengths is None else store.lengths
    counted, filled = torch.stack([counts, held]).tolist()
    if not any(counted):
        return None
    flat = executed.flatten().nonzero_static(size=sum(counted))[:, 0]
    row, rank = flat // length, executed.cumsum(1).flatten()[flat] - 1
    ends = [new + old for new, old in zip(counted, filled, strict=True)]
    if store is not None:
        store.measured(filled)
    even = len(set(counted)) == len(set(filled)) == 1
    return Chosen(flat, row, flat - row * length, rank, counts, ends, max(counted), even)


# Every row runs as many tokens: the layer runs as it is, on a shorter batch.


def _run_all(step: Step, hidden_states: Tensor) -> Tensor:
    positions = step.positions.expand(len(hidden_states), -1)
    return _run_batch(step, hidden_states, step.position_embeddings, positions)


def _run_even(step: Step, hidden_states: Tensor, chosen: Chosen) -> Tensor:
    shape = len(hidden_states), chosen.most
    embeddings = tuple(chosen.gather(table, shape) for table in step.position_embeddings)
    positions = step.positions[chosen.column].view(shape)
    return _run_batch(step, chosen.gather(hidden_states, shape), embeddings, positions)


def _run_batch(
    step: Step, hidden_states: Tensor, embeddings: tuple[Tensor, Tensor], positions: Tensor
) -> Tensor:
    """hidden_states: [B, m, d]; positions: int64 [B, m]."""
    store, stored = step.store, 0
    if store is not None:
        stored, slots = store.longest, store.claim_even(positions)
    several = positions.shape[1] > 1
    mask = None  # as keys lie in the order of their tokens
    if step.window_matters or (several and (stored or step.eager)):
        keys = positions if store is None else store.positions[:, : store.longest]
        mask = step.mask(positions, keys, hidden_states.dtype)
    cache = None if store is None else Claimed(store, slots)
    return step.run(hidden_states, attention_mask=mask, past_key_values=cache, position_embeddings=embeddings)


# Rows differ: packed tokens, with attention over filled rows.


def _run_ragged(step: Step, hidden_states: Tensor, chosen: Chosen) -> Tensor:
    total, rank = len(chosen.flat), chosen.rank
    rows = Rows(len(hidden_states), chosen.most, chosen.row, rank, step.eager)
    store = ExecutedLayer() if step.store is None else step.store
    stored, positions = store.longest, step.positions[chosen.column]
    slots = store.claim(chosen.row, rank, positions, chosen.counts, chosen.ends)
    mask = None  # fresh rows are filled up on the right, which causality hides already
    if stored or step.window_matters or step.eager:
        queries, keys = rows.spread(positions, FREE), store.positions[:, : store.longest]
        mask = step.mask(queries, keys, hidden_states.dtype)
    embeddings = tuple(chosen.gather(table, (1, total)) for table in step.position_embeddings)
    with attending_by(step.attention, "qtale_ragged"):
        return step.run(
            chosen.gather(hidden_states, (1, total)),
            attention_mask=mask,
            past_key_values=Claimed(store, slots),
            position_embeddings=embeddings,
            rows=rows,
        )


@dataclass
class Rows:
    """Where N packed tokens lie in rows [B, most] that are filled up on the right; row, rank: int64 [N]."""

    batch: int
    most: int
    row: Tensor
    rank: Tensor
    eager: bool

    def spread(self, packed: Tensor, filler: int = 0) -> Tensor:
        """[N, ...] -> [B, most, ...]."""
        rows = packed.new_full((self.batch, self.most, *packed.shape[1:]), filler)
        rows[self.row, self.rank] = packed
        return rows


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    rows: Rows,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers attention function for packed queries: each sees the keys of its own row.

    Args:
        query: [1, heads, N, D]; key, value: [B, key-value heads, K, D].
        attention_mask: [B, 1, most, K]; None is causal.
    Returns:
        ([1, N, heads, D], None).
    """
    attend = eager_attention_forward if rows.eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    query = rows.spread(query[0].transpose(0, 1)).transpose(1, 2)  # [B, heads, most, D]
    output, _ = attend(module, query, key, value, attention_mask, **kwargs)
    return output[rows.row, rows.rank][None], None


ALL_ATTENTION_FUNCTIONS.register("qtale_ragged", ragged_attention)
