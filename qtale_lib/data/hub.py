"""The benchmarks from the hub, as the same Examples as from their original files.

Every repository holds its rows as data: nothing remote is run. A row is brought into the form of the original
file's row; parsing, ids, row counts and cuts are those of `benchmarks`. A revision is a commit of the
repository, as other projects pin it: no hub could be reached where this was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtale_lib.data.benchmarks import (
    Loaded,
    cut_out,
    find_benchmark,
    notes_on,
    parse_rows,
    source_split,
)
from qtale_lib.data.files import Located, Row, read_json_array
from qtale_lib.errors import UserError
from qtale_lib.hub import silent


def _same(row: Mapping) -> Row:
    return row


def _siqa(row: Mapping) -> Row:
    return {**row, "label": int(row["label"])}


def _openbookqa(row: Mapping) -> Row:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    choices = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return {**row, "question": {"stem": row["question_stem"], "choices": choices}}


def _mmlu(row: Mapping) -> Row:
    return [
        row["subject"].replace("_", " "),
        row["question"],
        *row["choices"],
        dict(enumerate("ABCD"))[row["answer"]],
    ]


def _samsum(row: Mapping) -> Row:
    return {**row, "dialogue": row["dialogue"] or ""}  # one dialogue is empty, and in a table that is none


@dataclass(frozen=True)
class Copy:
    """A benchmark on the hub. splits: ours -> (the hub's, the original file, whose name ids bear); counts:
    rows of an original file, where this copy is known to have another number.
    """

    repository: str
    revision: str
    splits: Mapping[str, tuple[str, str]]
    config: str | None = None
    adapt: Callable[[Mapping], Row] = _same
    file: str | None = None  # a JSON file to read by itself, in a repository that holds a script
    counts: Mapping[str, int] = field(default_factory=dict)


_ARC = Copy(
    "allenai/ai2_arc",
    "210d026faf9955653af8916fad021475a3f00453",
    {split: (split, f"{split}.jsonl") for split in ("train", "validation", "test")},
)
COPIES = {
    "piqa": Copy(
        "baber/piqa",  # ybisk/piqa as data: the original repository holds a script
        "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
        {"train": ("train", "train.jsonl"), "test": ("validation", "valid.jsonl")},
    ),
    "boolq": Copy(
        "google/boolq",
        "35b264d03638db9f4ce671b711558bf7ff0f80d5",
        {"train": ("train", "train.jsonl"), "test": ("validation", "dev.jsonl")},
    ),
    "siqa": Copy(
        "lighteval/siqa",  # allenai/social_i_qa as data
        "54c6a1f8cb6daf4f5abf24a601852612fb35eb25",
        {"train": ("train", "train.jsonl"), "test": ("validation", "dev.jsonl")},
        adapt=_siqa,
    ),
    "arc_easy": replace(_ARC, config="ARC-Easy"),
    "arc_challenge": replace(_ARC, config="ARC-Challenge"),
    "winogrande": Copy(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        {"train": ("train", "train_xl.jsonl"), "test": ("validation", "dev.jsonl")},
        config="winogrande_xl",
    ),
    "openbookqa": Copy(
        "allenai/openbookqa",
        "388097ea7776314e93a529163e0fea805b8a6454",
        {
            "train": ("train", "train.jsonl"),
            "validation": ("validation", "dev.jsonl"),
            "test": ("test", "test.jsonl"),
        },
        config="main",
        adapt=_openbookqa,
    ),
    "mmlu": Copy(
        "cais/mmlu",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        {
            "train": ("auxiliary_train", "auxiliary_train"),
            "validation": ("validation", "val"),
            "test": ("test", "test"),
        },
        config="all",
        adapt=_mmlu,
    ),
    "alpaca": Copy(
        "tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", {"train": ("train", "train.json")}
    ),
    "alpaca_eval": Copy(
        "tatsu-lab/alpaca_eval",
        "2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        {"test": ("test", "test.json")},
        file="alpaca_eval.json",
    ),
    "samsum": Copy(
        "knkarthick/samsum",
        "6b929ff10edec703164e3ddb2e94aae058c9ab5f",
        {
            "train": ("train", "train.json"),
            "validation": ("validation", "val.json"),
            "test": ("test", "test.json"),
        },
        adapt=_samsum,
        counts={"train.json": 14731},
    ),
}
CLEANED = Copy(
    "yahma/alpaca-cleaned",
    "12567cabf869d7c92e573c7c783905fc160e9639",
    {"train": ("train", "alpaca_data_cleaned.json")},
)


def read_split(name: str, split: str, alpaca: str = "original") -> Loaded:
    """Read one split of one benchmark; UserError if the hub cannot give it, or a row is damaged."""
    benchmark = find_benchmark(name, alpaca)
    read_from = source_split(name, split, benchmark)
    copy = CLEANED if (name, alpaca) == ("alpaca", "cleaned") else COPIES[name]
    hub_split, file = copy.splits[read_from]
    rows = _fetch(name, copy, hub_split)
    place = f"{copy.repository}, {hub_split}"
    examples = parse_rows(name, file.partition(".")[0], benchmark, _located(copy, place, rows))
    if not examples:
        raise UserError(f"{place} holds no rows; set data_dir to a folder with the original files.")
    notes = notes_on(name, file, len(examples), copy.counts.get(file))
    source = {
        "task": name,
        "file": place,
        "revision": copy.revision,
        "fingerprint": getattr(rows, "_fingerprint", None),
        "rows": len(examples),
        "notes": notes,
    }
    return cut_out(name, split, benchmark, Loaded(examples, source), read_from)


def _fetch(name: str, copy: Copy, split: str) -> Any:
    """The rows of one split of the hub, fetched or from the cache."""
    import datasets
    from huggingface_hub import hf_hub_download

    try:
        with silent():
            if copy.file:  # datasets refuses a repository that holds a script, even where it is not to be run
                kept = hf_hub_download(
                    copy.repository, copy.file, repo_type="dataset", revision=copy.revision
                )
                return [row for _, row in read_json_array(Path(kept))]
            return datasets.load_dataset(copy.repository, copy.config, split=split, revision=copy.revision)
    except Exception as error:  # the client raises many kinds: offline, no such revision, no such split
        raise UserError(
            f"{name}: {copy.repository}, {split}, cannot be had from the hub ({type(error).__name__}); "
            "connect once, or set data_dir to a folder with the original files."
        ) from error


def _located(copy: Copy, place: str, rows: Any) -> Iterator[Located]:
    """Each row in the original file's form; those of several subjects by subject, as the files are read."""
    placed = [(f"{place}, row {number}", row) for number, row in enumerate(rows, start=1)]
    if copy.adapt is _mmlu:
        placed.sort(key=lambda pair: pair[1]["subject"])
    for where, row in placed:
        try:
            yield where, copy.adapt(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(
                f"{where}: {type(error).__name__} ({error}); the repository has changed: set data_dir."
            ) from error
