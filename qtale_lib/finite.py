"""Where numbers stop being finite: in which decoder layer, so that NaN ends in an error, not in a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_finite(*tensors: Tensor) -> bool:
    """Whether no value of the tensors is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def first_non_finite_layer(layers: Iterable[nn.Module], forward: Callable[[], Any]) -> int | None:
    """The first of the layers whose output is not finite in a forward pass; None if every layer's is."""
    bad: list[int] = []

    def watch(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not is_finite(output[0] if isinstance(output, tuple) else output):
                bad.append(index)

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return min(bad, default=None)


def place(layer: int | None) -> str:
    """In words; None stands for norm and lm_head."""
    return "after the last layer" if layer is None else f"in layer {layer}"
