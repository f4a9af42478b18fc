"""The losses on routes: execution rate and entropy (QTALE Eq. 4, 7, 8; D-LLM's code where it is silent)."""

import math
from typing import Literal

import torch
from torch import Tensor


def counted_tokens(valid: Tensor, reserved: int, whole: bool = True) -> Tensor:
    """The tokens that the rate and entropy losses see (D-LLM).

    Left out: padding, the first `reserved` tokens and the last token of each sequence.

    Args:
        valid: bool [B, T], False on padding (left or right).
        reserved: how many first tokens of a sequence always run (`RouterConfig.always_run_tokens`).
        whole: whether the sequences hold their last token; scored ones are fed without it.
    Returns:
        bool [B, T].
    """
    index = valid.cumsum(-1) - 1
    end = valid.sum(-1, keepdim=True) - int(whole)
    return valid & (index >= reserved) & (index < end)


def rate_loss(
    gates: Tensor, counted: Tensor, target: float, kind: Literal["per_token", "mean"] = "per_token"
) -> Tensor:
    """Distance of the execution rate from its target.

    Args:
        gates: [L, B, T], 1 where a token executes a layer, over all decoder layers (always-run ones are 1).
        counted: bool [B, T] of `counted_tokens`.
        kind: "per_token", D-LLM's code: mean over tokens of |mean over layers - target|;
            "mean", Eq. 4 as printed: |mean over tokens and layers - target|.
    Returns:
        scalar; 0 if no token counts.
    """
    per_token = gates.mean(0)  # [B, T]
    if kind == "mean":
        return (masked_mean(per_token, counted) - target * counted.any()).abs()  # of this batch alone
    if kind == "per_token":
        return masked_mean((per_token - target).abs(), counted)
    raise ValueError(f'rate loss {kind!r} is neither "per_token" nor "mean"')


def share_of_mean_rate(gates: Tensor, counted: Tensor, target: float, rate: Tensor, tokens: Tensor) -> Tensor:
    """A part's share of |rate − target|, `rate` being that of a whole batch, known beforehand.

    Shares add up to it, and so do their gradients, as its sign is the same for all parts.

    Args:
        gates: [L, B, T] of the part; counted: bool [B, T].
        rate: mean of the gates over all counted tokens of the whole; tokens: how many these are.
    """
    mine = torch.where(counted, gates.mean(0) - target, 0).sum() / tokens
    return (rate - target).sign() * mine


def entropy_loss(soft: Tensor, counted: Tensor) -> Tensor:
    """Mean entropy of the soft Gumbel samples (Eq. 7), at most log 2; the total subtracts it (Eq. 8).

    Args:
        soft: b-tilde of Eq. 6, [routed layers, B, T, 2].
        counted: bool [B, T] of `counted_tokens`.
    Returns:
        scalar, in nats; 0 if no token counts.
    """
    # entr has an infinite slope at 0, which softmax's zero slope there would turn into NaN
    entropy = torch.special.entr(soft.clamp_min(torch.finfo(soft.dtype).tiny)).sum(-1)
    return masked_mean(entropy.mean(0), counted)


def lambda1_at(progress: float, lambda1: float) -> float:
    """Weight of the rate loss at `progress` = epochs done / all epochs: λ1 · sin(π/2 · progress)."""
    return lambda1 * math.sin(math.pi / 2 * progress)


def total_loss(ce: Tensor, rate: Tensor, entropy: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """CE + λ1 · L_rate - λ2 · L_entropy (Eq. 8); `lambda1` is the ramped one."""
    return ce + lambda1 * rate - lambda2 * entropy


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; 0 if it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)
