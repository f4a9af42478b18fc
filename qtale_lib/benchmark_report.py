"""What a benchmark's JSON says: targets met or missed, tables, frames for the figures. Needs no torch.

A result holds "settings", "shape", "machine", "times" (one row per phase, size, format and variant: median
"seconds" with quartiles "low" and "high", bytes of the cache), "weights" (bytes that a decoded token reads),
"memory" (of loading the packed model), "training", "search" and "evaluation" (seconds of the two that are
compared; None where they were not asked for), "targets" and "provenance". One that was stopped, or still
runs, is not "finished", and lacks what was to come.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qtale_lib.efficiency import GIB, GIGA
from qtale_lib.errors import UserError
from qtale_lib.provenance import ROOT
from qtale_lib.store import file_digest, read_json
from qtale_lib.tables import Table, number

if TYPE_CHECKING:
    from qtale_lib.lab import Lab

SCHEMA = 4
NOTEBOOK = "11"
ORDER = ("llama-3.1-8b", "tinyllama-1.1b", "tiny")  # which shape a notebook shows, if several are there
AIMED_AT = "tinyllama-1.1b"
HALF = 0.5
SKIPPING = ("open", "random", "layerwise")
MIB = 2**20
KEYS = ("phase", "size", "format", "variant", "ratio")
COLUMNS = ("plain", "open", "ideal", "fewer rows", "random", "layerwise")
CACHE = ("full", "expected", "filled", "allocated")
UNFINISHED = ".unfinished.json"  # in place of .json, until a benchmark is finished


class Times:
    """Medians of a result, found by what they are of; None where that was not measured."""

    def __init__(self, result: dict[str, Any]):
        self.rows = result["times"]

    def row(
        self, phase: str, size: int, form: str, variant: str, ratio: float | None = None
    ) -> dict[str, Any] | None:
        """A row of the result; of several ratios, that nearest to `ratio`, within a tenth."""
        key = (phase, size, form, variant)
        found = [r for r in self.rows if (r["phase"], r["size"], r["format"], r["variant"]) == key]
        if ratio is not None:
            found = [r for r in found if abs(r["ratio"] - ratio) <= 0.1]
            found.sort(key=lambda r: abs(r["ratio"] - ratio))
        return found[0] if found else None

    def quotient(self, over: tuple, under: tuple) -> float | None:
        """Time of one row by that of another."""
        rows = self.row(*over), self.row(*under)
        return rows[0]["seconds"] / rows[1]["seconds"] if all(rows) else None


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target: "target", "bound", "at" ("most" or "least"), "measured" (None: it was not) and "met".

    They are stated for the shape tinyllama-1.1b on two threads. What has no bound explains the others.
    """
    times = Times(result)
    rows = [
        _against(times, "decode", 1, "random", "ideal", 1.10),
        _against(times, "decode", 16, "layerwise", "ideal", 1.25),
        _against(times, "decode", 16, "random", "ideal", 1.25),
        _against(times, "decode", 16, "random", "fewer rows"),
        _against(times, "prefill", 512, "random", "ideal", 1.15),
        *(
            _open_gates(times, phase, size)
            for phase, size in (("decode", 1), ("decode", 16), ("prefill", 512))
        ),
        _target("KV bytes after prefill: off from R × full, worst case", 0.01, "most", kv_error(result)),
        *_of_four_bits(times),
        _router_share(times),
        _target("memory that loading 4 bits adds by the file's bytes", 1.15, "most", _loading(result)),
        _target("training step: routed by plain LoRA", 1.15, "most",
                _by(result["training"], "routed", "plain")),
        _target("AWQ search: ours by autoawq's", 1.0, "most", _by(result["search"], "native", "autoawq")),
        _target("scoring with learned routes: dense by skipping", 1.5, "least",
                _by(result["evaluation"], "dense", "skip")),
    ]  # fmt: skip
    return rows


def _target(name: str, bound: float | None, at: str, measured: float | None) -> dict[str, Any]:
    met = None
    if measured is not None and bound is not None:
        met = measured <= bound if at == "most" else measured >= bound
    return {"target": name, "bound": bound, "at": at, "measured": measured, "met": met}


