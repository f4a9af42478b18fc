"""Attention in which a key counts only where its token executed the layer, with a gradient to that decision.

Training computes every layer for every token (QTALE Sec. 3.1, after D-LLM). A bypassed token must leave no
key there, yet its gate must learn what its key would have changed. D-LLM multiplies the attention weights by
the keep mask and renormalises; this is the same in log-sum form: the values are those of -inf masking.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _GatedAttention(torch.autograd.Function):
    """softmax over kept keys, times values; autograd's own graph of it would dominate small CPU runs.

    In powers of 2: torch's CPU exp takes 25 times as long as exp2 on masked scores.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        keep: Tensor,
        scaling: float,
        max_pull: float,
    ) -> Tensor:
        batch, heads, length, width = query.shape
        shape = batch, key.shape[1], heads // key.shape[1] * length, width
        query = query.reshape(shape) * (scaling / math.log(2))  # [B, KV, G*T, D]
        scores = query @ key.transpose(-1, -2)  # [B, KV, G*T, K]
        scores = scores.float() if scores.dtype.itemsize < 4 else scores
        keep = keep.to(scores.dtype)[:, None, None]  # [B, 1, 1, K]
        reach = _reach(scores, mask.to(scores.dtype), keep, math.log2(max_pull))
        attention = reach * keep
        scale = attention.sum(-1, keepdim=True).reciprocal_()
        reach, attention = reach.mul_(scale), attention.mul_(scale).to(value.dtype)
        ctx.save_for_backward(query, key, value, reach, keep, attention)
        ctx.scaling = scaling
        return (attention @ value).view(batch, heads, length, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, reach, keep, attention = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(query.shape)
        grad_value = attention.transpose(-1, -2) @ grad
        pull = (grad @ value.transpose(-1, -2)).to(reach.dtype)
        pull = pull.sub_((pull * attention).sum(-1, keepdim=True)).mul_(reach)
        grad_keep = pull.sum((1, 2))
        grad_scores = pull.mul_(keep).to(query.dtype)
        grad_query = (grad_scores @ key).mul_(ctx.scaling).view(shape)
        grad_key = (grad_scores.transpose(-1, -2) @ query).mul_(math.log(2))
        return grad_query, grad_key, grad_value, None, grad_keep, None, None


def _reach(scores: Tensor, mask: Tensor, keep: Tensor, limit: float) -> Tensor:
    """2^scores of all visible keys, evicted ones too, against each query's strongest kept key; in place.

    Evicted keys are held at 2^limit; kept ones, at most 1, never reach it, so that values stay exact.
    """
    groups = scores.shape[2] // mask.shape[2]
    by_query = scores.unflatten(2, (groups, -1))  # [B, KV, G, T, K]
    kept = mask.masked_fill(keep == 0, torch.finfo(mask.dtype).min)
    strongest = (by_query + kept[:, :, None]).amax(-1, keepdim=True)
    by_query += mask[:, :, None]
    by_query.sub_(strongest).clamp_(max=limit).exp2_()
    return scores


def gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    *,
    keep: Tensor,
    max_pull: float,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers attention function that counts a key by its token's gate.

    Args:
        query: [B, heads, T, D]; key, value: [B, key-value heads, T, D].
        attention_mask: [B or 1, 1, T, T], 0 where a key may be seen, the type's minimum where not.
        keep: hard gate of each key, exactly 0 or 1, [B, T]. It gets its gradient also where it is 0.
        max_pull: at least 1; see `RouterConfig`.
    Returns:
        ([B, T, heads, D], None). A query with no kept key in sight (a bypassed token under a sliding window)
        gets finite values of no meaning; the layer drops them.
    Raises:
        NotImplementedError: for attention dropout.
    """
    if dropout:
        raise NotImplementedError("routed training has no attention dropout: set attention_dropout to 0")
    output = _GatedAttention.apply(query, key, value, attention_mask, keep, scaling, max_pull)
    return output.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("qtale_gated", gated_attention)


@contextmanager
def attending_by(attention: nn.Module, implementation: str) -> Iterator[None]:
    """Let one attention module use a registered function meanwhile; others share its config and must not."""
    config = attention.config
    attention.config = SimpleNamespace(_attn_implementation=implementation)
    try:
        yield
    finally:
        attention.config = config


def gated(attention: nn.Module) -> AbstractContextManager[None]:
    """Let one attention module use `gated_attention` meanwhile."""
    return attending_by(attention, "qtale_gated")
