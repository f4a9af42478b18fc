"""The benchmarks' original files, one folder per task under one data_dir, as Examples.

A split is what papers report: "test" is the labelled split (PIQA valid, SIQA, WinoGrande and BoolQ dev, the
others' test); "calibration" is a seeded slice of the training file that "train" leaves out; Alpaca's "test"
is cut from its one file in the same way. Rows that share a passage, a context or an instruction stay on one
side of every cut.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qtale_lib.data.files import (
    Located,
    Row,
    files_of,
    read_csv_folder,
    read_json_array,
    read_jsonl,
    read_jsonl_with_labels,
)
from qtale_lib.data.schema import SPLITS, Example
from qtale_lib.errors import DamagedError, UserError

CUT_SEED = 0
CALIBRATION_ROWS = 1000  # at most; never more than a tenth of the training file
ALPACA_TEST_ROWS = 2000
PUBLISHED_AS = {
    "alpaca_data": "train",
    "alpaca_eval": "test",
}  # other names of one file: its ids are the same


@dataclass(frozen=True)
class Loaded:
    """Examples of one split; source: file, sha256, rows, notes, and cuts (seed, row indices) if made."""

    examples: list[Example]
    source: dict


def read_split(name: str, split: str, data_dir: str | Path, alpaca: str = "original") -> Loaded:
    """Read one split of one benchmark; UserError names file, line and reason if it cannot be read."""
    benchmark, folder = find_benchmark(name, alpaca), Path(data_dir) / name
    read_from = source_split(name, split, benchmark)
    path = _find(folder, benchmark.files[read_from], name, split)
    stem = PUBLISHED_AS.get(path.stem, path.stem)
    examples = parse_rows(name, stem, benchmark, benchmark.read(path))
    if not examples:
        raise DamagedError(f"{path} holds no rows; restore the original file.")
    source = _describe(name, path, folder, examples)
    return cut_out(name, split, benchmark, Loaded(examples, source), read_from)


def find_benchmark(name: str, alpaca: str = "original") -> Benchmark:
    """The benchmark of a task's name; UserError for a name that is none."""
    if name not in BENCHMARKS:
        raise UserError(f'There is no task "{name}"; known: {", ".join(BENCHMARKS)}.')
    return CLEANED if (name, alpaca) == ("alpaca", "cleaned") else BENCHMARKS[name]


def source_split(name: str, split: str, benchmark: Benchmark) -> str:
    """The split whose rows a split is read from: its own, or "train" where it is cut from that."""
    if split not in SPLITS:
        raise UserError(f'There is no split "{split}"; use one of {", ".join(SPLITS)}.')
    if split not in benchmark.files and "train" not in benchmark.files:
        raise UserError(f"{name} has no {split} rows; it is a set of prompts, read as test.")
    if split == "validation" and split not in benchmark.files:
        raise UserError(f"{name} has no labelled validation file; use calibration rows, cut from train.")
    return split if split in benchmark.files else "train"


