"""AWQ: activation-aware weight quantization (Lin et al., 2024), compact and aware of routed layers (paper, Sec. 4).

Weight columns that meet large inputs matter most. Each group of linears that reads one input has its columns scaled up
before rounding, by s = mean|x|^α, and the scale is folded out of whatever produced that input; α is searched on a grid.
Then each weight group's range is clipped, where that lowers its output error.

Choices, where implementations differ:
- The inputs of every layer are those of the float model, as in llm-awq and autoawq: no layer is calibrated on the
  quantization error of those before it, so one set of statistics serves all layers (and all bit widths).
- The objective of a scale is the sum of its linears' output errors, exact from second moments (statistics.py). llm-awq
  compares the outputs of the attention or MLP block instead.
- o_proj's scale is folded into v_proj also under grouped-query attention, where llm-awq skips it: the heads that share
  a value head share its scale.
- q and k are not clipped, as in llm-awq: their product, not each alone, is what attention sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtale_lib.quantization.rtn import fake_quantize
from qtale_lib.quantization.statistics import READERS, InputStatistics

ALPHAS = tuple(step / 20 for step in range(20))
CLIP_RATIOS = tuple(1 - step / 20 for step in range(10))
NOT_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass
class LayerSearch:
    """What AWQ found for one decoder layer: alphas and scales [in] by producer, clips [out, in/group] by linear."""

    alphas: dict[str, float]
    scales: dict[str, Tensor]
    clips: dict[str, Tensor]


def search_layer(
    layer: nn.Module, statistics: dict[str, InputStatistics], bits: int, group_size: int
) -> LayerSearch:
    """Search scales, then clips, of one decoder layer from its input statistics; the layer is left as it is."""
    alphas, scales, clips = {}, {}, {}
    for producer, readers in READERS.items():
        weights = [layer.get_submodule(name).weight.float() for name in readers]
        heads = value_heads(layer) if producer == "self_attn.v_proj" else None
        alphas[producer], scales[producer] = search_scale(weights, statistics[producer], bits, group_size, heads)
    for name, weight, moment, _ in folded_linears(layer, scales, statistics):
        if name not in NOT_CLIPPED:
            clips[name] = search_clip(weight, moment, bits, group_size)
    return LayerSearch(alphas, scales, clips)


def search_scale(
    weights: list[Tensor], inputs: InputStatistics, bits: int, group_size: int, heads: tuple[int, int] | None = None
) -> tuple[float, Tensor]:
    """Best (α, scale [in]) for linears `weights` [out, in] that read the same inputs.

    `heads` = (value heads, query heads per value head) ties the scales of query heads that share a value head.
    """
    weight = torch.cat(weights)
    mean_abs = inputs.mean_abs if heads is None else _shared(inputs.mean_abs, heads)
    mean_abs = mean_abs.clamp(min=1e-4 * mean_abs.max()).clamp(min=1e-30)
    best_alpha, best_scale, best_error = 0.0, torch.ones_like(mean_abs), torch.inf
    for alpha in ALPHAS:
        scale = mean_abs**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = fake_quantize(weight * scale, bits, group_size) / scale
        error = output_error(rounded - weight, inputs.moment).sum().item()
        if error < best_error:
            best_alpha, best_scale, best_error = alpha, scale, error
    return best_alpha, best_scale


def search_clip(weight: Tensor, moment: Tensor, bits: int, group_size: int) -> Tensor:
    """Largest magnitude [out, in/group] to keep in each group of `weight` [out, in], by the group's own output error."""
    width = weight.shape[1]
    group = width if group_size == -1 else group_size
    groups = weight.unflatten(1, (-1, group)).transpose(0, 1)  # [out, in] -> [in/group, out, group]
    blocks = torch.stack([moment[i : i + group, i : i + group] for i in range(0, width, group)])
    limit = groups.abs().amax(-1, keepdim=True)  # [in/group, out, 1]
    best, best_error = limit.clone(), torch.full_like(limit, torch.inf)
    for ratio in CLIP_RATIOS:
        clipped = groups.clamp(-ratio * limit, ratio * limit)
        difference = fake_quantize(clipped, bits, -1) - groups
        error = output_error(difference, blocks).unsqueeze(-1)
        better = error < best_error
        best = torch.where(better, ratio * limit, best)
        best_error = torch.where(better, error, best_error)
    return best.squeeze(-1).T.contiguous()  # [in/group, out, 1] -> [out, in/group]


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Mean square over tokens of `difference` x, per row: [..., out, in], [..., in, in] -> [..., out]."""
    return ((difference @ moment) * difference).sum(-1)


def clip_weight(weight: Tensor, clip: Tensor) -> Tensor:
    """`weight` [out, in] with each group limited to ± `clip` [out, in/group]."""
    limit = clip.repeat_interleave(weight.shape[1] // clip.shape[1], dim=1)
    return torch.minimum(torch.maximum(weight, -limit), limit)


def folded_linears(
    layer: nn.Module, scales: dict[str, Tensor], statistics: dict[str, InputStatistics] | None = None
) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """Each linear of `layer` as it is once `scales` are folded: (name, weight float32 [out, in], moment, row scale).

    The weight's columns carry the scale of its input and its rows are divided by the scale of its output (None where it
    has none); `moment` is that of the scaled-down inputs, None without `statistics`.
    """
    outgoing = outgoing_scales(layer, scales)
    for producer, readers in READERS.items():
        scale = scales.get(producer)
        moment = statistics[producer].moment if statistics else None
        if scale is not None and moment is not None:
            moment = moment / torch.outer(scale, scale)
        for name in readers:
            weight = layer.get_submodule(name).weight.float()
            if scale is not None:
                weight = weight * scale
            rows = outgoing.get(name)
            yield name, weight if rows is None else weight / rows[:, None], moment, rows


def outgoing_scales(layer: nn.Module, scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scale by which each producer's output [out] is divided; value heads hold one of their equal copies."""
    outgoing = dict(scales)
    if "self_attn.v_proj" in outgoing:
        heads, copies = value_heads(layer)
        outgoing["self_attn.v_proj"] = outgoing["self_attn.v_proj"].view(heads, copies, -1)[:, 0].flatten()
    return outgoing


def value_heads(layer: nn.Module) -> tuple[int, int]:
    """(value heads, query heads that share each)."""
    attention = layer.self_attn
    copies = attention.o_proj.in_features // attention.v_proj.out_features
    return attention.v_proj.out_features // attention.head_dim, copies


def _shared(mean_abs: Tensor, heads: tuple[int, int]) -> Tensor:
    """`mean_abs` [query heads · head dim] averaged over the heads that share a value head."""
    by_head = mean_abs.view(*heads, -1)  # [value heads, copies, head dim]
    return by_head.mean(1, keepdim=True).expand_as(by_head).flatten()
