"""Bytes of a packed model's file from its shape alone: what `save_packed` would write (Table 3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from qtale_lib.adaptive import RouterConfig
from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.packed import saved_tensors
from qtale_lib.quantization.packed_files import empty_packed_model

# dtypes as safetensors names them, in the order in which it stores their tensors
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


def packed_file_bytes(
    config: PreTrainedConfig | dict[str, Any],
    bits: int,
    group_size: int = 128,
    lm_head_bits: int = 16,
    routers: RouterConfig | None = None,
    dtype: str = "bfloat16",
    step_dtype: str = "float32",
    layer_bits: Sequence[int] = (),
) -> dict[str, int]:
    """Bytes of packed.safetensors for a model of `config`, by part: "tensors", "header" and "total".

    No weight is made: the model is built without memory behind it. `config` is a Hugging Face config or what
    its config.json holds; `dtype` is that of everything which is not packed (routers: float32); `layer_bits`
    are by layer, where they are not all `bits`.
    """
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    if lm_head_bits != 16:  # as quantize does
        config = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    widths = list(layer_bits) or [bits] * config.num_hidden_layers
    record = {
        "dtype": dtype,
        "step_dtype": step_dtype,
        "threshold": 0.5,
        "routers": None if routers is None else asdict(routers),
    }
    model = empty_packed_model(config, record, lambda bare: _layers(bare, widths, group_size, lm_head_bits))
    tensors = saved_tensors(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    header = _header_bytes(tensors)
    return {"tensors": size, "header": header, "total": size + header}


def _layers(
    model: nn.Module, widths: Sequence[int], group_size: int, lm_head_bits: int
) -> dict[str, dict[str, int]]:
    layers = {
        name: {"bits": bits, "group": group_size}
        for i, bits in enumerate(widths)
        for name in decoder_linears(model, [i])
    }
    head = {"lm_head": {"bits": lm_head_bits, "group": group_size}} if lm_head_bits != 16 else {}
    return {**layers, **head}


def _header_bytes(tensors: dict[str, Tensor]) -> int:
    """Length of safetensors' header: 8 bytes, then JSON padded to a multiple of 8."""
    order, start, header = list(STORED), 0, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8