def _by(times: dict[str, Any] | None, over: str, under: str) -> float | None:
    both = times and times[over] and times[under]
    return times[over]["seconds"] / times[under]["seconds"] if both else None


def _name(phase: str, size: int) -> str:
    return f"prefill {size}" if phase == "prefill" else f"decode, batch {size}"


def _against(
    times: Times, phase: str, size: int, routes: str, other: str, bound: float | None = None
) -> dict[str, Any]:
    cell = (phase, size, "bf16")
    measured = times.quotient((*cell, routes, HALF), (*cell, other, HALF))
    whose = " of each row's own" if routes == "random" and phase == "decode" and size > 1 else ""
    beside = "those removed" if other == "ideal" else "all layers on half the rows"
    name = f"{_name(phase, size)}: half the routed layers{whose} by {beside}"
    return _target(name, bound, "most", measured)


def _open_gates(times: Times, phase: str, size: int) -> dict[str, Any]:
    cell = (phase, size, "bf16")
    measured = times.quotient((*cell, "open"), (*cell, "plain"))
    return _target(f"{_name(phase, size)}: all gates open by the plain model", 1.08, "most", measured)


def _router_share(times: Times) -> dict[str, Any]:
    cell = ("decode", 1, "bf16")
    share = times.quotient((*cell, "routers"), (*cell, "random", HALF))
    return _target("decode, batch 1: the routers' share of a pass with half the layers", None, "most", share)


def _of_four_bits(times: Times) -> list[dict[str, Any]]:
    bf16, int4 = ("decode", 1, "bf16", "plain"), ("decode", 1, "int4")
    half = (*int4, "random", HALF)
    saved = times.quotient(bf16, half)
    return [
        _target("decode, batch 1: bf16 by int4, both plain", 2.4, "least",
                times.quotient(bf16, (*int4, "plain"))),
        _target("decode, batch 1, int4: half the routed layers by those removed", 1.20, "most",
                times.quotient(half, (*int4, "ideal", HALF))),
        _target("decode, batch 1: bf16 plain by int4 with half the routed layers", 3.4, "least", saved),
        _target("the same with lm_head in 4 bits too", 4.0, "least",
                times.quotient(bf16, ("decode", 1, "int4-head", "random", HALF))),
    ]  # fmt: skip


def kv_frame(result: dict[str, Any]) -> pd.DataFrame:
    """Caches of skipping execution: phase, size, format, variant, ratio, execution_ratio, and bytes.

    `full`: of the plain model; `expected`: R × full, R being over all layers; `filled`: keys and values of
    executed tokens; `allocated`: what is held for them.
    """
    times, rows = Times(result), []
    for row in result["times"]:
        cell = (row["phase"], row["size"], row["format"])
        if row["variant"] in SKIPPING and (plain := times.row(*cell, "plain")):
            names = ("phase", "size", "format", "variant", "ratio", "execution_ratio")
            full = plain["kv_bytes"]
            rows.append({**{name: row[name] for name in names}, "full": full,
                         "expected": row["execution_ratio"] * full, "filled": row["kv_filled"],
                         "allocated": row["kv_bytes"]})  # fmt: skip
    return pd.DataFrame(rows, columns=[*KEYS, "execution_ratio", *CACHE])


def kv_error(result: dict[str, Any]) -> float | None:
    """The greatest |allocated / (R × full) − 1| of prompts' caches, before decoding makes spare room."""
    frame = kv_frame(result)
    frame = frame[frame.phase == "prefill"] if len(frame) else frame
    return float((frame.allocated / frame.expected - 1).abs().max()) if len(frame) else None


def _loading(result: dict[str, Any]) -> float | None:
    memory = result["memory"]
    return memory["added"] / memory["file"] if memory and memory["added"] is not None else None


