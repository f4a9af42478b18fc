"""GPTQ (Frantar et al., 2023): round column by column, and let those to come make up for the error.

A row of weights w with inputs of second moment M has the output error (ŵ − w) M (ŵ − w)ᵀ. Once a column is
rounded, the others' best answer to its error is known in closed form from the inverse of M: the sequence of
these answers is the Cholesky factor of that inverse. Rows are independent, and rounded side by side.

Choices, where implementations differ: a group's grid is that of `rtn.py` (asymmetric, zero on the grid), and
from the weights as they were, since columns go by falling power of their inputs (the authors' act-order with
static groups: what comes first has the most left to make up for it, and groups stay where a packed layer has
them; "static" is llm-compressor's name); `act_order=False` goes from left to right and takes a group's grid
when its first column is reached; a column that meets no input is rounded to nearest, where the authors' code
puts zero; the moments are those of the float model's inputs, as for AWQ here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.bitpack import pack_codes
from qtale_lib.quantization.report import LayerSearch
from qtale_lib.quantization.rtn import quantize_groups
from qtale_lib.quantization.statistics import READERS, InputStatistics

DAMPING = 0.01  # of the mean of the moment's diagonal, added to it, as in the authors' code
BLOCK = 128  # columns whose corrections of all later columns are made at once


def search_layer(
    layer: nn.Module,
    statistics: dict[str, InputStatistics],
    bits: int,
    group_size: int,
    prepare: Callable[[Tensor, Tensor, int], Tensor] = lambda weight, moment, group_size: weight,
) -> LayerSearch:
    """Codes, steps and zeros of one decoder layer's linears, each moved by `prepare` before it is rounded."""
    found = LayerSearch()
    for producer, readers in READERS.items():
        moment = statistics[producer].moment
        for name in readers:
            weight = prepare(layer.get_submodule(name).weight.float(), moment, group_size)
            codes, step, zero = gptq(weight, moment, bits, group_size)
            found.codes[name] = pack_codes(codes.flatten(1).byte(), bits)
            found.steps[name], found.zeros[name] = step.squeeze(-1), zero.squeeze(-1).byte()
    return found


def gptq(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, act_order: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and zero point of `weight` [out, in], in the form of `rtn.quantize_groups`.

    Args:
        moment: mean of x xᵀ over the calibration tokens [in, in], or a multiple of it.
        act_order: columns of the most powerful inputs first; False: from left to right.
    Returns:
        codes [out, in/group, group] in 0 … 2^bits − 1 (as floats), step and zero [out, in/group, 1].
    Raises:
        UserError: if the moment is not that of any inputs (not finite, or negative).
    """
    width = weight.shape[1]
    group = width if group_size == -1 else group_size
    order = torch.arange(width, device=weight.device)
    if act_order:
        order = moment.diagonal().argsort(descending=True, stable=True)
    answers, left = _answers(moment[order][:, order]), weight[:, order]
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    steps, zeros = (part.squeeze(-1) for part in quantize_groups(weight, bits, group_size)[1:])
    places = (order // group).tolist()
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        for column in range(start, end):
            place = places[column]
            if not act_order and column % group == 0:
                open_ = left[:, column : column + group].clone()
                beyond = slice(end, column + group)  # empty, unless the group reaches out of the block
                open_[:, end - column :] -= errors[:, start:column] @ answers[start:column, beyond]
                _, step, zero = quantize_groups(open_, bits, -1)
                steps[:, place], zeros[:, place] = step[:, 0, 0], zero[:, 0, 0]
            step, zero = steps[:, place], zeros[:, place]
            code = ((left[:, column] / step).round() + zero).clamp(0, 2**bits - 1)
            error = (left[:, column] - (code - zero) * step) / answers[column, column]
            left[:, column + 1 : end] -= error[:, None] * answers[column, column + 1 : end]
            codes[:, column], errors[:, column] = code, error
        left[:, end:] -= errors[:, start:end] @ answers[start:end, end:]
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    return codes.unflatten(1, (-1, group)), steps[..., None], zeros[..., None]


def _answers(moment: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse [in, in]."""
    scale = moment.diagonal().mean()
    if not torch.isfinite(moment).all() or not scale > 0:
        raise UserError("GPTQ needs the second moments of real inputs; these are not finite, or all zero.")
    unused = moment.diagonal() <= 0
    damped = moment + torch.diag(DAMPING * scale + unused * scale)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise UserError("GPTQ needs the second moments of real inputs; these have a negative direction.")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
