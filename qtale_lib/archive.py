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

from qtale_lib.errors import DamagedError, UserError
from qtale_lib.jobs import Job, all_jobs, computing, needs
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT
from qtale_lib.store import is_sound, replaced

ARCHIVE = ROOT / "results" / "archive"
# a quantization is no use without its files
KINDS = ("finetune", "threshold", "evaluation", "responses", "token_routes")
LEFT_OUT = ("choice_nll",)  # half of an archive's bytes, and nothing that is drawn or judged reads it
PRESET = 9  # xz's widest window: the same questions come again in every evaluation of a task


def archive(lab: Lab, folder: Path = ARCHIVE, others: Iterable[Lab] = ()) -> list[Path]:
    """Write every finished seed to folder/<profile>/seed-<n>.jsonl.xz; equal results give equal bytes.

    `others`: labs with the same store (the further settings of a study), whose results go along.

    Raises:
        UserError: if no seed is finished.
    """
    labs = (lab, *others)
    finished = [seed for seed in lab.profile.seeds if all(_is_finished(own, seed) for own in labs)]
    if not finished:
        name = lab.profile.name
        command = computing(name, is_study=bool(others))
        raise UserError(f"No seed of profile {name} is finished yet; `{command}` goes on.")
    return [_written(path(lab, seed, folder), _results(labs, seed)) for seed in finished]


def _is_finished(lab: Lab, seed: int) -> bool:
    return all(map(lab.is_done, _of_seed(all_jobs(lab.profile), seed)))


def _of_seed(jobs: Iterable[Job], seed: int) -> list[Job]:
    return [job for job in jobs if job.run.seed == seed]


def _archived(lab: Lab, seed: int) -> list[Job]:
    """All jobs, and as far as they are done those of notebook 12, which read more off models."""
    extra = _of_seed(needs(lab.profile, "12"), seed)
    return [*_of_seed(all_jobs(lab.profile), seed), *filter(lab.is_done, extra)]


def _results(labs: Iterable[Lab], seed: int) -> list[dict[str, Any]]:
    """Of one seed; what several labs have in common once."""
    found = [result for lab in labs for result in lab.stored(_archived(lab, seed), KINDS)]
    return list({(result["kind"], result["key"]): result for result in found}.values())


def path(lab: Lab, seed: int, folder: Path = ARCHIVE) -> Path:
    """Where a seed's results lie."""
    return folder / lab.profile.name / f"seed-{seed}.jsonl.xz"


def _written(where: Path, results: Iterable[dict[str, Any]]) -> Path:
    slim = [{**r, "value": {k: v for k, v in r["value"].items() if k not in LEFT_OUT}} for r in results]
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in slim)
    with replaced(where) as file:
        file.write_bytes(lzma.compress(lines.encode(), preset=PRESET))
    return where


def restore(lab: Lab, folder: Path = ARCHIVE) -> int:
    """Put what the profile's archive holds, and its store does not, into the store; returns how many.

    Raises:
        UserError: if there is no archive of the profile.
        DamagedError: if a file of it is damaged; what is whole is kept.
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
                if not (is_sound(result) and result.get("kind") in KINDS and _is_spec(result["spec"])):
                    raise ValueError(line)
                yield result
    except (lzma.LZMAError, EOFError, ValueError, RecursionError, TypeError):
        raise DamagedError(f"{file} is damaged; check it out again, or delete it.") from None


def _is_spec(spec: dict[str, Any]) -> bool:
    """Whether a result's spec has what its name is made of."""
    return spec.keys() >= {"task", "method", "seed"}
