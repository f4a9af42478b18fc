"""What a run can be known to fail at, found before its first worker starts: folders, data, base, memory.

Reads the heads of files only, and needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from qtale_lib import estimates, hub, machine, memory, workload
from qtale_lib.base import base_at_hand, base_directory, read_config, tensor_shapes
from qtale_lib.data import Example
from qtale_lib.data.prompts import render
from qtale_lib.errors import DamagedError, MachineError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qtale_lib.config import Profile
    from qtale_lib.efficiency import Shape
    from qtale_lib.estimates import Stage
    from qtale_lib.jobs import Job
    from qtale_lib.lab import Lab
    from qtale_lib.machine import Machine
    from qtale_lib.workload import Workload

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim")
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def check(lab: Lab, wanted: Iterable[Job], afresh: bool = False) -> None:
    """Look at all that the jobs need.

    afresh: what is in the store already will be computed again.
    Raises:
        UserError: one sentence on the first thing that would make a job fail: a folder that cannot be
            written to, data or a file of the base missing or damaged, a setting that does not fit the base,
            a model that does not fit into memory.
    """
    jobs = list(wanted)
    check_folders(lab)
    _check_source(lab.profile, jobs)
    missing = at_hand(lab.profile) is None
    if missing:
        config_of(lab.profile)  # whether it can be had at all
    for task, split in dict.fromkeys(pair for job in jobs for pair in _splits(job, lab)):
        lab.examples(task, split)
    if missing:  # before gigabytes are fetched for nothing
        check_fit(lab, jobs)
    directory = check_base(lab.profile)
    check_settings(lab.profile, read_config(directory), tensor_shapes(directory), jobs)
    check_lengths(lab, directory, list(dict.fromkeys(job.run.task for job in jobs)))
    if afresh:
        check_fit(lab, jobs)


def _check_source(profile: Profile, jobs: Sequence[Job]) -> None:
    made_up = profile.data == "microworld" and profile.data_dir is None
    if made_up and profile.generation.source != "own" and any(job.extra for job in jobs):
        complaint = "is not in the embedded world; set own, or data: hub, or data_dir to a folder with it"
        raise profile.refusal("generation.source", complaint)


def _splits(job: Job, lab: Lab) -> list[tuple[str, str]]:
    names = ["train"]
    names += [lab.profile.evaluated] if job.bits else []
    names += ["calibration"] if job.bits and job.run.routed else []
    asked = [lab.asked(job.run.task)] if job.extra else []
    return [*((job.run.task, name) for name in names), *asked]


def check_folders(lab: Lab) -> None:
    """UserError if results or figures could not be written; nothing is left behind by the trial."""
    places = {lab.directory: "RESULTS", lab.store.root: "RESULTS", lab.figures: "FIGURES"}
    for folder, what in places.items():
        try:
            tempfile.TemporaryFile(dir=existing(folder)).close()
        except OSError as error:
            raise MachineError(
                f"{folder} cannot be written to ({error.strerror}); make it a folder that can, or set "
                f"QTALE_{what}_DIR to one."
            ) from None


def at_hand(profile: Profile) -> Path | None:
    """The folder of the base, or None if it would have to be fetched; UserError if it is no model's."""
    with _about_base(profile):
        return base_at_hand(profile)


def check_base(profile: Profile) -> Path:
    """The folder of the base, its files sound as far as their heads tell; UserError if not."""
    with _about_base(profile):
        directory = base_directory(profile)
        _check_config(directory)
        tensor_shapes(directory)
        _check_tokenizer(directory)
    return directory


@contextlib.contextmanager
def _about_base(profile: Profile) -> Iterator[None]:
    """UserError, of its kind, as the profile's refusal of its `base`."""
    try:
        yield
    except UserError as error:
        refusal = profile.refusal("base", f"cannot be used: {str(error).removesuffix('.')}")
        raise type(error)(str(refusal)) from None


def config_of(profile: Profile) -> dict[str, Any]:
    """The base's config.json, fetched alone if the base is not here; UserError if it cannot be had."""
    with _about_base(profile):
        directory = base_at_hand(profile) or hub.config_file(profile.base, profile.revision).parent
        _check_config(directory)
        return read_config(directory)


def _check_config(directory: Path) -> None:
    config, path = read_config(directory), directory / "config.json"
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type (= {json.dumps(family)}) must be one of {', '.join(FAMILIES)}.")
    for name in (*SIZES, *(name for name in OPTIONAL_SIZES if config.get(name) is not None)):
        if type(config.get(name)) is not int or config[name] < 1:
            shown = json.dumps(config.get(name))
            raise UserError(f"{path}: {name} (= {shown}) must be a whole number of at least 1.")


def _check_tokenizer(directory: Path) -> None:
    if not any(all((directory / name).is_file() for name in names) for names in TOKENIZERS):
        choices = ", or ".join(" with ".join(names) for names in TOKENIZERS)
        raise DamagedError(f"{directory} holds no tokenizer; save one there: {choices}.")
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
        raise DamagedError(f"{path} is no readable tokenizer ({error}); copy or download it anew.") from None
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
    if profile.training.weight_bits < 16 or any(job.bits and job.bits < 16 for job in jobs):
        _check_group_size(profile, config)
    _check_lora(profile, shapes)
    _check_compression(profile, layers, jobs)


