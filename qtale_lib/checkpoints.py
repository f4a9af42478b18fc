"""Checkpoints of a fine-tuning, in safetensors and JSON only: no pickle is written or read.

A checkpoint is a folder whose digest is written last. A folder without its digest, or that disagrees with it,
does not count: a run killed while writing goes on from the checkpoint before, which is deleted afterwards.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtale_lib.store import file_digest, read_json, write_json

PREFIX = "checkpoint-"
DIGEST = "digest.json"
OPTIMIZER, GENERATORS, SUMS = "optimizer", "generators", "sums"


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"{PREFIX}{step}"


def begin(directory: Path) -> None:
    """Make an empty folder for a checkpoint; what a killed run left of it is removed."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def finish(directory: Path) -> None:
    """Make a written checkpoint count, then delete the others."""
    files = _content(directory)
    for path in files:
        _flush(path)
    write_json(directory / DIGEST, {"sha256": file_digest(*files)})
    for other in directory.parent.glob(f"{PREFIX}*"):
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None."""
    whole = [directory for directory in folder.glob(f"{PREFIX}*") if _is_whole(directory)]
    return max(whole, key=lambda directory: int(directory.name.removeprefix(PREFIX)), default=None)


def save_optimizer(directory: Path, optimizer: Any, scheduler: Any) -> None:
    """Moments and step counts as tensors; the groups' settings and the schedule as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": tensor for index, kept in state["state"].items() for name, tensor in kept.items()
    }
    values = {"groups": state["param_groups"], "schedule": scheduler.state_dict()}
    _write(directory, OPTIMIZER, tensors, values)


def load_optimizer(directory: Path, optimizer: Any, scheduler: Any) -> None:
    """Put back what save_optimizer wrote; the optimizer moves it to its parameters' device."""
    tensors, values = _read(directory, OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": values["groups"]})
    scheduler.load_state_dict(values["schedule"])


def save_generators(directory: Path, rank: int = 0) -> None:
    """The states of a process's random generators: torch's on the CPU and its GPU, Python's, numpy's."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = np.random.get_state()
    values = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    _write(directory, _of(GENERATORS, rank), tensors, values)


def load_generators(directory: Path, rank: int = 0) -> None:
    """Put back what save_generators wrote; a GPU's is left out where there is none."""
    tensors, values = _read(directory, _of(GENERATORS, rank))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(values["numpy"]))


def save_sums(directory: Path, sums: Mapping[str, Tensor], since: int, rank: int = 0) -> None:
    """What a process has summed over the steps after step `since`, the last one logged."""
    _write(directory, _of(SUMS, rank), sums, {"since": since})


def load_sums(directory: Path, device: torch.device, rank: int = 0) -> tuple[dict[str, Tensor], int]:
    """What save_sums was given."""
    tensors, values = _read(directory, _of(SUMS, rank))
    return {name: tensor.to(device) for name, tensor in tensors.items()}, values["since"]


def _of(name: str, rank: int) -> str:
    """A file's name for one of several processes; the first has the plain one."""
    return f"{name}-{rank}" if rank else name


def _write(directory: Path, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, directory / f"{name}.safetensors")
    write_json(directory / f"{name}.json", values)


def _read(directory: Path, name: str) -> tuple[dict[str, Tensor], Any]:
    return load_file(directory / f"{name}.safetensors"), read_json(directory / f"{name}.json")


def _content(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name != DIGEST]


def _is_whole(directory: Path) -> bool:
    record = read_json(directory / DIGEST)
    return isinstance(record, dict) and record.get("sha256") == file_digest(*_content(directory))


def _flush(path: Path) -> None:
    """Onto the disk: a digest must not outlive, in a power cut, what it is of."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
