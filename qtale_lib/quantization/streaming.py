"""Quantization from files to files: one decoder layer at a time is read, quantized, packed and written.

    streamed = StreamedModel("a base, or a saved run")
    quantize_streamed(streamed, "small", tokenizer, texts, bits=4)
    model = load_packed("small")

The numbers are those of `quantize` and `pack` on the whole model. In memory are at most the embeddings, or
one layer with what its search needs, and the calibration rows between two layers, in the model's dtype
(`peak_bytes`). A finished layer is kept, with its search: killed, the same call goes on with the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig

from qtale_lib.quantization.apply import (
    apply_to_head,
    apply_to_layer,
    check_quantizable,
    check_same_model,
    decoder_linears,
    prepare,
    search_in_layer,
    untie_lm_head,
)
from qtale_lib.quantization.packed import pack_empty, pack_linears, saved_tensors
from qtale_lib.quantization.packed_files import begin_folder, finish_folder
from qtale_lib.quantization.report import TENSORS, QuantizationReport, load_search, save_search, tensors_hash
from qtale_lib.quantization.rtn import CHUNK
from qtale_lib.quantization.statistics import BATCH_TOKENS, READERS, Batch, enter, pass_layer
from qtale_lib.streamed_model import EMBEDDING, HEAD, StreamedModel, empty_model

PARTS = "unfinished"  # searches of finished layers, while others are not


@torch.no_grad()
def quantize_streamed(
    streamed: StreamedModel,
    directory: str | Path,
    tokenizer=None,
    texts: Iterable[str] | None = None,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    lm_head_bits: int = 16,
    max_length: int = 512,
) -> QuantizationReport:
    """Quantize a saved model into a folder for `load_packed`; arguments as of `quantize`, backend native.

    Calibration runs at the θ that `streamed.model` has, which is also written.

    Raises:
        UserError: as `quantize`.
    """
    report = QuantizationReport(method, "native", bits, group_size, lm_head_bits)
    rows = prepare(streamed.model, report, tokenizer, texts, max_length)
    report.model_sha256 = tensors_hash(streamed.tensors())
    return _write(streamed, Path(directory), tokenizer, report, rows)


@torch.no_grad()
def apply_search_streamed(
    streamed: StreamedModel, search: str | Path, directory: str | Path, tokenizer=None
) -> QuantizationReport:
    """The same by a kept search, without calibration; UserError if it was made from another model."""
    report = load_search(search)
    check_quantizable(streamed.model, report)
    check_same_model(tensors_hash(streamed.tensors()), report, search)
    return _write(streamed, Path(directory), tokenizer, report, None)


def _write(
    streamed: StreamedModel,
    directory: Path,
    tokenizer,
    report: QuantizationReport,
    rows: Sequence[Sequence[int]] | None,
) -> QuantizationReport:
    model, parts = streamed.model, directory / PARTS
    if report.lm_head_bits != 16:
        untie_lm_head(model)
    begin_folder(model, directory, tokenizer)
    batches = _entered(streamed, rows)
    for i in range(len(streamed.layers)):
        part = _of_layer(report, i, fresh=rows is not None)
        if _is_finished(part, parts / str(i), directory / _file(i)):
            _pass(streamed, i, batches)
        else:
            _quantize_layer(streamed, i, batches, part, directory / _file(i))
            save_search(part, parts / str(i))
    batches.clear()
    for i in range(len(streamed.layers)):
        for name in decoder_linears(model, [i]):
            pack_empty(model, name, report.width(i), report.group_size)
    model.quantization = _joined(report, parts, len(streamed.layers)) if rows is not None else report
    names = [_file(i) for i in range(len(streamed.layers))]
    finish_folder(model, directory, [*names, _write_rest(streamed, directory, model.quantization)])
    shutil.rmtree(parts)
    return model.quantization


def _file(part: int | str) -> str:
    return f"packed-{part:05d}.safetensors" if isinstance(part, int) else f"packed-{part}.safetensors"


def _entered(streamed: StreamedModel, rows: Sequence[Sequence[int]] | None) -> list[Batch]:
    if rows is None:
        return []
    with streamed.loaded(EMBEDDING, "model.norm"):
        return enter(streamed.model, rows)


def _of_layer(report: QuantizationReport, i: int, fresh: bool) -> QuantizationReport:
    """What a report says of layer `i`; nothing yet, if it is being made."""
    mine = f"model.layers.{i}."
    tensors = {
        kind: {} if fresh else {name: t for name, t in getattr(report, kind).items() if name.startswith(mine)}
        for kind in TENSORS
    }
    return replace(report, linears=[], unchosen_layers=[], grids={}, **tensors)


def _is_finished(part: QuantizationReport, folder: Path, path: Path) -> bool:
    """Whether a layer was finished from the same model, texts and settings."""
    if not (path.is_file() and (folder / "search.json").is_file()):
        return False
    found = load_search(folder)
    return replace(found, linears=[], unchosen_layers=[]).as_dict() == part.as_dict()


def _pass(streamed: StreamedModel, i: int, batches: list[Batch]) -> None:
    """Take the rows through a layer that is finished."""
    if batches:
        with streamed.loaded(f"model.layers.{i}"):
            pass_layer(streamed.model, i, batches)


def _quantize_layer(
    streamed: StreamedModel, i: int, batches: list[Batch], report: QuantizationReport, path: Path
) -> None:
    model, prefix = streamed.model, f"model.layers.{i}"
    with streamed.loaded(prefix) as (layer,):
        if batches:
            search_in_layer(model, i, batches, report)
        apply_to_layer(model, i, report)
        floats = decoder_linears(model, [i])
        pack_linears(model, report.grids)
        _save({f"{prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}, path)
        for name, linear in floats.items():  # what stays of each layer would scatter the free memory
            model.set_submodule(name, linear)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)


def _joined(report: QuantizationReport, parts: Path, layers: int) -> QuantizationReport:
    """The report of the whole model from those of its layers."""
    joined = replace(report, linears=[], unchosen_layers=[], grids={}, **{kind: {} for kind in TENSORS})
    for part in (load_search(parts / str(i)) for i in range(layers)):
        joined.linears += part.linears
        joined.unchosen_layers += part.unchosen_layers
        for kind in TENSORS:
            getattr(joined, kind).update(getattr(part, kind))
    return joined


def _write_rest(streamed: StreamedModel, directory: Path, report: QuantizationReport) -> str:
    """Write what is in no layer, lm_head in few bits if the report says so; returns the file's name."""
    model, name = streamed.model, _file("rest")
    modules = [EMBEDDING, "model.norm", *([] if model.config.tie_word_embeddings else [HEAD])]
    with streamed.loaded(*modules):
        apply_to_head(model, report)
        pack_linears(model, report.grids)
        rest = saved_tensors(model).items()
        _save({key: tensor for key, tensor in rest if ".layers." not in key}, directory / name)
    return name


