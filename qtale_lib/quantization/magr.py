"""MagR (Zhang et al., 2024): pull in the largest weights, as far as the outputs do not mind, before rounding.

A group's step follows from its range, so one large weight costs all others precision. Each row w of a layer
is moved to where ½ (v − w) M (v − w)ᵀ + α Σ |v_g|∞ is least, M being the second moment of its inputs and g
its groups. Where inputs are nearly of low rank, ranges shrink much and outputs hardly change. Nothing is left
to undo at inference.

The minimum is found by proximal gradient steps. The proximal step of t |·|∞ takes away the projection onto
the ℓ1 ball of radius t (Moreau), found by sorting (Duchi et al., 2008).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtale_lib.quantization import gptq
from qtale_lib.quantization.report import LayerSearch
from qtale_lib.quantization.statistics import InputStatistics

ALPHA = 0.1
STEPS = 150


def search_layer(
    layer: nn.Module, statistics: dict[str, InputStatistics], bits: int, group_size: int
) -> LayerSearch:
    """GPTQ's search of one decoder layer, on weights with smaller ranges."""
    return gptq.search_layer(layer, statistics, bits, group_size, magr)


def magr(weight: Tensor, moment: Tensor, group_size: int, alpha: float = ALPHA, steps: int = STEPS) -> Tensor:
    """`weight` [out, in] with smaller ranges of its groups, float32; nearly the same outputs.

    Args:
        moment: mean of x xᵀ over the calibration tokens [in, in].
        group_size: weights that will share a step; −1 is the whole row.
        alpha: of the ranges against the output error, where inputs and weights have a mean square of 1: a
            layer's scale plays no part. The authors' 0.001 is for weights as they are, of some 0.02.
    """
    group = weight.shape[1] if group_size == -1 else group_size
    scaled = moment / moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    alpha = alpha * weight.square().mean().sqrt()
    rate = 1 / torch.linalg.eigvalsh(scaled)[-1].clamp(min=1.0)  # a gradient step's length: 1 / Lipschitz
    moved = weight.clone()
    for _ in range(steps):
        moved -= rate * ((moved - weight) @ scaled)
        moved = shrink_ranges(moved.unflatten(1, (-1, group)), alpha * rate).flatten(1)
    return moved


def shrink_ranges(groups: Tensor, weight: Tensor | float) -> Tensor:
    """Proximal step of weight · |·|∞ over the last dimension: v minus its projection onto the ℓ1 ball."""
    return groups - project_l1(groups, weight)


def project_l1(vectors: Tensor, radius: Tensor | float) -> Tensor:
    """The nearest points [..., n] whose absolute values sum to at most `radius`."""
    sizes = vectors.abs()
    ordered = sizes.sort(-1, descending=True).values
    over = ordered.cumsum(-1) - radius
    ranks = torch.arange(1, vectors.shape[-1] + 1, device=vectors.device, dtype=vectors.dtype)
    counted = (ordered * ranks > over).sum(-1, keepdim=True).clamp(min=1)
    bound = over.gather(-1, counted - 1) / counted
    return vectors.sign() * (sizes - bound.clamp(min=0)).clamp(min=0)
