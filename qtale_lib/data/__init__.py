"""Data room: one Example schema; the embedded world, or the benchmarks' original files; prompts and encoding.

>>> from qtale_lib import load_task
>>> questions = load_task("arc_easy", "test")                        # the embedded world
>>> questions = load_task("arc_easy", "test", data_dir="benchmarks")  # benchmarks/arc_easy/test.jsonl
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from qtale_lib.data import hub
from qtale_lib.data.benchmarks import BENCHMARKS, Loaded, read_split
from qtale_lib.data.schema import SPLITS, Example

__all__ = ["BENCHMARKS", "SPLITS", "Example", "Loaded", "data_hash", "load_task", "read_task", "subset"]


def load_task(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    data: str = "microworld",
    alpaca: str = "original",
) -> list[Example]:
    """Examples of a task's "train", "validation", "calibration" or "test" split.

    data_dir: the folder that holds <name>/ with the benchmark's original files; None takes `data`: the
    embedded world ("microworld") or the hub ("hub"). alpaca: its "original" rows or the "cleaned" ones.
    Raises UserError, with file, line and reason, for what is missing or damaged.
    """
    return read_task(name, split, data_dir, data, alpaca).examples


def read_task(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    data: str = "microworld",
    alpaca: str = "original",
) -> Loaded:
    """load_task's examples and their source: file (and its sha256, or repository and revision), rows, cuts
    (seed, indices), notes.
    """
    if data_dir is not None:
        return read_split(name, split, data_dir, alpaca)
    if data == "hub":
        return hub.read_split(name, split, alpaca)
    from qtale_lib.data import microworld  # built on first use, and it imports this package

    return Loaded(microworld.load(name, split), {"task": name, "file": "embedded world", "notes": []})


def subset(examples: list[Example], limit: int | None, seed: int = 0) -> list[Example]:
    """At most `limit` examples, drawn by a fixed seed over the whole list and kept in its order (files are
    often sorted by subject, so their first rows are no sample).

    Those on facts that none drawn before rests on go first, then those on facts met once, and so on: as many
    distinct facts as there can be, evenly. Without facts it is a plain sample.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    drawn = random.Random(seed).sample(range(len(examples)), len(examples))
    met: Counter[str] = Counter()
    repeats = {}
    for index in drawn:
        facts = examples[index].facts
        repeats[index] = max((met[fact] for fact in facts), default=0)
        met.update(facts)
    chosen = sorted(drawn, key=repeats.__getitem__)[:limit]  # stable: as drawn within equal repeats
    return [examples[index] for index in sorted(chosen)]


def code_stamp() -> list[list[str | int]]:
    """Names, sizes and times of the code that the embedded world's examples come of: they stay as it does."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def data_hash(examples: list[Example]) -> str:
    """sha256 over the examples' whole content, in order; recorded beside every result."""
    text = json.dumps([asdict(example) for example in examples], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
