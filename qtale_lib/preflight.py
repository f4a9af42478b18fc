"""What a run can be known to fail at, found before its first worker starts: folders, data, base, settings.

Reads the heads of files only, and needs no torch.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtale_lib.base import base_directory, read_config, tensor_shapes
from qtale_lib.data import Example
from qtale_lib.data.prompts import render
from qtale_lib.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qtale_lib.config import Profile
    from qtale_lib.jobs import Job
    from qtale_lib.lab import Lab

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def check(lab: Lab, wanted: Iterable[Job]) -> None:
    """Look at all that the jobs need.

    Raises:
        UserError: one sentence on the first thing that would make a job fail: a folder that cannot be
            written to, data or a file of the base missing or damaged, a setting that does not fit the base.
    """
    jobs = list(wanted)
    check_folders(lab)
    for task, split in dict.fromkeys(pair for job in jobs for pair in _splits(job, lab)):
        lab.examples(task, split)
    directory = check_base(lab.profile)
    check_settings(lab.profile, read_config(directory), tensor_shapes(directory), jobs)
    check_lengths(lab, directory, list(dict.fromkeys(job.run.task for job in jobs)))


def _splits(job: Job, lab: Lab) -> list[tuple[str, str]]:
    names = ["train"]
    names += [lab.profile.evaluated] if job.bits else []
    names += ["calibration"] if job.bits and job.run.routed else []
    return [(job.run.task, name) for name in names]


def check_folders(lab: Lab) -> None:
    """UserError if results or figures could not be written; nothing is left behind by the trial."""
    places = {lab.directory: "RESULTS", lab.store.root: "RESULTS", lab.figures: "FIGURES"}
    for folder, what in places.items():
        try:
            there = next(place for place in (folder, *folder.parents) if place.exists())
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to ({error.strerror}); make it a folder that can, or set "
                f"QTALE_{what}_DIR to one."
            ) from None


def check_base(profile: Profile) -> Path:
    """The folder of the base, its files sound as far as their heads tell; UserError if not."""
    try:
        directory = base_directory(profile)
        _check_config(directory)
        tensor_shapes(directory)
        _check_tokenizer(directory)
    except UserError as error:
        raise profile.refusal("base", f"cannot be used: {str(error).removesuffix('.')}") from None
    return directory


def _check_config(directory: Path) -> None:
    config, path = read_config(directory), directory / "config.json"
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type (= {json.dumps(family)}) must be one of {', '.join(FAMILIES)}.")
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            shown = json.dumps(config.get(name))
            raise UserError(f"{path}: {name} (= {shown}) must be a whole number of at least 1.")


def _check_tokenizer(directory: Path) -> None:
    if not any(all((directory / name).is_file() for name in names) for names in TOKENIZERS):
        choices = ", or ".join(" with ".join(names) for names in TOKENIZERS)
        raise UserError(f"{directory} holds no tokenizer; save one there: {choices}.")
    _fast_tokenizer(directory)


def _fast_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of tokenizer.json; None where the base comes with an older format."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package knows no narrower kind
        raise UserError(f"{path} is no readable tokenizer ({error}); copy or download it anew.") from None
    tokenizer.no_truncation()
    return tokenizer


def check_settings(
    profile: Profile, config: dict[str, Any], shapes: dict[str, list[int]], jobs: Sequence[Job]
) -> None:
    """UserError if a setting of the profile does not fit its base."""
    profile.split_batch()
    layers, positions = config["num_hidden_layers"], config["max_position_embeddings"]
    if profile.max_length > positions:
        raise profile.refusal(
            "max_length", f"is above the base's max_position_embeddings; lower it to {positions}"
        )
    if any(job.run.method != "full" for job in jobs) and profile.routing.always_run_layers >= layers:
        complaint = f"leaves none of the base's {layers} layers to route; lower it to at most {layers - 1}"
        raise profile.refusal("routing.always_run_layers", complaint)
    if any(job.bits and job.bits < 16 for job in jobs):
        _check_group_size(profile, config)
    _check_lora(profile, shapes)


def _check_group_size(profile: Profile, config: dict[str, Any]) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    widths = {hidden, config["intermediate_size"], heads * (config.get("head_dim") or hidden // heads)}
    wrong = sorted(width for width in widths if profile.group_size > 0 and width % profile.group_size)
    if wrong:
        complaint = (
            f"does not divide the {wrong[0]} columns of a layer of the base; use a divisor of "
            f"{math.gcd(*widths)}, or -1 for one group per row"
        )
        raise profile.refusal("group_size", complaint)


def _check_lora(profile: Profile, shapes: dict[str, list[int]]) -> None:
    linears = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name
    ]
    for target in profile.lora.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linears):
            there = ", ".join(sorted({name.split(".")[-1] for name in linears}))
            complaint = f'holds "{target}", which is no linear layer of the base; there are {there}'
            raise profile.refusal("lora.target_modules", complaint)


def check_lengths(lab: Lab, directory: Path, tasks: Sequence[str]) -> None:
    """UserError if max_length leaves a task without a training row, special tokens not counted.

    A base without tokenizer.json, or a row that special tokens alone make too long, is left to the workers.
    """
    profile, tokenizer = lab.profile, _fast_tokenizer(directory)
    for task in tasks if tokenizer else ():
        needs = (_fewest_tokens(tokenizer, example, profile) for example in lab.examples(task, "train"))
        if not any(need <= profile.max_length for need in needs):
            cure = "raise it" if profile.overlong == "cut" else "raise it, or set overlong: cut"
            raise profile.refusal("max_length", f"is too short for every training row of {task}; {cure}")


def _fewest_tokens(tokenizer: Tokenizer, example: Example, profile: Profile) -> int:
    """Tokens of an example, or of its response and one before it where the prompt may be cut."""
    text = render(example, profile.prompt)
    whole = _count(tokenizer, f"{text.prompt} {text.target}")
    return whole if profile.overlong == "drop" else whole - _count(tokenizer, text.prompt) + 1


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)
