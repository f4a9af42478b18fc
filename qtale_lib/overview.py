"""Figure 1 from real counts: what each technique keeps in memory and executes, layer by layer of the model.

Memory is that of the decoder layers' linear weights; executed shares are those of the last probe (arg max
decisions, training samples), averaged over the fine-tunings of a method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qtale_lib.efficiency_tables import MIB, sizes
from qtale_lib.measurements import Measurements, quantized_bits

TITLES = {
    "a": "Original",
    "b": "Layer pruning",
    "c": "Token-adaptive",
    "d": "Quantization",
    "e": "Combined",
}


@dataclass(frozen=True)
class _Layers:
    """Per layer: memory relative to 16 bit, and the share of tokens that execute it."""

    fill: np.ndarray
    executed: np.ndarray


def frame(store: Measurements) -> pd.DataFrame:
    """Figure 1, tidy (see figures.overview): panel, title, note, layer, fill, executed."""
    count = store.lab.base()["config"]["num_hidden_layers"]
    whole = _linear_bytes(store, 16)
    bits = quantized_bits(store.profile)
    dllm, qtale = (_executed(store, method) for method in ("dllm", "qtale"))
    full, share = np.ones(count), (_linear_bytes(store, bits) / whole if bits else 1.0)
    panels = {
        "a": _Layers(full, full),
        "b": _pruned(dllm),
        "c": None if dllm is None else _Layers(full, dllm),
        "d": None if bits is None else _Layers(full * share, full),
        "e": None if bits is None or qtale is None else _Layers(full * share, qtale),
    }
    names = {"a": "16 bits", "b": "16 bits, FLOPs as (c)", "c": "D-LLM, 16 bits"}
    names |= {"d": f"{bits} bits", "e": f"QTALE, {bits} bits"}
    parts = [_panel(panel, layers, whole, names[panel]) for panel, layers in panels.items()]
    return pd.concat(parts, ignore_index=True)


def _linear_bytes(store: Measurements, bits: int) -> float:
    """Bytes of the decoder layers' linear weights, their groups' steps and zero points included."""
    parts = sizes(store, bits)
    return parts["codes"] + parts["groups"]


def _executed(store: Measurements, method: str) -> np.ndarray | None:
    """Mean final execution ratio of every layer, [layers]; None if the method was not run."""
    frame = store.layers[store.layers.method == method]
    if frame.empty:
        return None
    final = frame[frame.epoch == frame.groupby(["task", "seed"]).epoch.transform("max")]
    return final.groupby("layer").ratio.mean().to_numpy()


def _pruned(executed: np.ndarray | None) -> _Layers | None:
    """Whole layers removed, those that D-LLM executes least, as many as bring FLOPs nearest to D-LLM's."""
    if executed is None:
        return None
    kept, removed = np.ones(len(executed)), round(len(executed) - executed.sum())
    kept[np.argsort(executed, kind="stable")[:removed]] = 0.0
    return _Layers(kept, kept)


def _panel(panel: str, layers: _Layers | None, whole: float, what: str) -> pd.DataFrame:
    said = {"panel": panel, "title": TITLES[panel]}
    if layers is None:
        return pd.DataFrame([{**said, "note": " ", "layer": np.nan, "fill": np.nan, "executed": np.nan}])
    memory, flops = whole / MIB * layers.fill.mean(), 100 * layers.executed.mean()
    note = f"{what}\nmemory {memory:.1f} MiB\nlayer FLOPs {flops:.0f} %"
    columns = {"layer": range(len(layers.fill)), "fill": layers.fill, "executed": layers.executed}
    return pd.DataFrame({**said, "note": note, **columns})
