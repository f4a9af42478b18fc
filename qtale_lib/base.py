"""The base model of a profile: where it lies, what it is (read without torch), and loading it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale_lib.errors import UserError
from qtale_lib.store import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qtale_lib.config import Profile

EMBEDDED = "microworld"
LOADED_FILES = ("*.safetensors", "*.json", "tokenizer.model")


def base_directory(profile: Profile) -> Path:
    """Folder of the profile's base."""
    return find_base(profile.base, profile.revision)


def find_base(name: str, revision: str | None = None) -> Path:
    """Folder of a base: the embedded one, a path, a name in $QTALE_MODELS_DIR, or fetched from the hub.

    Raises:
        UserError: if it is nowhere, or its folder holds no config.json.
    """
    if name == EMBEDDED:
        from qtale_lib.data.microworld import base_directory as embedded

        return _with_config(embedded())
    places = [Path(name).expanduser()]
    if models := os.environ.get("QTALE_MODELS_DIR"):
        places += [Path(models) / name, Path(models) / Path(name).name]
    for place in places:
        if place.is_dir():
            return _with_config(place)
    return _from_hub(name, revision)


def _with_config(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"The base model's folder {directory} holds no config.json; point `base` at a saved model."
        )
    return directory


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(LOADED_FILES))
    except Exception as error:  # the hub's client raises many kinds: no such repository, gated, offline
        raise UserError(
            f'Base model "{name}" is neither a folder, nor in QTALE_MODELS_DIR, nor to be had '
            f"from the hub ({type(error).__name__}); correct `base` in the profile or download the model."
        ) from error
    return Path(found)


def base_facts(profile: Profile) -> dict[str, Any]:
    """Name, config, parameter counts and sha256 of the base, from its files alone; reads every byte once."""
    directory = base_directory(profile)
    files = sorted({path for pattern in LOADED_FILES for path in directory.glob(pattern)})
    return {
        "name": profile.base,
        "sha256": file_digest(*files),
        "config": json.loads((directory / "config.json").read_text(encoding="utf-8")),
        "parameters": _parameter_counts(directory),
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
    }


def check_group_size(facts: dict[str, Any], group_size: int) -> None:
    """UserError if groups of that size do not divide every decoder linear's rows; -1 always does."""
    config = facts["config"]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    widths = {hidden, config["intermediate_size"], heads * (config.get("head_dim") or hidden // heads)}
    wrong = sorted(width for width in widths if group_size > 0 and width % group_size)
    if wrong:
        raise UserError(
            f"group_size (= {group_size}) does not divide the {wrong[0]} columns of a layer of "
            f"{facts['name']}; use a divisor of {math.gcd(*widths)}, or -1 for one group per row."
        )


def file_stamp(profile: Profile) -> list[list[Any]]:
    """Names, sizes and times of the base's files: while it stays the same, so does base_facts."""
    directory = base_directory(profile)
    files = sorted({path for pattern in LOADED_FILES for path in directory.glob(pattern)})
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _parameter_counts(directory: Path) -> dict[str, int]:
    """Parameters by part: decoder, embedding, lm_head (0 where it is tied), norm; and total."""
    counts = {"decoder": 0, "embedding": 0, "lm_head": 0, "norm": 0}
    for path in directory.glob("*.safetensors"):
        for name, tensor in _header(path).items():
            counts[_part(name)] += math.prod(tensor["shape"])
    return {**counts, "total": sum(counts.values())}


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _part(name: str) -> str:
    if ".layers." in name:
        return "decoder"
    if "lm_head" in name:
        return "lm_head"
    return "embedding" if "embed" in name else "norm"


def load_base(profile: Profile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in the profile's dtype on this process's device, and its tokenizer with a padding token."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = base_directory(profile)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, profile.dtype), trust_remote_code=False, use_safetensors=True
    )
    return model.to(device()), load_tokenizer(directory)


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
