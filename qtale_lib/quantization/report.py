"""What a quantization did and found: kept with the model, saved, applied again to that model only."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtale_lib.errors import DamagedError
from qtale_lib.store import file_digest, read_json, write_json

TENSORS = ("scales", "clips", "codes", "steps", "zeros")


class Grid(NamedTuple):
    """What a rounded linear's weights lie on: value = (code − zero) · step, computed in float32.

    steps: float32 [out, in/group]; zeros: uint8 [out, in/group]; bits of a code.
    """

    steps: Tensor
    zeros: Tensor
    bits: int


@dataclass
class LayerSearch:
    """What a quantizer found for one layer, by names within it.

    By producer (statistics.READERS): alphas, and scales [in] to fold. By linear: clips [out, in/group]; or,
    of a quantizer that chooses codes itself, codes as `bitpack.pack_codes` packs them
    [out, bits, ceil(in/8)], steps float32 and zeros uint8 [out, in/group].
    """

    alphas: dict[str, float | None] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class QuantizationReport:
    """One quantization of one model.

    `linears`: one row per linear with name, tokens, alpha, clip (mean share of the range kept) and mean
    square output errors over the calibration tokens: `error` of what was done, `error_rtn` of
    round-to-nearest, and `power`, the mean square output itself. `scales`, `clips`, `codes`, `steps` and
    `zeros`, as in `LayerSearch` but by full names, are the search result.
    `layer_bits`: by layer, where they differ (mixed.py), `bits` being their greatest mean then; and
    `sensitivity` [layers, mixed.WIDTHS]: what each width of each alone adds to the calibration loss, in nats.
    `unchosen_layers`: layers that no router decision executed, calibrated on all tokens instead
    (statistics.py).
    `grids`: by linear, what its rounded weights lie on, for `pack`; not saved: it follows from the rest.
    """

    method: str
    backend: str
    bits: int
    group_size: int
    lm_head_bits: int
    model_sha256: str = ""
    calibration: dict | None = None
    threshold: float | None = None
    layer_bits: list[int] = field(default_factory=list)
    sensitivity: list[list[float]] = field(default_factory=list)
    unchosen_layers: list[int] = field(default_factory=list)
    linears: list[dict] = field(default_factory=list)
    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[str, Tensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def width(self, layer: int) -> int:
        """Bits of a layer's weights."""
        return self.layer_bits[layer] if self.layer_bits else self.bits

    def as_dict(self) -> dict:
        """Everything but the tensors, ready for JSON."""
        kept = (f.name for f in fields(self) if f.name not in (*TENSORS, "grids"))
        return {name: getattr(self, name) for name in kept}


def model_hash(model: nn.Module) -> str:
    """sha256 over the names, types, shapes and bytes of every tensor in the model's state."""
    return tensors_hash(sorted(model.state_dict().items()))


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same over (name, tensor) in order of name, of which each may be read when its turn comes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_search(report: QuantizationReport, directory: str | Path) -> Path:
    """Write search.json and search.safetensors into `directory`; returns it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{kind}/{name}": t.cpu() for kind in TENSORS for name, t in getattr(report, kind).items()}
    save_file(tensors, directory / "search.safetensors")
    digest = file_digest(directory / "search.safetensors")
    write_json(directory / "search.json", {"schema": 1, "sha256": digest, **report.as_dict()})
    return directory


def load_search(directory: str | Path) -> QuantizationReport:
    """The report that `save_search` wrote; DamagedError if there is none, or another thing."""
    directory = Path(directory)
    if not (directory / "search.json").is_file():
        raise DamagedError(
            f"{directory} holds no quantization search (search.json); write one with save_search."
        )
    record = read_json(directory / "search.json")
    if not isinstance(record, dict) or record.pop("schema", None) != 1:
        raise DamagedError(
            f"{directory} holds a quantization search that is damaged or of another version; quantize again."
        )
    digest = record.pop("sha256", None)  # searches of before have none
    try:
        report = QuantizationReport(**record)
        if digest not in (None, file_digest(directory / "search.safetensors")):
            raise ValueError("another file")
        for key, tensor in load_file(directory / "search.safetensors").items():
            kind, name = key.split("/", 1)
            getattr(report, kind)[name] = tensor
    except (OSError, TypeError, ValueError, SafetensorError):
        raise DamagedError(
            f"{directory}: search.safetensors is damaged or does not belong to search.json; quantize again."
        ) from None
    return report