def _find(folder: Path, patterns: tuple[str, ...], name: str, split: str) -> Path:
    """The largest match of the first pattern that matches anything."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern), key=_bytes)
        if found:
            return found[-1]
    wanted = " or ".join(patterns)
    raise DamagedError(f"{name}, {split}: no {wanted} in {folder}; put the benchmark's original file there.")


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def parse_rows(name: str, stem: str, benchmark: Benchmark, rows: Iterable[Located]) -> list[Example]:
    """Rows in the original file's form as Examples; stem: that file's name, which ids bear.

    Raises:
        UserError: for the first row that is damaged, with its place and the reason.
    """
    examples = []
    for place, row in rows:
        try:
            parts = {"id": f"{name}/{stem}/{len(examples)}", **benchmark.parse(row)}
            examples.append(Example(task=name, **parts))
        except KeyError as error:
            raise DamagedError(f"{place}: the key {error} is missing; restore the original file.") from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise DamagedError(f"{place}: {error}; restore the original file.") from error
    return examples


def _describe(name: str, path: Path, folder: Path, examples: list[Example]) -> dict:
    relative, rows = str(path.relative_to(folder)), len(examples)
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.read_bytes())
    notes = notes_on(name, relative, rows)
    return {"task": name, "file": relative, "sha256": digest.hexdigest(), "rows": rows, "notes": notes}


def notes_on(name: str, file: str, rows: int, known: int | None = None) -> list[str]:
    """What is to be known of rows of an original file, or of their copy; another count than is known of the
    copy, or was published, is a warning too.
    """
    notes = [NOTES[name, file]] if (name, file) in NOTES else []
    published = known or ROWS.get((name, file))
    if published not in (None, rows):
        notes.append(f"{file} has {rows} rows; the published file has {published}")
        warnings.warn(f"{name}: {notes[-1]}.", stacklevel=4)
    return notes


# Cuts: which rows of the training file serve another split.


def cut_out(name: str, split: str, benchmark: Benchmark, loaded: Loaded, read_from: str) -> Loaded:
    """The rows of a split among those of the split it is read from; the source says how they were cut."""
    if read_from != "train":
        return loaded
    examples = loaded.examples
    cuts = _cuts(name, examples, benchmark)
    source = {**loaded.source, "cuts": {"seed": CUT_SEED, **cuts}}
    return Loaded([examples[i] for i in _kept(split, len(examples), cuts)], source)


def _cuts(name: str, examples: list[Example], benchmark: Benchmark) -> dict[str, list[int]]:
    """split -> row indices, disjoint in groups; the same for the same file, seeded by task and split."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(benchmark.group(example), []).append(index)
    sizes = {**benchmark.cut, "calibration": CALIBRATION_ROWS}
    cuts = {}
    for split, size in sizes.items():
        names = list(groups)
        random.Random(f"{CUT_SEED} {name} {split}").shuffle(names)
        wanted, taken = min(size, max(len(examples) // 10, 1)), []
        while names and len(taken) < wanted:  # one group can be all there is
            taken += groups.pop(names.pop())
        cuts[split] = sorted(taken)
    return cuts


def _kept(split: str, rows: int, cuts: dict[str, list[int]]) -> list[int]:
    if split in cuts:
        return cuts[split]
    gone = {index for indices in cuts.values() for index in indices}
    return [index for index in range(rows) if index not in gone]


# Parsers: a row -> the parts of an Example. KeyError, TypeError and ValueError are told with the row's place.


def _texts(row: Mapping, **keys: str) -> dict[str, str]:
    """{new name: row[key]}, each checked to be text."""
    texts = {name: row[key] for name, key in keys.items()}
    for name, key in keys.items():
        if not isinstance(texts[name], str) or not _is_unicode(texts[name]):
            raise TypeError(f'"{key}" is not text')
    return texts


def _is_unicode(text: str) -> bool:
    """Whether a text can be written down; JSON may hold one half of a pair that stands for a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _choices(row: Mapping, *keys: str) -> tuple[str, ...]:
    return tuple(_texts(row, **{key: key for key in keys}).values())


def _options(options: list[Mapping]) -> tuple[str, ...]:
    return tuple(_texts(option, text="text")["text"] for option in options)


def _label(label: object, labels: tuple | list) -> int:
    if label not in labels:
        raise ValueError(f"label {label!r} is not one of {', '.join(map(str, labels))}")
    return list(labels).index(label)


def _piqa(row: Mapping) -> dict:
    answer = _label(row["label"], (0, 1))
    return {"fields": _texts(row, goal="goal"), "choices": _choices(row, "sol1", "sol2"), "answer": answer}


def _siqa(row: Mapping) -> dict:
    return {
        "fields": _texts(row, context="context", question="question"),
        "choices": _choices(row, "answerA", "answerB", "answerC"),
        "answer": _label(row["label"], (1, 2, 3)),
    }


def _boolq(row: Mapping) -> dict:
    answer = _label(row["answer"], (True, False))
    return {
        "fields": _texts(row, passage="passage", question="question"),
        "choices": ("yes", "no"),
        "answer": answer,
    }


def _winogrande(row: Mapping) -> dict:
    fields = _texts(row, sentence="sentence")
    if fields["sentence"].count("_") != 1:
        raise ValueError('the sentence has not exactly one "_"')
    return {
        "fields": fields,
        "choices": _choices(row, "option1", "option2"),
        "answer": _label(row["answer"], ("1", "2")),
    }


def _arc(row: Mapping) -> dict:
    """Three to five choices, labelled A–E or 1–5."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    if not isinstance(texts, list | tuple) or not isinstance(labels, list):
        raise TypeError("its choices are no lists")
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices but {len(labels)} labels")
    options = [{"text": text} for text in texts]
    return {
        **_texts(row, id="id"),
        "fields": _texts(row, question="question"),
        "choices": _options(options),
        "answer": _label(row["answerKey"], labels),
    }


def _openbookqa(row: Mapping) -> dict:
    options = row["question"]["choices"]
    return {
        **_texts(row, id="id"),
        "fields": _texts(row["question"], question="stem"),
        "choices": _options(options),
        "answer": _label(row["answerKey"], [option["label"] for option in options]),
    }


def _mmlu(cells: list[str]) -> dict:
    if len(cells) != 7:
        raise ValueError(f"{len(cells) - 1} columns where question, four choices and the answer make 6")
    subject, question, *choices, answer = cells
    return {
        "fields": {"subject": subject, "question": question},
        "choices": tuple(choices),
        "answer": _label(answer, ("A", "B", "C", "D")),
    }


def _alpaca(row: Mapping) -> dict:
    fields = _texts(row, instruction="instruction", input="input")
    return {"fields": fields, "response": _texts(row, output="output")["output"]}


def _alpaca_eval(row: Mapping) -> dict:
    texts = _texts(row, instruction="instruction", output="output")
    return {"fields": {"instruction": texts["instruction"], "input": ""}, "response": texts["output"]}


def _samsum(row: Mapping) -> dict:
    texts = _texts(row, dialogue="dialogue", summary="summary")
    dialogue = texts["dialogue"].replace("\r\n", "\n")  # the original's line ends, not its copies'
    return {**_texts(row, id="id"), "fields": {"dialogue": dialogue}, "response": texts["summary"]}


@dataclass(frozen=True)
class Benchmark:
    """files: split -> file patterns, the first that matches is taken; group: what may not straddle a cut."""

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Path], Iterator[Located]]
    parse: Callable[[Row], dict]
    group: Callable[[Example], str]
    cut: Mapping[str, int] = field(default_factory=dict)


