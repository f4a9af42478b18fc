"""The base model of a profile: where it lies, what it is (read without torch), and loading it."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qtale_lib import hub
from qtale_lib.errors import DamagedError
from qtale_lib.hub import LOADED_FILES
from qtale_lib.store import file_digest, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qtale_lib.config import Profile

EMBEDDED = "microworld"


def base_directory(profile: Profile) -> Path:
    """Folder of the profile's base."""
    return find_base(profile.base, profile.revision)


def find_base(name: str, revision: str | None = None) -> Path:
    """Folder of a base: the embedded one, a path, a name in $QTALE_MODELS_DIR, or fetched from the hub.

    Raises:
        UserError: if it is nowhere, or its folder holds no config.json.
    """
    return _local_base(name) or _with_config(hub.snapshot(name, revision))


def base_at_hand(profile: Profile) -> Path | None:
    """Folder of the profile's base, or None if it, or a part of it, would have to be fetched first.

    Raises:
        UserError: if its folder holds no config.json.
    """
    if local := _local_base(profile.base):
        return local
    found = hub.cached(profile.base, profile.revision)
    with contextlib.suppress(DamagedError):  # its config.json may be there alone
        return found if found and tensor_shapes(found) else None
    return None


def _local_base(name: str) -> Path | None:
    if name == EMBEDDED:
        from qtale_lib.data.microworld import base_directory as embedded

        return _with_config(embedded())
    places = [Path(name).expanduser()]
    if models := os.environ.get("QTALE_MODELS_DIR"):
        places += [Path(models) / name, Path(models) / Path(name).name]
    return next((_with_config(place) for place in places if place.is_dir()), None)


def _with_config(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise DamagedError(
            f"The base model's folder {directory} holds no config.json; point `base` at a saved model."
        )
    return directory


def base_facts(profile: Profile) -> dict[str, Any]:
    """Name, config, parameter counts and sha256 of the base, from its files alone; reads every byte once.

    Raises:
        UserError: if a file is missing, cut off or damaged.
    """
    directory = base_directory(profile)
    config, shapes = read_config(directory), tensor_shapes(directory)
    files = sorted({path for pattern in LOADED_FILES for path in directory.glob(pattern)})
    return {
        "name": profile.base,
        "sha256": file_digest(*files),
        "config": config,
        "parameters": _parameter_counts(shapes),
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    }


def file_stamp(profile: Profile) -> list[list[Any]]:
    """Names, sizes and times of the base's files: while it stays the same, so does base_facts."""
    directory = base_directory(profile)
    files = sorted({path for pattern in LOADED_FILES for path in directory.glob(pattern)})
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def read_config(directory: Path) -> dict[str, Any]:
    """The base's config.json; UserError if it cannot be read or is no JSON object."""
    path = directory / "config.json"
    config = _object(path)
    if config is None:
        raise DamagedError(f"{path} is not readable as a JSON object; copy or download it anew.")
    return config


def _object(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError):
        value = read_json(path)
        return value if isinstance(value, dict) else None
    return None


def tensor_shapes(directory: Path) -> dict[str, list[int]]:
    """Shape of every tensor in the base's safetensors, by name, from their headers.

    Raises:
        UserError: if there are none, one of several parts is missing, or one is cut off or damaged.
    """
    files = sorted(directory.glob("*.safetensors"))
    missing = sorted(_parts(directory) - {path.name for path in files})
    if missing or not files:
        name = missing[0] if missing else "model.safetensors"
        raise DamagedError(f"{directory} holds no {name}; copy, download or save the model anew.")
    return {name: shape for path in files for name, shape in header(path).items()}


def tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor that transformers would load from the folder; UserError as above."""
    tensor_shapes(directory)
    parts = _parts(directory) or {"model.safetensors"}
    return {name: directory / part for part in sorted(parts) for name in header(directory / part)}


def _parts(directory: Path) -> set[str]:
    """Names of the files that the weights are spread over, if they are."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return set()
    places = (_object(index) or {}).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DamagedError(f"{index} is not readable as an index of weights; copy or download it anew.")
    return set(places.values())


def _parameter_counts(shapes: dict[str, list[int]]) -> dict[str, int]:
    """Parameters by part: decoder, embedding, lm_head (0 where it is tied), norm; and total."""
    counts = {"decoder": 0, "embedding": 0, "lm_head": 0, "norm": 0}
    for name, shape in shapes.items():
        counts[_part(name)] += math.prod(shape)
    return {**counts, "total": sum(counts.values())}


def header(path: Path) -> dict[str, list[int]]:
    """Shape of every tensor in a safetensors file; DamagedError if it is damaged or its length is another."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise DamagedError(
            f"{path} is no readable safetensors file ({reason}); copy or download it anew."
        ) from None


def _part(name: str) -> str:
    if ".layers." in name:
        return "decoder"
    if "lm_head" in name:
        return "lm_head"
    return "embedding" if "embed" in name else "norm"


def load_base(profile: Profile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in the profile's dtype on this process's device, and its tokenizer with a padding token.

    With compute.sharding fsdp, the device holds this process's part of it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    directory, compute = base_directory(profile), profile.compute
    sharded = compute.sharding == "fsdp"
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, profile.dtype),
        trust_remote_code=False,
        use_safetensors=True,
        distributed_config=DistributedConfig(fsdp_size=compute.processes) if sharded else None,
    )
    return model if sharded else model.to(device()), load_tokenizer(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with end-of-text as padding where it has none of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def device() -> str:
    """Where this process computes: its GPU, else the processor."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