def latency_frame(result: dict[str, Any]) -> pd.DataFrame:
    """phase, size, format, variant, ratio, and milliseconds: ms, low, high (quartiles); rows as measured."""
    frame = pd.DataFrame(result["times"], columns=[*KEYS, "seconds", "low", "high", "count"])
    scaled = {"ms": 1000 * frame.seconds, "low": 1000 * frame.low, "high": 1000 * frame.high}
    return frame.assign(**scaled)[[*KEYS, "ms", "low", "high", "count"]]


def roofline_frame(result: dict[str, Any]) -> pd.DataFrame:
    """Decoding one row: format, variant, ratio, weights (bytes), floor (ms to copy as many) and ms."""
    times, rows = Times(result), []
    pace, layers = result["machine"]["copied_bytes_per_second"], result["shape"]["routed_layers"]
    for weights in result["weights"]:
        ratio = weights["kept"] / layers
        row = times.row("decode", 1, weights["format"], weights["variant"], ratio)
        if row:
            rows.append({"format": weights["format"], "variant": weights["variant"], "ratio": ratio,
                         "weights": weights["bytes"], "floor": 1000 * weights["bytes"] / pace,
                         "ms": 1000 * row["seconds"]})  # fmt: skip
    return pd.DataFrame(rows, columns=["format", "variant", "ratio", "weights", "floor", "ms"])


def memory_frame(result: dict[str, Any]) -> pd.DataFrame:
    """part, name, ratio, value: of caches, the allocated share of a full one; of loading 4 bits, MiB."""
    caches = kv_frame(result)
    rows = [("cache", r.phase, r.execution_ratio, r.allocated / r.full) for r in caches.itertuples()]
    memory = result["memory"]
    if memory and memory["added"] is not None:
        names = {"file": "the file", "added": "added at most"}
        rows += [("loading", label, None, memory[name] / MIB) for name, label in names.items()]
    return pd.DataFrame(rows, columns=["part", "name", "ratio", "value"])


def blocks(asked: dict[str, Any]) -> list[tuple[str, int]]:
    """(phase, size) of the passes that a benchmark's settings ask for, in the order of measuring."""
    phases = ("decode", "prefill") if "passes" in asked["parts"] else ()
    return [(phase, size) for phase in phases for size in asked[phase]]


def lacking(result: dict[str, Any]) -> list[str]:
    """What its settings ask for and the result does not hold, or not yet."""
    asked, measured = result["settings"], {(row["phase"], row["size"]) for row in result["times"]}
    passes = [_name(*block) for block in blocks(asked) if block not in measured]
    names = {"training": "the training step", "search": "the AWQ search", "evaluation": "scoring"}
    return passes + [name for part, name in names.items() if part in asked["parts"] and result[part] is None]


# Tables.


def _unfinished(result: dict[str, Any]) -> str:
    return f"stopped, or still running, when this was written; not measured: {'; '.join(lacking(result))}"


def setting_table(result: dict[str, Any]) -> Table:
    """The machine, the shape and the settings of a benchmark."""
    machine, shape, asked = result["machine"], result["shape"], result["settings"]
    rows = {
        "shape": f"{shape['name']}, {shape['config']['num_hidden_layers']} layers, "
        f"{shape['routed_layers']} of them routed; random weights",
        "processor": machine["cpu"],
        "GPU": machine["gpu"] or "none used",
        "threads": f"{machine['threads']} of {machine['cores']}",
        "memory": f"{machine['memory_bytes'] / GIB:.0f} GiB",
        "copying memory": f"{machine['copied_bytes_per_second'] / GIGA:.1f} GB/s, read and written",
        "torch": machine["torch"],
        "rounds": f"at most {asked['repeats']}",
        "decoding": f"after {asked['context']} tokens",
        "measured": f"{result['provenance']['finished_at']}, commit {result['provenance']['git_commit']}",
    }
    if not result["finished"]:
        rows = {"unfinished": _unfinished(result), **rows}
    text = pd.DataFrame(rows.items(), columns=["setting", "value"])
    return Table("bench_setting", "What was measured, and on what", text, text, ("setting",))


