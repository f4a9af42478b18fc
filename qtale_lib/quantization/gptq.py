"""GPTQ (Frantar et al., 2023): round column by column, and let those to come make up for the error.

A row of weights w with inputs of second moment M has the output error (ŵ − w) M (ŵ − w)ᵀ. Once a column is
rounded, the others' best answer to its error is known in closed form from the inverse of M: the sequence of
these answers is the Cholesky factor of that inverse. Rows are independent, and rounded side by side.

Choices, where implementations differ: a group's grid is that of `rtn.py` (asymmetric, zero on the grid), and
is taken when its first column is reached, from the weights as they are by then; columns go in their own
order; one that meets no input is rounded to nearest, where the authors' code puts zero; the moments are those
of the float model's inputs, as for AWQ here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtale_lib.errors import UserError
from qtale_lib.quantization.rtn import quantize_groups

DAMPING = 0.01  # of the mean of the moment's diagonal, added to it, as in the authors' code
BLOCK = 128  # columns whose corrections of all later columns are made at once


def gptq(weight: Tensor, moment: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and zero point of `weight` [out, in], in the form of `rtn.quantize_groups`.

    Args:
        moment: mean of x xᵀ over the calibration tokens [in, in], or a multiple of it.
    Returns:
        codes [out, in/group, group] in 0 … 2^bits − 1 (as floats), step and zero [out, in/group, 1].
    Raises:
        UserError: if the moment is not that of any inputs (not finite, or negative).
    """
    answers, left = _answers(moment), weight.clone()
    width = left.shape[1]
    group = width if group_size == -1 else group_size
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    steps, zeros = (left.new_empty(len(left), width // group) for _ in range(2))
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        for column in range(start, end):
            place = column // group
            if column % group == 0:
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
