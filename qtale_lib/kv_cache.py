"""Key-value cache of the dense mode: beside each layer's keys it remembers which of them were evicted.

A token that bypasses a layer leaves no key or value there (QTALE Sec. 3.1). The dense mode computes them all
the same; to decode with a cache it must know later which keys not to show.
"""

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


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