def target_table(result: dict[str, Any]) -> Table:
    """Each target with its measured ratio, met or missed."""
    frame = pd.DataFrame(result["targets"])
    text = pd.DataFrame({
        "target": frame.target, "bound": [_bound(row) for row in result["targets"]],
        "measured": frame.measured.map(lambda value: "–" if pd.isna(value) else number(value, 3)),
        "verdict": [_verdict(row) for row in result["targets"]],
    })  # fmt: skip
    notes = [
        "Times are medians of one run. Every decoded token executes exactly that share of the routed layers: "
        "the same for all rows of a batch or, where so said, drawn for each row. Then every layer has rows "
        "to compute and reads its weights: no such pass can be faster than all layers on half the rows.",
        "A training step is on one row.",
        *_search_notes(result["search"]),
        *_scoring_notes(result["evaluation"]),
    ]
    if memory := result["memory"]:
        notes.append(f"The file of the packed routed model has {memory['file'] / MIB:.1f} MiB.")
    if result["shape"]["name"] != AIMED_AT:
        notes.insert(0, f"The bounds are meant for {AIMED_AT} on two threads, not for this shape.")
    if not result["finished"]:
        notes.insert(0, f"Unfinished: {_unfinished(result)}.")
    return Table("bench_targets", "Targets", text, frame, ("target",), tuple(notes))


def _search_notes(search: dict[str, Any] | None) -> list[str]:
    """The size of the AWQ searches, and why one was left out."""
    if search is None:
        return []
    size = f"{search['layers']} of the shape's layers in float32, on {search['tokens']} calibration tokens"
    notes = [
        f"Either AWQ search is over {size}. autoawq's time grows with the tokens, and ours hardly: with more "
        "of them the ratio is smaller."
    ]
    left_out = search["left_out"].items()
    names = {"native": "Our AWQ search", "autoawq": "autoawq's search"}
    return notes + [f"{names[name]} was left out: {reason.rstrip('.')}." for name, reason in left_out]


def _scoring_notes(scoring: dict[str, Any] | None) -> list[str]:
    if scoring is None:
        return []
    if scoring["left_out"]:
        return [f"Scoring was left out: {scoring['left_out']}."]
    return [
        f"Scored: {scoring['questions']} questions by {scoring['run']}, as small as its profile's base is, "
        f"at R = {scoring['execution_ratio']:.2f}."
    ]


def _bound(row: dict[str, Any]) -> str:
    return "none" if row["bound"] is None else f"{'≤' if row['at'] == 'most' else '≥'} {row['bound']:g}"


def _verdict(row: dict[str, Any]) -> str:
    if row["measured"] is None:
        return "not measured here"
    return {True: "met", False: "missed", None: ""}[row["met"]]


def latency_table(result: dict[str, Any]) -> Table:
    """Milliseconds of a pass by variant and R, with quartiles; the routers' own time is the last column."""
    frame = latency_frame(result)
    rows = [
        {"pass": _name(phase, size), "format": form, "R": number(ratio, 2), **_cells(part, alone)}
        for (phase, size, form), cell in frame.groupby(["phase", "size", "format"], sort=False)
        for alone in [cell[cell.variant == "routers"]]
        for ratio, part in cell[cell.variant != "routers"].groupby("ratio")
    ]
    notes = (
        "Medians; in brackets the quartiles. plain: the model without routers; open: all gates open; ideal: "
        "layers removed; fewer rows: the plain model on that share of the batch; random: each token skips "
        "layers of its own; layerwise: whole layers are closed for all tokens but the first, the extreme to "
        "which D-LLM's trained routers tend.",
        "int4-head: lm_head is in 4 bits too, which the paper leaves in 16.",
    )
    text = pd.DataFrame(rows)
    return Table("bench_latency", "Milliseconds of a pass", text, frame, KEYS, notes)


def _cells(part: pd.DataFrame, routers: pd.DataFrame) -> dict[str, str]:
    by_variant = {row.variant: row for row in part.itertuples()}
    cells = {name: _spread(by_variant[name]) if name in by_variant else "" for name in COLUMNS}
    return {**cells, "routers alone": "".join(_spread(row) for row in routers.itertuples())}


