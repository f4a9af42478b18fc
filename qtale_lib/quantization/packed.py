"""From a fake-quantized model to one that holds packed weights only.

quantize(model, tokenizer, texts, bits=3)
pack(model)                                # the same numbers in 3 bits
save_packed(model, "small", tokenizer)     # packed_files.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qtale_lib.efficiency import file_bytes
from qtale_lib.errors import UserError
from qtale_lib.quantization.packed_linear import PackedLinear
from qtale_lib.quantization.report import Grid
from qtale_lib.quantization.rtn import by_rows

STEP_DTYPES = (torch.float32, torch.float16)


@torch.no_grad()
def pack(model: nn.Module, step_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace the linears that `quantize` rounded by packed ones, in place and one by one; returns the model.

    Weights stay bit for bit those of the fake-quantized model, in its own dtype. What `quantize` left alone
    (routers, norms, embedding, lm_head unless its setting says otherwise) stays as it is.

    Args:
        step_dtype: float32 is exact; float16 halves what the steps take, as Table 3 counts them, and moves
            each weight by at most 2^-11 of itself.
    Raises:
        UserError: if the model is not quantized, is packed already, or its weights were changed since.
    """
    if step_dtype not in STEP_DTYPES:
        raise UserError(f"step_dtype is {step_dtype}; steps are kept in torch.float32 or torch.float16.")
    if is_packed(model):
        raise UserError("the model is packed already; save it with save_packed.")
    if not getattr(getattr(model, "quantization", None), "grids", None):
        raise UserError("the model is not quantized; call quantize (or apply_search) on it before pack.")
    pack_linears(model, model.quantization.grids, step_dtype)
    return model


def pack_linears(model: nn.Module, grids: dict[str, Grid], step_dtype: torch.dtype = torch.float32) -> None:
    """Replace the linears of `grids` by packed ones, which take the grids over: `grids` is empty then."""
    for name in list(grids):
        model.set_submodule(name, _packed(name, model.get_submodule(name), grids[name], step_dtype))
        del grids[name]


def pack_empty(
    model: nn.Module, name: str, bits: int, group_size: int, step_dtype: torch.dtype = torch.float32
) -> None:
    """Replace a linear by a packed one without memory behind it, in the linear's dtype."""
    old = model.get_submodule(name)
    sizes = (old.in_features, old.out_features, bits, group_size, old.bias is not None)
    model.set_submodule(name, PackedLinear(*sizes, old.weight.dtype, step_dtype, "meta"))


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of `model` is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def packed_bytes(source: nn.Module | str | Path) -> int:
    """Bytes of a packed model's tensors as they are saved, or of its whole file in a folder of `save_packed`.

    The file's bytes are the tensors' and a header of about 100 bytes for each.
    """
    if not isinstance(source, nn.Module):
        return file_bytes(source)
    return sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors(source).values())


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a packed model consists of; a tied lm_head is left out."""
    tensors = model.state_dict()
    if model.get_output_embeddings().__class__ is nn.Linear and model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _packed(name: str, linear: nn.Linear, grid: Grid, step_dtype: torch.dtype) -> PackedLinear:
    weight, bias = linear.weight.detach(), linear.bias
    steps, zeros = grid.steps.to(weight.device), grid.zeros.to(weight.device)
    codes = _codes_on_grid(weight, steps, zeros, grid.bits)
    if codes is None:
        raise UserError(f"{name} is no longer what quantize left; load the float model and quantize it anew.")
    bias = None if bias is None else bias.detach()
    packed = PackedLinear.from_codes(codes, steps.to(step_dtype), zeros, grid.bits, bias, weight.dtype)
    return packed.train(linear.training)


def _codes_on_grid(weight: Tensor, steps: Tensor, zeros: Tensor, bits: int) -> Tensor | None:
    """Codes uint8 [out, in] whose values are exactly `weight`; None if there are none.

    Rounding to 16 bits may have moved a weight of 8 bits by almost a whole step: the neighbours are tried.
    """

    def codes_of(rows: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        steps, zeros = steps[..., None], zeros[..., None].float()
        groups = rows.unflatten(1, (steps.shape[1], -1))  # [out, in] -> [out, in/group, group]
        nearest = (groups / steps).round() + zeros
        codes = torch.full_like(nearest, -1)
        for neighbour in (0, -1, 1):
            candidate = (nearest + neighbour).clamp(0, 2**bits - 1)
            exact = ((candidate - zeros) * steps).to(weight.dtype) == groups
            codes = torch.where((codes < 0) & exact, candidate, codes)
        missing.append((codes < 0).any())
        return codes.byte().flatten(1)

    missing: list[Tensor] = []
    codes = by_rows(codes_of, weight, steps, zeros)
    return None if torch.stack(missing).any() else codes
