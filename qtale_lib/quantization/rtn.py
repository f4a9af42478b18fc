"""Round-to-nearest: the grid that every quantizer here ends on, and the floor under AWQ (paper, Sec. 4, Table
1).

A weight row is cut into groups; each group gets 2^bits evenly spaced values that span its range and contain
zero exactly (asymmetric, integer zero point). Weights are fake-quantized: rounded to the grid, kept as
floats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import gcd

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError

BITS = (2, 3, 4, 8)
CHUNK = 2**20  # weights worked on at once: float32 copies of whole layers would outweigh the layers


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and zero point of each group of `weight` [..., in].

    Returns codes [..., in/group, group] in 0 … 2^bits − 1 (as floats), step and zero [..., in/group, 1]:
    value = (code − zero) · step. `group_size` −1 is one group per row.
    """
    width = weight.shape[-1]
    group = width if group_size == -1 else group_size
    groups = weight.unflatten(-1, (width // group, group))  # [..., in] -> [..., in/group, group]
    levels = 2**bits - 1
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / levels
    step = torch.where(step > 0, step, 1)  # a group of zeros
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, levels)
    return codes, step, zero


def fake_quantize(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """`weight` [..., in] rounded to its groups' grids, same shape and dtype."""
    return dequantize_groups(*quantize_groups(weight, bits, group_size))


def dequantize_groups(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """What `quantize_groups` returned, as weights [..., in]."""
    return ((codes - zero) * step).flatten(-2)


def row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """`weight` [out, in] a few rows at a time, in float32."""
    return (rows.float() for rows in weight.split(max(1, CHUNK // weight.shape[1])))


def by_rows(function: Callable[..., Tensor], weight: Tensor, *others: Tensor | None) -> Tensor:
    """`function` of `weight` [out, in], a few rows at a time in float32, and of the same rows of `others`."""
    lengths = [len(rows) for rows in weight.split(max(1, CHUNK // weight.shape[1]))]
    parts = [[None] * len(lengths) if other is None else other.split(lengths) for other in others]
    return torch.cat([function(*rows) for rows in zip(row_chunks(weight), *parts, strict=True)])


def check_grid(linears: Mapping[str, nn.Linear], bits: int, group_size: int) -> None:
    """Raise UserError for bits or a group size that cannot be used on every one of `linears`."""
    if bits not in BITS:
        raise UserError(f"bits is {bits}; quantization knows {', '.join(map(str, BITS))}.")
    if group_size == -1:
        return
    if group_size < 1:
        raise UserError(f"group size is {group_size}; give a positive number, or -1 for one group per row.")
    widths = {name: linear.in_features for name, linear in linears.items()}
    for name, width in widths.items():
        if width % group_size:
            sizes = ", ".join(map(str, _common_divisors(widths.values())))
            raise UserError(
                f"group size {group_size} does not divide the {width} input columns of {name}; "
                f"sizes that divide every layer: {sizes}, or -1 for one group per row."
            )


def _common_divisors(widths: Iterable[int]) -> list[int]:
    common = gcd(*widths)
    return [size for size in range(1, common + 1) if common % size == 0]
