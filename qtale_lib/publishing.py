"""Committed copies of a finished profile: results/reference/<profile> and figures/reference/<profile>.

They are shown and compared with, never read as a cache. Scalars and θ curves of every result are kept with
their provenance; answers per question, histograms and weights stay behind. What many results have in common,
such as the protocol and the data, stands once in results.json, under "common": a result names it by a digest.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtale_lib import contrasts
from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs, computing, evaluation_specs, runs
from qtale_lib.lab import Lab, Spec, run_spec
from qtale_lib.provenance import ROOT, git_commit, last_change, versions
from qtale_lib.store import canonical, digest, read_json, write_json

REFERENCE = "reference"
KEPT_LISTS = ("coarse", "fine")
OWN = ("git_commit", "device", "seconds", "peak_memory_bytes", "finished_at")  # of a result's provenance


def publish(
    lab: Lab, results: Path | None = None, figures: Path | None = None, others: Iterable[Lab] = ()
) -> list[Path]:
    """Copy tables, figures and results; returns the files. UserError if the profile is not finished.

    `others`: labs of a study's further settings, which must be finished too; their results stay behind.
    """
    others = list(others)
    missing = [job.name for own in (lab, *others) for job in all_jobs(own.profile) if not own.is_done(job)]
    if missing or not lab.tables.is_dir() or not lab.figures.is_dir():
        name = lab.profile.name
        raise UserError(
            f"Profile {name} is not finished ({len(missing)} jobs missing); "
            f"run `{computing(name, is_study=bool(others))}` first."
        )
    results = _emptied((results or ROOT / "results" / REFERENCE) / lab.profile.name)
    figures = _emptied((figures or ROOT / "figures" / REFERENCE) / lab.profile.name)
    everything = _results(lab)
    write_json(results / "results.json", everything)
    write_json(results / "provenance.json", _provenance(lab, everything))
    copies = [_copied(path, results / "tables") for path in _files(lab.tables)]
    copies += [_copied(path, figures) for path in _files(lab.figures)]
    return [results / "results.json", results / "provenance.json", *copies]


def committed(profile: str) -> dict[str, dict[str, Any]]:
    """The published results of the profile of this name, by `cell`, each as in the store but for its config
    and its bulk; empty if none are committed.
    """
    kinds = read_json(ROOT / "results" / REFERENCE / profile / "results.json") or {}
    common = kinds.pop("common", {})
    return {
        cell(kind, result["spec"]): _whole(kind, result, common[result["common"]])
        for kind, results in kinds.items()
        for result in results
    }


def _whole(kind: str, result: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """A result that `_slim` made, with what it shares with others."""
    own = dict(result["provenance"])
    adapter = {name: own.pop(name) for name in ("adapter",) if name in own}
    made_from = {**shared["provenance"]["made_from"], **adapter}
    return {
        "kind": kind,
        **{name: result[name] for name in ("key", "spec")},
        "value": {**shared["value"], **result["value"]},
        "provenance": {**shared["provenance"], **own, "made_from": made_from},
    }


def cell(kind: str, spec: Spec) -> str:
    """What a result is called wherever it was computed; its key also says from what."""
    return canonical([kind, spec])


def sameness(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """A sentence on results here and their committed ones, of one run, its fine-tuning first: whether the
    adapter is the same, and if not, or if the evaluations differ, whether that can lie in the machine alone.
    """
    trained, there = pairs[0]
    same_keys = [here["key"] == other["key"] for here, other in pairs]
    if trained["value"]["adapter_sha256"] == there["value"]["adapter_sha256"]:
        if all(same_keys[1:]):
            return "The adapter is the committed one, bit for bit, and was evaluated as that was."
        return (
            "The adapter is the committed one, bit for bit, but was evaluated at another θ, on other "
            "questions, with other settings or by another version."
        )
    if same_keys[0]:
        return (
            "The adapter is not the committed one, though made from the same base, rows and settings: "
            "another CPU or build of torch may round otherwise."
        )
    return (
        "The adapter is not the committed one, which was made from another base or other rows, "
        "with other settings or by another version."
    )


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _copied(path: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(shutil.copyfile(path, folder / path.name))


def _results(lab: Lab) -> dict[str, Any]:
    everything = runs(lab.profile)
    specs: dict[str, list[Spec]] = {
        "finetune": [run_spec(run) for run in everything],
        "threshold": [run_spec(r, bits=bits) for r in everything if r.routed for bits in lab.profile.bits],
        "evaluation": [spec for run in everything for spec in evaluation_specs(lab.profile, run)],
    }
    common: dict[str, Any] = {}
    slim = {kind: [_slim(lab.result(kind, **spec), common) for spec in specs[kind]] for kind in specs}
    return {"common": common, **slim}


def _slim(result: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """What is a result's own; the rest of it goes into `common`, under the digest that the result names."""
    value, provenance = result["value"], result["provenance"]
    made_from = {k: v for k, v in provenance["made_from"].items() if k not in ("adapter", "theta")}
    shared = {
        "value": {k: v for k, v in value.items() if isinstance(v, dict)},
        "provenance": {**{k: v for k, v in provenance.items() if k not in OWN}, "made_from": made_from},
    }
    name = digest(shared)
    common[name] = shared
    adapter = {k: v for k, v in provenance["made_from"].items() if k == "adapter"}
    return {
        **{k: result[k] for k in ("key", "spec")},
        "value": {k: v for k, v in value.items() if k in KEPT_LISTS or not isinstance(v, dict | list)},
        "provenance": {**adapter, **{k: provenance[k] for k in OWN}},
        "common": name,
    }


def _provenance(lab: Lab, results: dict[str, Any]) -> dict[str, Any]:
    kinds = [entries for name, entries in results.items() if name != "common"]
    found = [result["provenance"] for entries in kinds for result in entries]
    return {
        "profile": lab.profile.model_dump(mode="json"),
        "profile_digest": lab.profile.digest(),
        "base": lab.base(),
        "git_commits": sorted({str(entry["git_commit"]) for entry in found}),
        "published_from": git_commit(),
        "versions": versions(),
        "devices": sorted({entry["device"] for entry in found}),
        "cores": sorted({shared["provenance"]["cores"] for shared in results["common"].values()}),
        "finished_between": [min(e["finished_at"] for e in found), max(e["finished_at"] for e in found)],
        "contrasts": {
            "file": contrasts.FILE.name,
            "sha256": hashlib.sha256(contrasts.FILE.read_bytes()).hexdigest(),
            "last_change": last_change(contrasts.FILE),
        },
    }
