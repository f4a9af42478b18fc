"""Key-value caches of the two execution modes; a token that bypasses a layer leaves no key there (Sec. 3.1).

The dense mode computes and stores the keys of all tokens; to decode with a cache it must know later which of
them not to show (`EvictingLayer`). The skipping mode stores those of executed tokens only (`ExecutedLayer`).
Both are layers of an ordinary `DynamicCache`, which `generate` makes and hands on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from qtale_lib.errors import UserError

FREE = 2**62  # position of an empty slot: after every token, so no query sees it; exact as pad's float
SPARE_SLOTS = 16  # room that a full row gains: decoding then copies old keys once in so many steps


class EvictingLayer(DynamicLayer):
    """One layer's keys and values, and `kept` [B, K]: True where the key's token executed the layer."""

    kept: Tensor | None = None

    def extend(self, executed: Tensor) -> Tensor:
        """Append the new tokens' decisions, bool [B, T]; returns those of all keys, bool [B, K]."""
        self.kept = executed if self.kept is None else torch.cat([self.kept, executed], dim=1)
        return self.kept

    def reset(self) -> None:
        super().reset()
        self.kept = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.kept is not None and tokens_to_remove:
            self.kept = self.kept[:, : -abs(tokens_to_remove)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.batch_select_kept(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.batch_select_kept(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.kept is not None:
            self.kept = self.kept.repeat_interleave(repeats, dim=0)

    def batch_select_kept(self, indices: Tensor) -> None:
        """Follow a choice of sequences made on keys and values."""
        if self.kept is not None:
            self.kept = self.kept[indices.to(self.kept.device)]


def track_evictions(cache: Cache, n_layers: int) -> None:
    """Make an empty `DynamicCache` remember evicted keys; one that does already is left alone.

    Sliding-window layers become full ones: the window is in the mask, and `kept` needs keys in their places.

    Raises:
        NotImplementedError: for other caches, and for one that was filled without routes.
    """
    if type(cache) is not DynamicCache:
        raise NotImplementedError(f"routed models decode with a DynamicCache, not a {type(cache).__name__}")
    if cache.get_seq_length() == 0:
        if not all(isinstance(layer, EvictingLayer) for layer in cache.layers) or not cache.layers:
            cache.layers = [EvictingLayer() for _ in range(n_layers)]
    elif not all(isinstance(layer, EvictingLayer) for layer in cache.layers):
        raise NotImplementedError("this cache was filled without routes: start from an empty one")


class ExecutedLayer(DynamicLayer):
    """Keys and values of the tokens that executed one layer, each row of the batch packed to the left.

    keys, values: [B, key-value heads, C, D]; slots are filled up to a row's length, the others are zero.
    positions: int64 [B, C], place of the slot's token in its sequence, padding counted; FREE if empty.
    lengths: int64 [B], filled slots of each row.
    longest: the greatest length; only an upper bound after rows were chosen unless they are `even`.
    even: all rows are known to be of one length.
    seen: tokens of the whole sequence so far, executed or not, which `get_seq_length` reports.
    """

    def __init__(self) -> None:
        super().__init__()
        self._empty()

    def _empty(self) -> None:
        self.positions: Tensor | None = None
        self.lengths: Tensor | None = None
        self.longest, self.even, self.seen = 0, True, 0

    def get_seq_length(self) -> int:
        """Tokens of the whole sequence, so that every layer tells transformers the same."""
        return self.seen

    def claim_even(self, positions: Tensor) -> slice:
        """Slots for as many new tokens in every row; positions: int64 [B, m]. Needs `even`."""
        start, count = self.longest, positions.shape[1]
        self._make_room(positions, start + count)
        self.positions[:, start : start + count] = positions
        self.lengths += count
        self.longest = start + count
        return slice(start, self.longest)

    def claim(
        self, row: Tensor, rank: Tensor, positions: Tensor, counts: Tensor, ends: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Slots for N tokens spread unevenly over the rows.

        Args:
            row, rank: [N], the token's row and its number among that row's new ones.
            positions: [N].
            counts: [B], new tokens of each row.
            ends: their lengths afterwards, on the host.
        """
        self._make_room(counts[:, None], max(ends))
        slot = self.lengths[row] + rank
        self.positions[row, slot] = positions
        self.lengths += counts
        self.measured(ends)
        return row, slot

    def measured(self, lengths: list[int]) -> None:
        """Take over what the host has learnt of the rows' lengths."""
        self.longest, self.even = max(lengths), min(lengths) == max(lengths)

    def write(self, key: Tensor, value: Tensor, slots: slice | tuple) -> tuple[Tensor, Tensor]:
        """Fill claimed slots; returns all keys and values up to the longest row, [B, heads, longest, D].

        key, value: [B, heads, m, D] for a slice, [1, heads, N, D] for (row, slot).
        """
        self.keys, self.values = self._fit(self.keys, key), self._fit(self.values, value)
        if isinstance(slots, slice):
            self.keys[:, :, slots], self.values[:, :, slots] = key, value
        else:
            row, slot = slots
            self.keys[row, :, slot] = key[0].transpose(0, 1)  # [N, heads, D]
            self.values[row, :, slot] = value[0].transpose(0, 1)
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def _make_room(self, like: Tensor, needed: int) -> None:
        """Slots for `needed` tokens a row, exactly so many at first; like: int64 [B, ...] on the device."""
        if self.positions is None:
            self.positions = like.new_full((len(like), needed), FREE)
            self.lengths = like.new_zeros(len(like))
        elif needed > self.positions.shape[1]:
            more = needed + SPARE_SLOTS - self.positions.shape[1]
            self.positions = torch.nn.functional.pad(self.positions, (0, more), value=FREE)

    def _fit(self, stored: Tensor | None, new: Tensor) -> Tensor:
        """`stored` with as many slots as there are positions; empty ones are zero, as NaN times 0 is NaN."""
        (batch, slots), (_, heads, _, width) = self.positions.shape, new.shape
        if stored is None:
            self.dtype, self.device, self.is_initialized = new.dtype, new.device, True
            return new.new_zeros(batch, heads, slots, width)
        more = slots - stored.shape[2]
        return torch.nn.functional.pad(stored, (0, 0, 0, more)) if more else stored

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Not used: a layer that skips claims slots and writes them."""
        raise NotImplementedError("an ExecutedLayer is filled by claim and write")

    def reset(self) -> None:
        super().reset()
        self._empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens of the sequence; costs a synchronisation."""
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}) keeps nothing known: pass minus the tokens to remove.")
        self.seen = max(0, self.seen + tokens_to_remove)
        if self.positions is not None and tokens_to_remove:
            stays = self.positions < self.seen
            self.positions.masked_fill_(~stays, FREE)
            self.lengths = stays.sum(1)
            self.measured(self.lengths.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.positions is not None:
            indices = indices.to(self.positions.device)
            self.positions, self.lengths = self.positions[indices], self.lengths[indices]
            self.keys, self.values = self.keys[indices], self.values[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)
            self.lengths = self.lengths.repeat_interleave(repeats, dim=0)
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)


def store_executed(cache: Cache, n_layers: int, always_run_layers: int) -> None:
    """Make an empty `DynamicCache` store executed tokens only; one that does already is left alone.

    Layers that always run keep their whole sequences, padding included, as transformers' masks ask for.

    Raises:
        UserError: for other caches, and for one that was filled in another way.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UserError(f"Skipping execution decodes with a plain DynamicCache, not a {kind}: pass none.")
    kinds = [EvictingLayer] * always_run_layers + [ExecutedLayer] * (n_layers - always_run_layers)
    if [type(layer) for layer in cache.layers] == kinds:
        return
    if cache.get_seq_length() > 0:
        raise UserError("This cache was not filled by skipping execution: start from an empty one.")
    cache.layers = [kind() for kind in kinds]


@dataclass(frozen=True)
class CacheSize:
    """What the cache of skipping execution holds, over all layers.

    tokens, token_bytes: (token, layer) pairs that executed, and their keys and values: the execution ratio's
        share of a full cache.
    slots, slot_bytes: what is allocated for them, with padding in always-run layers, rows filled up to the
        longest of their batch, and spare slots: all of it is real memory.
    """

    tokens: int = 0
    slots: int = 0
    token_bytes: int = 0
    slot_bytes: int = 0


def cache_size(cache: Cache) -> CacheSize:
    """Size of a cache that skipping execution filled.

    Raises:
        UserError: for another cache.
    """
    if not any(isinstance(layer, ExecutedLayer) for layer in cache.layers):
        raise UserError('Only set_execution(model, "skip") fills a cache with executed tokens alone: use it.')
    sizes = [_layer_size(layer) for layer in cache.layers if layer.is_initialized]
    return CacheSize(*map(sum, zip(*sizes, strict=True)))


def _layer_size(layer: EvictingLayer | ExecutedLayer) -> tuple[int, int, int, int]:
    tokens = int((layer.lengths if isinstance(layer, ExecutedLayer) else layer.kept).sum())
    slots = layer.keys.shape[0] * layer.keys.shape[2]
    nbytes = layer.keys.nbytes + layer.values.nbytes
    return tokens, slots, tokens * (nbytes // slots), nbytes