def _check_compression(profile: Profile, layers: int, jobs: Sequence[Job]) -> None:
    jobs = [job for job in jobs if job.bits]
    widths = {job.bits for job in jobs if job.bits < 16}
    if profile.quantization.widths == "mixed" and widths - {3}:
        raise profile.refusal("quantization.widths", "mixes to 3 bits alone; set bits: [3], or [16, 3]")
    if profile.pruning.is_none() or not jobs:
        return
    part = "weights" if profile.pruning.layers == "none" else "layers"
    key, (method, _, amount) = f"pruning.{part}", getattr(profile.pruning, part).partition(" ")
    if widths:
        raise profile.refusal(key, "is for models in 16 bits; set bits: [16]")
    if part == "layers" and profile.pruning.weights != "none":
        raise profile.refusal(key, "does not go with pruned weights; set either of the two to none")
    if part == "layers" and any(job.run.method != "full" for job in jobs):
        raise profile.refusal(key, "is for models without routers; set methods: [full]")
    if part == "layers" and method != "early_exit" and int(amount) >= layers:
        raise profile.refusal(key, f"leaves none of the base's {layers} layers")


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


def workloads(lab: Lab, jobs: Sequence[Job]) -> list[Workload]:
    """How much each task of the jobs has to do; UserError if its data cannot be read."""
    directory = at_hand(lab.profile)
    tokenizer = _fast_tokenizer(directory) if directory else None
    scored = {job.run.task: bool(job.bits) for job in sorted(jobs, key=lambda job: job.bits or 0)}
    return [workload.measured(lab, task, tokenizer, any_scored) for task, any_scored in scored.items()]


def check_fit(lab: Lab, jobs: Sequence[Job]) -> float:
    """The most that a worker on the jobs is estimated to hold of memory, or of its GPU's, in bytes.

    Raises:
        UserError: if this machine has less, saying by how much.
    """
    if not jobs:
        return 0.0
    profile, now = lab.profile, machine.look()
    shape, work, stages = _stages(lab, jobs, now.device)
    for stage in stages:
        check_stage(profile, stage, now)
    check_disk(lab, shape, work, jobs)
    host = memory.PROCESS["cpu"] + memory.base_bytes(shape, profile)
    if now.gpus and host > now.free:
        raise _too_large(f"profile {profile.name}: loading the base", host, "memory", now.free)
    return max(stage.peak for stage in stages) + (memory.CONTEXT if now.gpus else 0)


def peak_bytes(lab: Lab, jobs: Sequence[Job], device: str) -> float:
    """The most that a process on the jobs is estimated to hold, on a "cpu" or of a "gpu"."""
    return max(stage.peak for stage in _stages(lab, jobs, device)[2])


def _stages(lab: Lab, jobs: Sequence[Job], device: str) -> tuple[Any, Any, list[Any]]:
    """The base's shape, the workloads, and what each stage is estimated to take."""
    shape, work = estimates.shape_of(config_of(lab.profile)), workloads(lab, jobs)
    return shape, work, estimates.stages(lab.profile, shape, work, jobs, device)


def check_stage(profile: Profile, stage: Stage, now: Machine) -> None:
    """UserError if a stage needs more memory than one GPU, or the machine where it has none, can give."""
    has = capacity(now)
    if stage.peak > has:
        what = f"profile {profile.name}: {stage.name} ({stage.worst})"
        kind = f"memory on {now.gpus[0].name}" if now.gpus else "memory"
        raise _too_large(what, stage.peak, kind, has)


def check_disk(lab: Lab, shape: Shape, work: Sequence[Workload], jobs: Iterable[Job]) -> dict[str, float]:
    """Bytes that the jobs are estimated to write, {"results", "base"}; UserError if a disk has less."""
    needs = {"results": estimates.results_bytes(lab.profile, shape, work, jobs), "base": 0.0}
    if at_hand(lab.profile) is None:
        needs["base"] = estimates.download_bytes(shape)
    places = {"results": existing(lab.directory), "base": existing(hub.cache_folder())}
    for name, place in places.items():
        together = [other for other in places if places[other].stat().st_dev == place.stat().st_dev]
        needed, free = sum(needs[other] for other in together), psutil.disk_usage(str(place)).free
        if needed > free:
            raise MachineError(
                f"profile {lab.profile.name}: {' and '.join(together)} need about {gib(needed)} on the disk "
                f"of {place}, and {gib(free)} are free: {gib(needed - free)} too little; free some, or set "
                f"{'QTALE_RESULTS_DIR' if name == 'results' else 'HF_HOME'} to a folder on another."
            )
    return needs


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def capacity(now: Machine) -> float:
    """Bytes that a job can have: of the smallest GPU, less what CUDA itself takes; else of memory."""
    if not now.gpus:
        return now.free
    return min(card.free for card in now.gpus) * (1 - memory.FRAGMENTED) - memory.CONTEXT


def _too_large(what: str, needed: float, kind: str, has: float) -> MachineError:
    return MachineError(
        f"{what} needs about {gib(needed)} of {kind}, and {gib(has)} can be had: {gib(needed - has)} too "
        "little; lower training.batch_size, training.eval_batch_size or max_length, or choose a smaller base."
    )


def gib(size: float) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{size / 2**30:.1f} GiB"