def peak_bytes(
    config: PreTrainedConfig | dict[str, Any],
    tokens: int,
    dtype: str = "bfloat16",
    routers: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Memory that `quantize_streamed` with AWQ adds to a process: "peak", and what is in it.

    "embeddings" (lm_head too where it is its own), "layer" (one, as it is stored), "activations" (`tokens`
    calibration tokens before and after a layer, and what a batch of them is within), "moments" (second
    moments of a layer's inputs, float32, the largest twice), "search" (float32 copies of weights). The first
    is not held together with the others.
    """
    if isinstance(config, dict):
        config = AutoConfig.for_model(**config)
    model = empty_model(config, getattr(torch, dtype), routers, 0.5)
    layer, size = model.model.layers[-1], model.dtype.itemsize
    widths = [layer.get_submodule(readers[0]).in_features for readers in READERS.values()]
    batch = min(tokens, BATCH_TOKENS)
    linears = [layer.get_submodule(name).weight for readers in READERS.values() for name in readers]
    rest = [p for name, p in model.named_parameters() if ".layers." not in name]  # a tied one once
    parts = {
        "embeddings": _bytes(rest),
        "layer": _bytes(layer.state_dict().values()),
        "activations": 2 * tokens * config.hidden_size * size
        + batch * (size * (sum(widths) + 2 * config.intermediate_size) + 4 * max(widths)),
        "moments": 4 * (sum(width**2 for width in widths) + max(widths) ** 2),
        "search": 4 * (2 * max(weight.numel() for weight in linears) + 6 * CHUNK),
    }
    at_work = sum(parts.values()) - parts["embeddings"]
    copied = max(tensor.numel() * tensor.element_size() for tensor in rest)  # one at a time, from its file
    entering = parts["embeddings"] + copied + tokens * config.hidden_size * size
    return {"peak": max(at_work, entering), **parts}


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