def _spread(row: Any) -> str:
    return f"{row.ms:.4g} ({row.low:.4g}–{row.high:.4g})"


def kv_table(result: dict[str, Any]) -> Table:
    """Bytes of the cache by R × full."""
    frame = kv_frame(result)
    text = pd.DataFrame({
        "pass": [_name(row.phase, row.size) for row in frame.itertuples()],
        **{name: frame[name] for name in ("format", "variant")},
        "R of all layers": frame.execution_ratio.map("{:.3f}".format),
        "full, MiB": (frame.full / MIB).map("{:.3f}".format),
        "filled by R × full": (frame.filled / frame.expected).map("{:.3f}".format),
        "allocated by R × full": (frame.allocated / frame.expected).map("{:.3f}".format),
    })  # fmt: skip
    notes = (
        "Filled: keys and values of executed tokens. Allocated: with the spare slots that decoding adds now "
        "and then, and rows of a batch filled up to its longest.",
    )
    return Table("bench_cache", "Key-value cache", text, frame, KEYS, notes)


def roofline_table(result: dict[str, Any]) -> Table:
    """Decoding one row beside the time that moving its weights takes at the pace of a copy."""
    frame = roofline_frame(result)
    text = pd.DataFrame({
        **{name: frame[name] for name in ("format", "variant")}, "R": frame.ratio.map("{:.2f}".format),
        "weights read, MiB": (frame.weights / MIB).map("{:.4g}".format),
        "at a copy's pace, ms": frame.floor.map("{:.4g}".format),
        "measured, ms": frame.ms.map("{:.4g}".format),
        "share of the pace": (frame.floor / frame.ms).map("{:.2f}".format),
    })  # fmt: skip
    notes = ("A copy writes as much as it reads: reading alone may be faster, and a share exceed 1.",)
    return Table("bench_roofline", "Roofline of decoding one token", text, frame, KEYS[2:], notes)


def printed(result: dict[str, Any]) -> list[Table]:
    """The tables that a command shows: those that the result has rows for."""
    passes = [latency_table(result), roofline_table(result)] if result["times"] else []
    return [*passes, target_table(result)]


# Where a profile's benchmarks lie.


def folder(lab: Lab) -> Path:
    """A JSON for each shape that was benchmarked for a profile."""
    return lab.directory / "bench"


def unfinished(path: Path) -> Path:
    """Where a benchmark is kept until it is finished; an earlier one at `path` stays there till then."""
    return path.with_name(path.stem + UNFINISHED)


def stored(lab: Lab) -> dict[str, Any] | None:
    """The benchmark of the largest shape there is, unfinished if it was never finished; None without one.

    An unfinished one of the smallest shape counts for nothing: it is made anew in seconds.
    """
    paths = [folder(lab) / f"{shape}.json" for shape in ORDER]
    paths = [place for path in paths for place in (path, unfinished(path))][:-1]
    found = (read_json(path) for path in paths)
    return next((r for r in found if isinstance(r, dict) and r.get("schema") == SCHEMA), None)


def fingerprint(lab: Lab) -> str:
    """Changes when a benchmark is added, measured again or removed."""
    return file_digest(*folder(lab).glob("*.json"))


def of_profile(lab: Lab, run: Callable[..., Any] = subprocess.run) -> dict[str, Any]:
    """The profile's benchmark; if there is none, a short one of the shape `tiny` is made first.

    In a process of its own, which has torch's own choice of threads, and no notebook's.

    Raises:
        UserError: if that fails.
    """
    found = stored(lab)
    if found is None:
        target = folder(lab) / "tiny.json"
        command = [
            sys.executable,
            "-m",
            "qtale_lib",
            "bench",
            "--shape",
            "tiny",
            "--parts",
            "passes,training",
            "--out",
            str(target),
        ]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        found = stored(lab)
        if done.returncode or found is None:
            last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise UserError(f"The benchmark of the shape tiny failed: {last}")
    return found
