"""A packed model on disk: safetensors and JSON, complete without its base model, loaded without floats.

    save_packed(model, "small", tokenizer)
    model = load_packed("small")

config.json          the Hugging Face config (generation_config.json beside it)
packed.safetensors   every tensor; packed layers as bytes, steps and zero points (packed_linear.py). Or
                     packed-*.safetensors, a file for each decoder layer and one for the rest (streaming.py)
packed.json          routers and θ, the quantizer's report (with hashes of the float model and calibration
                     tokens), dtypes, and the sha256 of the files above
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
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qtale_lib.adaptive import routing_state
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.quantization.packed import is_packed, pack_empty, packed_linears, saved_tensors
from qtale_lib.quantization.packed_linear import PackedLinear
from qtale_lib.quantization.report import QuantizationReport
from qtale_lib.quantization.statistics import is_routed
from qtale_lib.store import write_json
from qtale_lib.streamed_model import empty_model

CONFIG, TENSORS, RECORD = "config.json", "packed.safetensors", "packed.json"
WEIGHTS = "packed*.safetensors"
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
    begin_folder(model, directory, tokenizer)
    tensors = {name: tensor.contiguous() for name, tensor in saved_tensors(model).items()}
    save_file(tensors, directory / TENSORS)
    finish_folder(model, directory, [TENSORS])
    return directory


def begin_folder(model: PreTrainedModel, directory: Path, tokenizer) -> None:
    """Write all but weights and record; a save that is interrupted leaves no folder that looks whole."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).unlink(missing_ok=True)
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def finish_folder(model: PreTrainedModel, directory: Path, names: list[str]) -> None:
    """Write the record, whose weights are in the files `names`, and remove files of an earlier save."""
    for stale in directory.glob(WEIGHTS):
        if stale.name not in names:
            stale.unlink()
    write_json(directory / RECORD, _record(model, directory, names))


def load_packed(directory: str | Path, device: torch.device | str | None = None) -> PreTrainedModel:
    """Rebuild what `save_packed` saved, in evaluation mode on `device` (the CPU).

    Packed layers go straight from the file to where they are used, one at a time: no float weight of one
    is ever made, and no base model is needed.

    Raises:
        DamagedError: if a file is missing, damaged, or does not fit the others.
    """
    directory = Path(directory)
    record = _read_record(directory)
    _check_digests(directory, record)
    model = _empty_model(directory, record)
    files = _tensor_files(model, directory, record)
    _fill(model, files, torch.device(device or "cpu"))
    if (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _record(model: nn.Module, directory: Path, names: list[str]) -> dict[str, Any]:
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
        "sha256": {name: _sha256(directory / name) for name in (CONFIG, *names)},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    if not path.is_file():
        raise DamagedError(f"{directory} holds no {RECORD}; point at a folder written by save_packed.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        raise DamagedError(f"{path} is damaged; {AGAIN}.") from None
    if not known:
        raise DamagedError(f"{path} is of format {record['format']}, not {FORMAT}; {AGAIN}.")
    return record


def _check_digests(directory: Path, record: dict[str, Any]) -> None:
    digests = record.get("sha256", {})
    for name in {CONFIG: None, **(digests or {TENSORS: None})}:
        path = directory / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing; copy the whole folder, or {AGAIN}.")
        if _sha256(path) != digests.get(name):
            raise DamagedError(f"{path} is not the file that was saved (sha256); copy it anew, or {AGAIN}.")


def _empty_model(directory: Path, record: dict[str, Any]) -> PreTrainedModel:
    """The model that `record` and the folder's config describe, and the quantizer's report in it."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    try:
        model = empty_packed_model(config, record, lambda _: record["layers"])
        model.quantization = QuantizationReport(**record["quantizer"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise DamagedError(f"{directory / RECORD} does not fit {CONFIG} or is damaged; {AGAIN}.") from None
    return model


def empty_packed_model(
    config: PreTrainedConfig, record: dict[str, Any], layers: Callable[[nn.Module], dict[str, dict[str, int]]]
) -> PreTrainedModel:
    """A model with packed layers and routers, and no memory behind any of it.

    Args:
        record: dtype, step_dtype, routers and threshold, as in packed.json.
        layers: from the model without packed layers, {name: {"bits": …, "group": …}} of those to be packed.
    """
    dtype = getattr(torch, record["dtype"])
    model = empty_model(config, dtype, record["routers"], record["threshold"])
    for name, layer in layers(model).items():
        pack_empty(model, name, layer["bits"], layer["group"], getattr(torch, record["step_dtype"]))
    return model


def _tensor_files(model: PreTrainedModel, directory: Path, record: dict[str, Any]) -> dict[str, Path]:
    """The file of every tensor; DamagedError unless the files' names and shapes are those of the model."""
    expected = {name: list(tensor.shape) for name, tensor in saved_tensors(model).items()}
    files, found = {}, {}
    for path in (directory / name for name in record["sha256"] if name != CONFIG):
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            raise DamagedError(f"{path} is no safetensors file; {AGAIN}.") from None
        files |= dict.fromkeys(shapes, path)
        found |= shapes
    wrong = sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise DamagedError(
            f"{files.get(wrong[0], directory)} does not fit {RECORD}: {wrong[0]}{more} missing, left over or "
            f"misshapen; {AGAIN}."
        )
    return files


def _fill(model: PreTrainedModel, files: dict[str, Path], device: torch.device) -> None:
    """Put the files' tensors into the empty `model`, each once."""
    layers = packed_linears(model)
    floats = [name for name in saved_tensors(model) if name.rpartition(".")[0] not in layers]
    owned = {name: tensor.to(device, copy=True) for name, tensor in _read(files, floats)}
    model.load_state_dict(owned, strict=False, assign=True)
    model.tie_weights()
    # frequencies are not in the file: they follow from the config
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    for name, layer in layers.items():
        _fill_layer(layer, dict(_read(files, [f"{name}.{key}" for key in layer.state_dict()])), device)


def _fill_layer(layer: PackedLinear, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Codes are read from the mapped file by a kernel that takes them; only what stays is copied."""
    for name, tensor in tensors.items():
        setattr(layer, name.rpartition(".")[2], tensor.to(device))
    tensors.clear()
    layer.arrange()
    for name, tensor in layer.named_buffers():
        setattr(layer, name, tensor.clone())


def _read(files: dict[str, Path], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; the file is mapped anew for each, else what was read of it would stay in memory."""
    for name in names:
        with safe_open(files[name], "pt") as file:
            yield name, file.get_tensor(name)
