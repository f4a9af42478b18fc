"""A benchmark's result whose times follow a formula, for reports and figures."""

from __future__ import annotations

from typing import Any

from qtale_lib.benchmark_report import SCHEMA, targets

ALWAYS_RUN, ROUTED = 2, 8
PASS = {"bf16": 100.0, "int4": 40.0, "int4-head": 30.0}  # milliseconds of the plain model's pass
SLOWER = {"plain": 1.0, "ideal": 1.0, "fewer rows": 0.9, "open": 1.05, "random": 1.08, "layerwise": 1.04}
FULL = 1000  # bytes of a full cache, by row or token


def made_up(prefill=(512,), decode=(1, 16), shape: str = "tinyllama-1.1b", **changes: Any) -> dict[str, Any]:
    """A whole result; `changes` replace its parts."""
    cells = [*(("decode", size) for size in decode), *(("prefill", size) for size in prefill)]
    result = {
        "schema": SCHEMA,
        "settings": {
            "parts": ["passes", "training", "search", "evaluation"],
            "prefill": list(prefill), "decode": list(decode),
            "repeats": 3, "context": 32,
        },
        "shape": {"name": shape, "routed_layers": ROUTED, "config": {"num_hidden_layers": 10}},
        "machine": {
            "cpu": "a processor", "gpu": None, "cores": 2, "threads": 2, "memory_bytes": 2**34,
            "torch": "2", "copied_bytes_per_second": 1e10,
        },
        "times": [row for cell in cells for form in PASS for row in rows(*cell, form)],
        "weights": [
            {"format": form, "variant": variant, "kept": kept, "bytes": 10**8 * (ALWAYS_RUN + kept)}
            for form in PASS
            for variant, kept in (("plain", 8), ("open", 8), ("ideal", 4), ("random", 4))
        ],
        "memory": {"file": 10**9, "added": 1.1e9, "group": 128},
        "training": {"plain": {"seconds": 1.0}, "routed": {"seconds": 1.1}, "tokens": 128},
        "search": {
            "native": {"seconds": 0.5}, "autoawq": {"seconds": 1.0},
            "layers": 1, "tokens": 64, "left_out": {},
        },
        "evaluation": {
            "dense": {"seconds": 3.2}, "skip": {"seconds": 2.0}, "run": "arc_easy.dllm.s0", "questions": 200,
            "execution_ratio": 0.5, "left_out": None,
        },
        "provenance": {"finished_at": "2026-01-01T00:00:00+00:00", "git_commit": "0" * 40},
        "finished": True,
        **changes,
    }  # fmt: skip
    return {**result, "targets": targets(result)}


def stopped(decode=(1,), shape: str = "tinyllama-1.1b", **changes: Any) -> dict[str, Any]:
    """A result of whose blocks only those of `decode` were measured before it was stopped."""
    asked, missing = made_up()["settings"], dict.fromkeys(("training", "search", "evaluation"))
    return made_up((), decode, shape, settings=asked, **missing, finished=False, **changes)


def rows(phase: str, size: int, form: str) -> list[dict[str, Any]]:
    """The rows of one cell: a pass costs as many layers as it runs, and a little more with routes."""
    found = [row(phase, size, form, "plain", ROUTED), row(phase, size, form, "open", ROUTED)]
    for kept in (2, 4, 6):
        kinds = ["ideal", "random", "layerwise", *(["fewer rows"] if phase == "decode" and size > 1 else [])]
        found += [row(phase, size, form, variant, kept) for variant in kinds]
    routers = {"kept": None, "ratio": None, "execution_ratio": None, "kv_bytes": None, "kv_filled": None}
    return [*found, {**row(phase, size, form, "routers", 0), **routers}]


def row(phase: str, size: int, form: str, variant: str, kept: int) -> dict[str, Any]:
    share = (ALWAYS_RUN + kept) / (ALWAYS_RUN + ROUTED)
    seconds = PASS[form] / 1000 * size * share * SLOWER.get(variant, 0.1)
    held = round(FULL * size * share)
    return {
        "phase": phase, "size": size, "format": form, "variant": variant, "kept": kept,
        "ratio": kept / ROUTED, "seconds": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, "count": 3,
        "execution_ratio": share, "kv_bytes": held, "kv_filled": held,
    }  # fmt: skip
