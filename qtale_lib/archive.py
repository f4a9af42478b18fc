"""Finished results without their weights, a compressed file per seed: `archive` writes them, `restore` reads.

A grid of hours is committed in batches. Whoever clones the project puts them into the store, and judges the
claims anew or adds seeds without computing what is there.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs, response_jobs, token_jobs
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT

ARCHIVE = ROOT / "results" / "archive"
KINDS = (
    "finetune",
    "threshold",
    "evaluation",
    "responses",
    "token_routes",
)  # a quantization is no use without its files
PARTS = {"schema", "kind", "key", "status", "spec", "value", "provenance"}
LEFT_OUT = ("choice_nll",)  # half of an archive's bytes, and nothing that is drawn or judged reads it
PRESET = 9  # xz's widest window: the same questions come again in every evaluation of a task


def archive(lab: Lab, folder: Path = ARCHIVE) -> list[Path]:
    """Write every finished seed to folder/<profile>/seed-<n>.jsonl.xz; equal results give equal bytes.

    Raises:
        UserError: if no seed is finished.
    """
    jobs = {seed: [j for j in all_jobs(lab.profile) if j.run.seed == seed] for seed in lab.profile.seeds}
    finished = {seed: own for seed, own in jobs.items() if all(map(lab.is_done, own))}
    if not finished:
        name = lab.profile.name
        raise UserError(
            f"No seed of profile {name} is finished yet; `python -m qtale_lib run --profile {name}` goes on."
        )
    (folder / lab.profile.name).mkdir(parents=True, exist_ok=True)
    extra = [*response_jobs(lab.profile), *token_jobs(lab.profile)]  # as far as there: they need the weights
    also = {seed: [job for job in extra if job.run.seed == seed and lab.is_done(job)] for seed in finished}
    return [
        _written(path(lab, seed, folder), lab.stored([*own, *also[seed]], KINDS))
        for seed, own in finished.items()
    ]


def path(lab: Lab, seed: int, folder: Path = ARCHIVE) -> Path:
    """Where a seed's results lie."""
    return folder / lab.profile.name / f"seed-{seed}.jsonl.xz"


def _written(where: Path, results: Iterable[dict[str, Any]]) -> Path:
    slim = [{**r, "value": {k: v for k, v in r["value"].items() if k not in LEFT_OUT}} for r in results]
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in slim)
    where.write_bytes(lzma.compress(lines.encode(), preset=PRESET))
    return where


def restore(lab: Lab, folder: Path = ARCHIVE) -> int:
    """Put what the profile's archive holds, and its store does not, into the store; returns how many.

    Raises:
        UserError: if there is no archive of the profile, or a file of it is damaged; what is whole is kept.
    """
    files = sorted((folder / lab.profile.name).glob("seed-*.jsonl.xz"))
    if not files:
        raise UserError(f"{folder / lab.profile.name} holds no archive of profile {lab.profile.name}.")
    return sum(lab.take_in(result) for file in files for result in _read(file))


def _read(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                result = json.loads(line)
                if not (isinstance(result, dict) and result.keys() >= PARTS and result["kind"] in KINDS):
                    raise ValueError(line)
                yield result
    except (lzma.LZMAError, EOFError, ValueError):
        raise UserError(f"{file} is damaged; check it out again, or delete it.") from None
