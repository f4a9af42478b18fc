"""A quantized model without routers in AWQ's GEMM layout, as vLLM, autoawq and transformers load it.

Per linear, all stored [in, out]: qweight int32 [in, out/8], eight codes of neighbouring outputs in one word,
in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits; qzeros int32 [in/group, out/8], the zero points in
the same way; scales float16 [in/group, out]. A weight is (code − zero) · scale. Source: autoawq 0.2.9,
WQLinear_GEMM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.packed import packed_linears, saved_tensors
from qtale_lib.quantization.packed_linear import PackedLinear
from qtale_lib.quantization.statistics import is_routed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands in a word's lowest, next, … four bits


def export_awq(model: nn.Module, directory: str | Path, tokenizer) -> Path:
    """Write a packed 4-bit model as an AWQ GEMM checkpoint (config, model.safetensors, tokenizer).

    Codes and zero points are exact. Steps and all other weights are rounded to float16, which the format asks
    for: that moves a weight by at most 2^-11 of itself.

    Raises:
        UserError: for a model that is not packed, has routers, is not in 4 bits, has groups of a whole row, a
            packed lm_head, an output width that is no multiple of 8, or weights beyond float16.
    """
    layers = packed_linears(model)
    _check_exportable(model, layers)
    tensors = _half_tensors(model, layers)
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in awq_tensors(layer).items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _config(model, next(iter(layers.values())).group).save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def awq_tensors(layer: PackedLinear) -> dict[str, Tensor]:
    """qweight, qzeros, scales, and bias if there is one, of a packed layer (layouts above)."""
    tensors = {
        "qweight": _words(layer.unpacked().T),  # [out, in] -> [in, out]
        "qzeros": _words(layer.zero_points().T),
        "scales": layer.steps.T.half().contiguous(),
    }
    return tensors if layer.bias is None else {**tensors, "bias": layer.bias.half()}


def _words(codes: Tensor) -> Tensor:
    """uint8 [rows, out] below 16 -> int32 [rows, out/8]."""
    eights = codes.unflatten(1, (-1, 8))  # [rows, out] -> [rows, out/8, 8]
    words = torch.zeros(eights.shape[:2], dtype=torch.int32, device=codes.device)
    for place, output in enumerate(ORDER):
        words |= eights[..., output].int() << (4 * place)
    return words


def _check_exportable(model: nn.Module, layers: dict[str, PackedLinear]) -> None:
    if not layers:
        raise UserError("the model is not packed; call quantize, then pack, before export_awq.")
    if is_routed(model):
        raise UserError("AWQ's layout has no place for routers; use save_packed for a routed model.")
    if "lm_head" in layers:
        raise UserError(
            "AWQ's layout keeps lm_head in 16 bits; quantize with lm_head_bits=16 for export_awq."
        )
    bits = model.quantization.bits
    if bits != 4:
        raise UserError(f"AWQ's GEMM layout holds 4 bits, not {bits}; use save_packed for this model.")
    if model.quantization.group_size == -1:
        raise UserError("AWQ's layout wants one group size for all layers; quantize with a positive one.")
    for name, layer in layers.items():
        if layer.out_features % 8:
            raise UserError(
                f"{name} has {layer.out_features} outputs, and AWQ's layout packs them by 8; use save_packed."
            )


def _half_tensors(model: nn.Module, layers: dict[str, PackedLinear]) -> dict[str, Tensor]:
    """Everything that is not packed, in float16."""
    names = saved_tensors(model).items()
    tensors = {n: t.half().contiguous() for n, t in names if n.rpartition(".")[0] not in layers}
    beyond = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    beyond += [name for name, layer in layers.items() if not layer.steps.half().isfinite().all()]
    if beyond:
        raise UserError(
            f"{beyond[0]} does not fit into float16, which AWQ's layout asks for; use save_packed."
        )
    return tensors


def _config(model: nn.Module, group: int) -> Any:
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = torch.float16
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    return config
