"""Readers of the benchmarks' file formats: a path becomes (place, row) pairs, where place is "file, line n".

What is damaged raises DamagedError with that place and the reason.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from io import StringIO
from itertools import zip_longest
from pathlib import Path

from qtale_lib.errors import DamagedError

Row = Mapping | list
Located = tuple[str, Row]


def files_of(path: Path) -> list[Path]:
    """The csv files of a folder; or the one file, and its label file if it has one."""
    if path.is_dir():
        return sorted(path.glob("*.csv"))
    return [file for file in (path, _labels_of(path)) if file.exists()]


def _labels_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}-labels.lst")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}); restore the original file.") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        reason = f"not UTF-8 ({error.reason})"
        raise DamagedError(f"{path}, line {line}: {reason}; restore the original file.") from error


def _lines(path: Path) -> list[str]:
    return _text(path).rstrip("\n").split("\n")


def _reason(error: ValueError | RecursionError) -> str:
    """Why JSON cannot be read: as the reader has it, but for numbers and nesting of thousands."""
    return getattr(
        error, "msg", "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
    )


def read_jsonl(path: Path) -> Iterator[Located]:
    """Rows of one JSON object per line."""
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DamagedError(
                f"{place}: damaged JSON ({_reason(error)}); restore the original file."
            ) from error
        if not isinstance(row, dict):
            raise DamagedError(f"{place}: not a JSON object; restore the original file.")
        yield place, row


def read_jsonl_with_labels(path: Path) -> Iterator[Located]:
    """Rows of x.jsonl, each with key "label" from the same line of x-labels.lst."""
    labels_path = _labels_of(path)
    if not labels_path.exists():
        raise DamagedError(f"{labels_path} is missing; put the benchmark's label file beside {path.name}.")
    rows, labels = list(read_jsonl(path)), _lines(labels_path)
    for number, (located, label) in enumerate(zip_longest(rows, labels), start=1):
        if located is None or label is None:
            reason = f"{len(labels)} labels for the {len(rows)} rows of {path.name}"
            raise DamagedError(f"{labels_path}, line {number}: {reason}; restore the original files.")
        if not re.fullmatch("[0-9]{1,9}", label.strip()):
            reason = f"label {label!r} is not a number"
            raise DamagedError(f"{labels_path}, line {number}: {reason}; restore the original file.")
        yield f"{located[0]} (label in {labels_path.name})", {**located[1], "label": int(label)}


def read_json_array(path: Path) -> Iterator[Located]:
    """Rows of one JSON array, each with the line on which it starts."""
    text, decoder, line, counted = _text(path), json.JSONDecoder(), 1, 0
    mark = re.compile(r"\s*\[\s*").match(text)
    while mark and mark[0].strip() != "]":
        line, counted = line + text.count("\n", counted, mark.end()), mark.end()
        try:
            row, end = decoder.raw_decode(text, mark.end())
        except (ValueError, RecursionError) as error:
            reason = f"damaged JSON ({_reason(error)}); restore the original file."
            raise DamagedError(f"{path}, line {getattr(error, 'lineno', line)}: {reason}") from error
        yield f"{path}, line {line}", row
        mark = re.compile(r"\s*[],]\s*").match(text, end)
    if not mark:
        line = text.rstrip().count("\n") + 1
        raise DamagedError(f"{path}, line {line}: not a whole JSON array; restore the original file.")


def read_csv_folder(path: Path) -> Iterator[Located]:
    """Rows of every headerless csv of a folder, as [subject, cell, cell, ...].

    The rows of auxiliary_train have no subject: "".
    """
    for file in files_of(path):
        named = path.name != "auxiliary_train"  # whose files bear the names of other collections
        subject = re.sub("_(dev|val|test)$", "", file.stem).replace("_", " ") if named else ""
        reader = csv.reader(StringIO(_text(file), newline=""), strict=True)
        try:
            for cells in reader:
                yield f"{file}, line {reader.line_num}", [subject, *cells]
        except csv.Error as error:
            raise DamagedError(
                f"{file}, line {reader.line_num}: {error}; restore the original file."
            ) from error