def _by(*names: str) -> Callable[[Example], str]:
    return lambda example: " ".join(example.fields[name] for name in names)


_ARC_FILES = {"train": ("train.jsonl",), "validation": ("validation.jsonl",), "test": ("test.jsonl",)}
BENCHMARKS = {
    "piqa": Benchmark(
        {"train": ("train.jsonl",), "test": ("valid.jsonl",)}, read_jsonl_with_labels, _piqa, _by("goal")
    ),
    "boolq": Benchmark(
        {"train": ("train.jsonl",), "test": ("dev.jsonl",)}, read_jsonl, _boolq, _by("passage")
    ),
    "siqa": Benchmark(
        {"train": ("train.jsonl",), "test": ("dev.jsonl",)}, read_jsonl_with_labels, _siqa, _by("context")
    ),
    "arc_easy": Benchmark(_ARC_FILES, read_jsonl, _arc, _by("question")),
    "arc_challenge": Benchmark(_ARC_FILES, read_jsonl, _arc, _by("question")),
    "winogrande": Benchmark(
        {"train": ("train_[xsml]*.jsonl",), "test": ("dev.jsonl",)},
        read_jsonl,
        _winogrande,
        lambda example: " ".join(sorted(example.choices)).lower(),  # twin sentences share their options
    ),
    "openbookqa": Benchmark(
        {"train": ("train.jsonl",), "validation": ("dev.jsonl",), "test": ("test.jsonl",)},
        read_jsonl,
        _openbookqa,
        _by("question"),
    ),
    "mmlu": Benchmark(
        {"train": ("auxiliary_train", "dev"), "validation": ("val",), "test": ("test",)},
        read_csv_folder,
        _mmlu,
        _by("subject", "question"),
    ),
    "alpaca": Benchmark(
        {"train": ("train.json", "alpaca_data.json")},
        read_json_array,
        _alpaca,
        _by("instruction"),
        cut={"test": ALPACA_TEST_ROWS},
    ),
    "alpaca_eval": Benchmark(
        {"test": ("test.json", "alpaca_eval.json")}, read_json_array, _alpaca_eval, _by("instruction")
    ),
    "samsum": Benchmark(
        {"train": ("train.json",), "validation": ("val.json",), "test": ("test.json",)},
        read_json_array,
        _samsum,
        _by("dialogue"),
    ),
}
CLEANED = replace(BENCHMARKS["alpaca"], files={"train": ("alpaca_data_cleaned.json",)})

NOTES = {
    ("mmlu", "dev"): "auxiliary_train is not there: mmlu trains on its dev questions",
    ("mmlu", "auxiliary_train"): "mmlu trains on auxiliary_train",
    **{
        ("winogrande", f"train_{size}.jsonl"): f"winogrande trains on train_{size}, the largest there"
        for size in ("xs", "s", "m", "l", "xl")
    },
}

# Rows of the published files, by (task, file); another count is a warning and a note, not an error.
ROWS = {
    ("piqa", "train.jsonl"): 16113,
    ("piqa", "valid.jsonl"): 1838,
    ("boolq", "train.jsonl"): 9427,
    ("boolq", "dev.jsonl"): 3270,
    ("siqa", "train.jsonl"): 33410,
    ("siqa", "dev.jsonl"): 1954,
    ("arc_easy", "train.jsonl"): 2251,
    ("arc_easy", "validation.jsonl"): 570,
    ("arc_easy", "test.jsonl"): 2376,
    ("arc_challenge", "train.jsonl"): 1119,
    ("arc_challenge", "validation.jsonl"): 299,
    ("arc_challenge", "test.jsonl"): 1172,
    ("winogrande", "train_s.jsonl"): 640,
    ("winogrande", "train_m.jsonl"): 2558,
    ("winogrande", "train_l.jsonl"): 10234,
    ("winogrande", "train_xl.jsonl"): 40398,
    ("winogrande", "dev.jsonl"): 1267,
    ("openbookqa", "train.jsonl"): 4957,
    ("openbookqa", "dev.jsonl"): 500,
    ("openbookqa", "test.jsonl"): 500,
    ("mmlu", "auxiliary_train"): 99842,
    ("mmlu", "dev"): 285,
    ("mmlu", "val"): 1531,
    ("mmlu", "test"): 14042,
    ("alpaca", "train.json"): 52002,
    ("alpaca", "alpaca_data.json"): 52002,
    ("alpaca", "alpaca_data_cleaned.json"): 51760,
    ("alpaca_eval", "test.json"): 805,
    ("alpaca_eval", "alpaca_eval.json"): 805,
    ("samsum", "train.json"): 14732,
    ("samsum", "val.json"): 818,
    ("samsum", "test.json"): 819,
}
