"""The numbers behind Figures 2 to 7, as tables: lowest layers, logit gaps, flips, and the noise itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import effects, noise, paper
from qtale_lib.measurements import ROUTED_METHODS, SPREAD, Measurements, shown_epochs
from qtale_lib.statistics import estimate
from qtale_lib.tables import Table, number, of_numbers

ALWAYS_RUN = (
    "Ratio: over all tokens. Of tokens routed: without the first tokens of a sequence, which always run and "
    "alone lift the ratio of short prompts."
)
LOWEST = ("ratio", "of_tokens_routed", "mean_ratio")  # of the lowest layers, twice, and of all
SPREAD_NOTE = "Means over seeds; spread: standard deviation over seeds, unknown with one."


def noise_table() -> Table:
    """Figure 4's numbers beside their closed forms."""
    return of_numbers(
        "figure_4_numbers", "Draws beside closed forms", noise.summary(), ("quantity",), digits=4
    )


def lowest_table(store: Measurements) -> Table:
    """Per task and method: the three lowest layers and their final ratio (means over seeds)."""
    frame = store.layers
    rows = [
        _lowest_row(store, task, method)
        for method in ROUTED_METHODS
        for task in dict.fromkeys(store.ratios_by_layer(method).task)
    ]
    columns = ["task", "method", "lowest_layers", *LOWEST, *(f"{name}_spread" for name in LOWEST)]
    table = pd.DataFrame(rows, columns=columns) if len(frame) else pd.DataFrame(columns=columns)
    notes = (
        ALWAYS_RUN,
        SPREAD_NOTE,
        "The paper: layers 20, 23 and 26 of LLaMA3.1-8B receive less than 5 % (Sec. 3.1).",
    )
    return _labelled(
        of_numbers("figure_2_numbers", "Lowest layers, last epoch", table, ("task", "method"), notes)
    )


LOWEST = (
    "ratio",
    "of_tokens_routed",
    "mean_ratio",
)  # of the lowest layers, of the tokens routed, of all layers


UNEVENNESS = {
    "standard deviation (points)": effects.deviation,
    "Gini coefficient": effects.gini,
    "normalised entropy": effects.evenness,
}
COMPARED = {"D-LLM": {"dllm": 1.0}, "QTALE": {"qtale": 1.0}, "QTALE − D-LLM": {"qtale": 1.0, "dllm": -1.0}}


def unevenness_table(store: Measurements) -> Table:
    """How unevenly the routed layers take part at the last epoch: per method and their difference, with the
    95 % interval over the commonsense tasks' fine-tunings.
    """
    rows = [
        {"measure": measure, "method": name, **_estimated(store, function, weights)}
        for measure, function in UNEVENNESS.items()
        for name, weights in COMPARED.items()
    ]
    frame = pd.DataFrame(rows)
    text = pd.DataFrame({
        "measure": frame.measure, "method": frame.method,
        "value [95 %]": [_with_interval(row) for row in frame.itertuples()],
        "tasks": frame.tasks, "seeds": frame.seeds,
    }).astype(str)  # fmt: skip
    notes = (
        "Over the layers' shares of the tokens that their routers decide on; layers that always run are left "
        "out. Gini: 0 if all layers run alike, near 1 if one runs alone. Normalised entropy: of the layers' "
        "shares of all execution, 1 if all run alike.",
        "Interval: over seeds or, with one, over tasks (at least 3).",
    )
    caption = "Unevenness of the layers, last epoch"
    return Table("figure_2_unevenness", caption, text, frame, ("measure", "method"), notes)


def _estimated(
    store: Measurements, measure: Callable[[np.ndarray], float], weights: dict[str, float]
) -> dict[str, Any]:
    found = estimate(effects.probe_runs(store, effects.over_layers(measure, weights), tuple(weights)))
    columns = ("effect", "low", "high", "tasks", "seeds")
    return {name: getattr(found, name, np.nan if name in columns[:3] else 0) for name in columns}


def _with_interval(row: Any) -> str:
    if np.isnan(row.low):
        return number(row.effect, 3)
    return f"{number(row.effect, 3)} [{number(row.low, 3)}, {number(row.high, 3)}]"


def _lowest_row(store: Measurements, task: str, method: str) -> tuple:
    layers = store.lowest_layers(task, method)
    frame = store.layers[(store.layers.task == task) & (store.layers.method == method)]
    final = frame[frame.epoch == frame.epoch.max()]
    low = final[final.layer.isin(layers)].groupby("seed")
    seeds = pd.DataFrame(
        zip(low.ratio.mean(), low.routed_ratio.mean(), final.groupby("seed").ratio.mean(), strict=True)
    )
    return task, method, ", ".join(map(str, layers)), *seeds.mean(), *seeds.std()


def gaps_table(store: Measurements) -> Table:
    """Mean logit gap and mean |gap| of Figures 5 and 6, per method, layer and epoch shown."""
    parts = [store.histograms(method).assign(method=method) for method in ROUTED_METHODS]
    keys = ["method", "layer", "epoch"]
    frame = pd.concat(parts).drop_duplicates(keys)[[*keys, "gap", "abs_gap", "gap_spread", "abs_gap_spread"]]
    notes = (
        "Gap: execute − bypass logit, mean over tokens; the layers are D-LLM's three lowest.",
        SPREAD_NOTE,
    )
    return _labelled(of_numbers("figures_5_6_numbers", "Logit gaps", frame, tuple(keys), notes))


def flips_table(store: Measurements) -> Table:
    """Flip shares of Figures 3 and 7 beside the closed form, per method, layer and epoch shown."""
    frame = store.lowest_by_epoch(*ROUTED_METHODS)
    frame = frame[frame.epoch.isin(shown_epochs(frame.epoch))]
    frame = frame.assign(difference=frame.flip - frame.flip_expected)
    keys = ("method", "layer", "epoch")
    numbers = ("ratio", "routed_ratio", "flip", "flip_expected", "difference")
    chosen = frame[[*keys, *numbers, *(f"{name}_spread" for name in SPREAD)]]
    notes = (
        ALWAYS_RUN,
        "Closed form: mean σ(−|Δ|) over the same tokens; the layers are D-LLM's three lowest.",
        SPREAD_NOTE,
    )
    return _labelled(
        of_numbers("figures_3_7_numbers", "Flips by Gumbel noise", chosen, keys, notes, digits=3)
    )


def _labelled(table: Table) -> Table:
    labels = {"task": paper.TASK_LABELS, "method": paper.METHODS}
    for column in table.text.columns.intersection(list(labels)):
        table.text[column] = table.frame[column].map(labels[column])
    return table
