"""Quantization-aware fine-tuning: the forward pass sees the weights as they will be (Jacob et al., 2018), and
gradients pass the rounding as if it were not there (straight-through; Bengio et al., 2013).

What is quantized here is the merged model, so LoRA is merged before the rounding: W + (α/r)·BA, in 16 bits,
then round-to-nearest, which is the model that `quantize(..., method="rtn")` makes of the run. Rounding the
base alone, with LoRA in floats beside it, would train for a model that nobody evaluates: merging takes it off
the grid again. AWQ's scales and clips come of the trained model's inputs, so no training can know them:
evaluated by AWQ, such a run is rounded otherwise than in its training.

    x ↦ W x + (α/r)·B A x + (Q − W − (α/r)·B A) x,   the bracket without gradient by A and B

is Q x; gradients by x are those of Q, by A and B those of the float weights, and LoRA's dropout stays.
"""

from __future__ import annotations

from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.rtn import by_rows, check_grid, fake_quantize


def see_quantized(model: nn.Module, bits: int, group_size: int, lm_head_bits: int = 16) -> None:
    """From now on every decoder linear of a causal model answers as its merged, fake-quantized self; lm_head
    too, unless it keeps 16 bits. No weight is changed, and no name.

    Raises:
        UserError: for a group size that does not divide the layers' widths.
    """
    linears = decoder_linears(model)
    check_grid(linears, bits, group_size)
    widths = dict.fromkeys(linears.values(), bits)
    if lm_head_bits != 16:
        widths[model.lm_head] = lm_head_bits
    for linear, width in widths.items():
        linear.register_forward_hook(partial(_as_quantized, width, group_size))


def _as_quantized(
    bits: int, group_size: int, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return output + nn.functional.linear(inputs[0], rounding(linear, bits, group_size))


@torch.no_grad()
def rounding(linear: nn.Module, bits: int, group_size: int) -> Tensor:
    """What merging, 16 bits and rounding to nearest add to a linear's weight, [out, in]."""
    merged = merged_weight(linear)
    stored = merged.to(torch.bfloat16).to(merged.dtype)
    rounded = by_rows(partial(fake_quantize, bits=bits, group_size=group_size), stored)
    return rounded.to(merged.dtype) - merged


def merged_weight(linear: nn.Module) -> Tensor:
    """A linear's weight [out, in], with its LoRA if it has one."""
    if not isinstance(linear, LoraLayer):
        return linear.weight
    deltas = (linear.get_delta_weight(name).to(linear.weight.dtype) for name in linear.active_adapters)
    return sum(deltas, linear.weight)
