"""AWQ, activation-aware weight quantization (Lin et al., 2024), in compact form: the paper's quantizer.

Weight columns that meet large inputs matter most. The linears that read one input have its columns scaled up
before rounding, and the scale is folded out of whatever produced that input; how much is searched on a grid.
Then each weight group's range is clipped, where that lowers its output error.

Choices, where implementations differ:
- The inputs of every layer are those of the float model, as in llm-awq and autoawq: no layer is calibrated on
  the quantization error of those before it, so one set of statistics serves all layers.
- Scales weigh inputs against weights as autoawq's do (`candidate_scales`); no scaling at all is on the grid
  too, so that the search never does worse than round-to-nearest by its own objective.
- That objective is the sum of the readers' output errors, exact from second moments (statistics.py). llm-awq
  and autoawq compare the outputs of the attention or MLP block instead; a test holds the two together.
- o_proj's scale is folded into v_proj also under grouped-query attention, where they skip it: the heads that
  share a value head share its scale.
- q and k are not clipped, as there: their product, not each alone, is what attention sees.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qtale_lib.quantization.report import LayerSearch
from qtale_lib.quantization.rtn import by_rows, fake_quantize, row_chunks
from qtale_lib.quantization.statistics import READERS, InputStatistics

ALPHAS = tuple(step / 20 for step in range(20))
CLIP_RATIOS = tuple(1 - step / 20 for step in range(10))
TINY = 1e-30
NOT_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")


class FoldedLinear(NamedTuple):
    """A linear with scales folded in.

    weight: float32 [out, in], columns times the scale of its input, rows divided by that of its output.
    moment: [in, in], of the scaled-down inputs; None where it was not asked for.
    row_scale: the scale of its output [out]; None where it has none.
    """

    name: str
    weight: Tensor
    moment: Tensor | None
    row_scale: Tensor | None


def search_layer(
    layer: nn.Module, statistics: dict[str, InputStatistics], bits: int, group_size: int
) -> LayerSearch:
    """Search scales, then clips, of one decoder layer from its input statistics."""
    alphas, scales, clips = {}, {}, {}
    for producer, readers in READERS.items():
        weights = [layer.get_submodule(name).weight for name in readers]
        heads = value_heads(layer) if producer == "self_attn.v_proj" else None
        alphas[producer], scales[producer] = search_scale(
            weights, statistics[producer], bits, group_size, heads
        )
    for linear in folded_linears(layer, scales, statistics):
        if linear.name not in NOT_CLIPPED:
            clips[linear.name] = search_clip(linear.weight, linear.moment, bits, group_size)
    return LayerSearch(alphas, scales, clips)


def search_scale(
    weights: list[Tensor],
    inputs: InputStatistics,
    bits: int,
    group_size: int,
    heads: tuple[int, int] | None = None,
) -> tuple[float | None, Tensor]:
    """Best (α, scale [in]) for linears `weights` [out, in] that read the same inputs; α None: unscaled.

    `heads` = (value heads, query heads per value head) ties the scales of query heads that share a value
    head.
    """
    weight = torch.cat(weights)

    def error(rows: Tensor, scale: Tensor) -> float:
        rounded = fake_quantize(rows * scale, bits, group_size) / scale
        return output_error(rounded - rows, inputs.moment).sum().item()

    best_alpha, best_scale, best_error = None, torch.ones_like(inputs.mean_abs), torch.inf
    for alpha, scale in candidate_scales(weight, inputs.mean_abs, group_size, heads):
        total = sum(error(rows, scale) for rows in row_chunks(weight))
        if total < best_error:
            best_alpha, best_scale, best_error = alpha, scale, total
    return best_alpha, best_scale


def candidate_scales(
    weight: Tensor, mean_abs: Tensor, group_size: int, heads: tuple[int, int] | None
) -> Iterator[tuple[float | None, Tensor]]:
    """The grid: no scaling, then mean|x|^α / mean(|w| / largest |w| of its group)^(1 − α), centred on 1."""
    relative = sum(_relative(rows, group_size).sum(0) for rows in row_chunks(weight)) / len(weight)
    if heads is not None:
        mean_abs, relative = _shared(mean_abs, heads), _shared(relative, heads)
    mean_abs = mean_abs.clamp(min=1e-4 * mean_abs.max()).clamp(min=TINY)
    relative = relative.clamp(min=1e-4)
    yield None, torch.ones_like(mean_abs)
    for alpha in ALPHAS:
        scale = mean_abs**alpha / relative ** (1 - alpha)
        yield alpha, scale / (scale.max() * scale.min()).sqrt()


def _relative(weight: Tensor, group_size: int) -> Tensor:
    """|w| / largest |w| of its group, [out, in]."""
    groups = weight.abs().unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=TINY)).flatten(1)


def search_clip(weight: Tensor, moment: Tensor, bits: int, group_size: int) -> Tensor:
    """Largest magnitude [out, in/group] to keep of each group of `weight` [out, in]."""
    width = weight.shape[1]
    group = width if group_size == -1 else group_size
    blocks = torch.stack([moment[i : i + group, i : i + group] for i in range(0, width, group)])
    return by_rows(lambda rows: _search_clip(rows, blocks, bits), weight)


def _search_clip(weight: Tensor, blocks: Tensor, bits: int) -> Tensor:
    """The same, by the diagonal blocks [in/group, group, group] of the moment."""
    groups = weight.unflatten(1, (-1, blocks.shape[1])).transpose(0, 1)  # [out, in] -> [in/group, out, group]
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
) -> Iterator[FoldedLinear]:
    """Each linear of `layer` as it is once `scales` are folded; the layer itself is left as it is."""
    outgoing = outgoing_scales(layer, scales)
    for producer, readers in READERS.items():
        scale = scales.get(producer)
        moment = statistics[producer].moment if statistics else None
        if scale is not None and moment is not None:
            moment = by_rows(partial(_scaled_down, scale), moment, scale)
        for name in readers:
            weight = layer.get_submodule(name).weight.float()
            if scale is not None:
                weight = weight * scale
            row_scale = outgoing.get(name)
            if row_scale is not None:
                weight = weight / row_scale[:, None]
            yield FoldedLinear(name, weight, moment, row_scale)


def _scaled_down(scale: Tensor, rows: Tensor, row_scale: Tensor) -> Tensor:
    """Rows of a second moment once inputs are divided by `scale` [in]; `row_scale`: of these rows."""
    return rows / torch.outer(row_scale, scale)


def outgoing_scales(layer: nn.Module, scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scale that divides each producer's output [out]; value heads hold one of their equal copies."""
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
