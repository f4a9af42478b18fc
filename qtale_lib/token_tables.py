"""Which tokens skip, and what always running is worth, as tables and the frame of a figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import jobs, paper
from qtale_lib.measurements import Measurements
from qtale_lib.tables import Table, number

BINS = ("below 0.01", "0.01–0.1", "0.1–1", "1–3", "above 3")  # nats; the edges are token_routes.SURPRISAL


def held_of_seeds(store: Measurements) -> dict[tuple[str, int], dict[str, Any]]:
    """By method and seed, what was read off its run (see token_routes)."""
    found = {
        (job.run.method, job.run.seed): store.lab.find(
            "token_routes",
            task=job.run.task,
            method=job.run.method,
            seed=job.run.seed,
            bits=job.bits,
            theta=rule,
        )
        for job in jobs.token_jobs(store.profile)
        for rule in jobs.extra_rules(job)
    }
    return {run: result["value"] for run, result in found.items() if result}


def held(store: Measurements) -> dict[str, dict[str, Any]]:
    """By method, what was read off its run of the first seed."""
    first = store.profile.seeds[0]
    return {method: value for (method, seed), value in held_of_seeds(store).items() if seed == first}


def frame(store: Measurements) -> pd.DataFrame:
    """Tidy: method, by (kind, place, surprisal), name, tokens, layer, ratio."""
    rows = [
        {"method": method, "by": group["by"], "name": group["name"], "tokens": group["tokens"],
         "layer": layer, "ratio": ratio}
        for method, value in held(store).items()
        for group in value["groups"]
        for layer, ratio in enumerate(group["executed"])
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "by", "name", "tokens", "layer", "ratio"])


def skipping_table(store: Measurements, routes: pd.DataFrame) -> Table:
    """Mean executed share of the routed layers by kind of token and by surprisal, per method."""
    routed = routes[(routes.layer >= store.profile.routing.always_run_layers) & (routes.by != "place")]
    keys = ["by", "name", "method"]
    means = (
        routed.groupby(keys, sort=False)
        .agg(tokens=("tokens", "first"), ratio=("ratio", "mean"))
        .reset_index()
    )
    wide = means.pivot(index=["by", "name"], columns="method", values="ratio").reset_index()
    counts = means.groupby(["by", "name"]).tokens.first()
    text = pd.DataFrame({
        "by": wide.by,
        "tokens that are": [_named(*key) for key in zip(wide.by, wide.name, strict=True)],
        "number": [str(counts[key]) for key in zip(wide.by, wide.name, strict=True)] if len(wide) else [],
        **{paper.METHODS[m]: [number(100 * value, 1) for value in wide[m]] for m in wide.columns[2:]},
    })  # fmt: skip
    notes = (
        "Percent of the routed layers that a token executes, mean over tokens and layers; the first run of a "
        "method, on instructions with their responses, 16 bits, θ 0.5. Tokens that always run are left out.",
        "Name: capitalised within a sentence. Function words are a fixed list; in a response, what is left "
        "under word is mostly the answer. Surprisal: −log p of the token itself, in nats.",
    )
    return Table("table_12_skipping", "Which tokens skip", text, means, tuple(keys), notes)


def _named(by: str, name: str) -> str:
    return f"{BINS[int(name)]} nats" if by == "surprisal" else name


def worth_table(store: Measurements) -> Table:
    """What the tokens that always run, and each layer, are worth: PPL of the responses without them."""
    rows = []
    for method, value in held(store).items():
        rows += [
            {"method": method, "what": f"first {each['tokens']} tokens always run", "ppl": each["ppl"],
             "execution_ratio": each["execution_ratio"]}
            for each in value["reserved"]
        ]  # fmt: skip
        rows += [
            {"method": method, "what": f"layer {each['layer']} bypassed by all", "ppl": each["ppl"],
             "execution_ratio": np.nan}
            for each in value["bypassed"]
        ]  # fmt: skip
    means = pd.DataFrame(rows, columns=["method", "what", "ppl", "execution_ratio"])
    text = pd.DataFrame({
        "what": list(dict.fromkeys(means.what)),
        **{f"{paper.METHODS[method]}, PPL (R)": [_ppl(row) for row in part.itertuples()]
           for method, part in means.groupby("method", sort=False)},
    })  # fmt: skip
    always, first = store.profile.routing.always_run_layers, store.profile.routing.always_run_tokens
    notes = (
        f"In evaluation alone: the runs were trained with the first {first} tokens and the first {always} "
        "layers always run, so this says what a trained model leans on, not what it could learn without.",
    )
    return Table("table_12_always_run", "What always runs, varied", text, means, ("method", "what"), notes)


def _ppl(row: Any) -> str:
    ratio = "" if np.isnan(row.execution_ratio) else f" ({number(row.execution_ratio)})"
    return f"{number(row.ppl, 3)}{ratio}"
