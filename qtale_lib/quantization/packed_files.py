"""A packed model on disk: safetensors and JSON, complete without its base model, loaded without floats.

    save_packed(model, "small", tokenizer)
    model = load_packed("small")

config.json          the Hugging Face config (generation_config.json beside it)
packed.safetensors   every tensor; packed layers as bytes, steps and zero points (packed_linear.py)
packed.json          routers and θ, the quantizer's report (with hashes of the float model and calibration
                     tokens), dtypes, and the sha256 of the two files above
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from qtale_lib.adaptive import RouterConfig, add_routers, routing_state, set_threshold
from qtale_lib.errors import UserError
from qtale_lib.quantization.packed import is_packed, packed_linears, saved_tensors
from qtale_lib.quantization.packed_linear import PackedLinear
from qtale_lib.quantization.report import QuantizationReport
from qtale_lib.quantization.statistics import is_routed
from qtale_lib.store import write_json

CONFIG, TENSORS, RECORD = "config.json", "packed.safetensors", "packed.json"
FORMAT = 1
AGAIN = "save the model again with save_packed"


def save_packed(model: nn.Module, directory: str | Path, tokenizer=None) -> Path:
    """Save a packed model, routed or not, so that `load_packed` rebuilds it; returns the folder.

    θ is the one that the model holds now: search it on the quantized model, then save.

    Raises:
        UserError: if the model is not packed.
    """
    if not is_packed(model):
        raise UserError("the model is not packed; call quantize, then pack, before save_packed.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).unlink(missing_ok=True)  # an interrupted save leaves no folder that looks whole
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    tensors = {name: tensor.contiguous() for name, tensor in saved_tensors(model).items()}
    save_file(tensors, directory / TENSORS)
    write_json(directory / RECORD, _record(model, directory))
    return directory


def load_packed(directory: str | Path, device: torch.device | str | None = None) -> PreTrainedModel:
    """Rebuild what `save_packed` saved, in evaluation mode on `device` (the CPU).

    Packed layers go straight from the file to where they are used, one at a time: no float weight of one
    is ever made, and no base model is needed.

    Raises:
        UserError: if a file is missing, damaged, or does not fit the others.
    """
    directory = Path(directory)
    record = _read_record(directory)
    _check_digests(directory, record)
    model = _empty_model(directory, record)
    _check_tensors(model, directory / TENSORS)
    _fill(model, directory / TENSORS, torch.device(device or "cpu"))
    if (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _record(model: nn.Module, directory: Path) -> dict[str, Any]:
    layers = packed_linears(model)
    first = next(iter(layers.values()))
    state = routing_state(model) if is_routed(model) else None
    return {
        "format": FORMAT,
        "dtype": _name(model.dtype),
        "step_dtype": _name(first.steps.dtype),
        "threshold": None if state is None else state.theta,
        "routers": None if state is None else asdict(state.config),
        "layers": {name: {"bits": layer.bits, "group": layer.group} for name, layer in layers.items()},
        "quantizer": model.quantization.as_dict(),
        "sha256": {name: _sha256(directory / name) for name in (CONFIG, TENSORS)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    if not path.is_file():
        raise UserError(f"{directory} holds no {RECORD}; point at a folder written by save_packed.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged; {AGAIN}.") from None
    if not known:
        raise UserError(f"{path} is of format {record['format']}, not {FORMAT}; {AGAIN}.")
    return record


def _check_digests(directory: Path, record: dict[str, Any]) -> None:
    for name in (CONFIG, TENSORS):
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the whole folder, or {AGAIN}.")
        if _sha256(path) != record.get("sha256", {}).get(name):
            raise UserError(f"{path} is not the file that was saved (sha256); copy it anew, or {AGAIN}.")


def _empty_model(directory: Path, record: dict[str, Any]) -> PreTrainedModel:
    """The model that `record` and the folder's config describe, and the quantizer's report in it."""
    config = AutoConfig.from_pretrained(directory)
    try:
        model = empty_model(config, record, lambda _: record["layers"])
        model.quantization = QuantizationReport(**record["quantizer"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"{directory / RECORD} does not fit {CONFIG} or is damaged; {AGAIN}.") from None
    return model


def empty_model(
    config: PreTrainedConfig, record: dict[str, Any], layers: Callable[[nn.Module], dict[str, dict[str, int]]]
) -> PreTrainedModel:
    """A model with packed layers and routers, and no memory behind any of it.

    Args:
        record: dtype, step_dtype, routers and threshold, as in packed.json.
        layers: from the model without packed layers, {name: {"bits": …, "group": …}} of those to be packed.
    """
    dtype = getattr(torch, record["dtype"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, layer in layers(model).items():
            old = model.get_submodule(name)
            sizes = (old.in_features, old.out_features, layer["bits"], layer["group"], old.bias is not None)
            packed = PackedLinear(*sizes, dtype, getattr(torch, record["step_dtype"]))
            model.set_submodule(name, packed)
        if record["routers"] is not None:
            add_routers(model, RouterConfig(**record["routers"]))
            set_threshold(model, record["threshold"])
    return model


def _check_tensors(model: PreTrainedModel, path: Path) -> None:
    """UserError unless the file's names and shapes are those of the model."""
    expected = {name: list(tensor.shape) for name, tensor in saved_tensors(model).items()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        raise UserError(f"{path} is no safetensors file; {AGAIN}.") from None
    wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{path} does not fit {RECORD}: {wrong[0]}{more} missing, left over or misshapen; {AGAIN}."
        )


def _fill(model: PreTrainedModel, path: Path, device: torch.device) -> None:
    """Put the file's tensors into the empty `model`, each once."""
    layers = packed_linears(model)
    floats = [name for name in saved_tensors(model) if name.rpartition(".")[0] not in layers]
    owned = {name: tensor.to(device, copy=True) for name, tensor in _read(path, floats)}
    model.load_state_dict(owned, strict=False, assign=True)
    model.tie_weights()
    # frequencies are not in the file: they follow from the config
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    for name, layer in layers.items():
        _fill_layer(layer, dict(_read(path, [f"{name}.{key}" for key in layer.state_dict()])), device)


def _fill_layer(layer: PackedLinear, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Codes are read from the mapped file by a kernel that takes them; only what stays is copied."""
    for name, tensor in tensors.items():
        setattr(layer, name.rpartition(".")[2], tensor.to(device))
    tensors.clear()
    layer.arrange()
    for name, tensor in layer.named_buffers():
        setattr(layer, name, tensor.clone())


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; the file is mapped anew for each, else what was read of it would stay in memory."""
    for name in names:
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)
