"""Figures of a benchmark, in the style of figures.py: latency by execution ratio, and memory."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qtale_lib.figures import BLACK, BLUE, COLUMN, CROSS, DOT, ORANGE, PAGE, RED, SQUARE, canvas, empty

COLOURS = {"bf16": BLUE, "int4": RED, "int4-head": ORANGE}
# The lines end at R = 1: the ideal in the plain model, the others in the one whose gates are all open.
LINES = {
    "random": ("open", "random routes", {"linestyle": "-", **DOT}),
    "layerwise": ("open", "whole layers closed", {"linestyle": ":", **CROSS}),
    "ideal": ("plain", "ideal: layers removed", {"linestyle": "--", **SQUARE}),
}
ROUTERS = {"color": "0.5", "linewidth": 0.8}
CACHES = {"prefill": ("after a prompt", DOT), "decode": ("while decoding", SQUARE)}


def latency(frame: pd.DataFrame) -> Figure:
    """Milliseconds of a pass by R, one panel per pass: decoding above, prefill below; bands are quartiles.

    `frame`: phase, size, format, variant, ratio, ms, low, high (benchmark_report.latency_frame).
    """
    if frame.empty:
        return empty()
    cells = {phase: sorted(part["size"].unique()) for phase, part in frame.groupby("phase")}
    columns = max(map(len, cells.values()))
    figure, axes = canvas(PAGE, 0.7 + 1.75 * len(cells), len(cells), columns)
    for row, (phase, sizes) in zip(axes, cells.items(), strict=True):
        for axis in row[len(sizes) :]:
            axis.axis("off")
        for axis, size in zip(row, sizes, strict=False):
            _pass(axis, frame[(frame.phase == phase) & (frame["size"] == size)])
            axis.set_title(f"decoding, batch {size}" if phase == "decode" else f"prompt of {size} tokens")
        row[0].set_ylabel("milliseconds")
    for axis in axes[-1]:
        axis.set_xlabel("R, share of the routed layers")
    figure.legend(handles=_legend(frame), loc="outside upper center", ncols=3)
    return figure


def _pass(axis: Axes, frame: pd.DataFrame) -> None:
    for form, part in frame.groupby("format", sort=False):
        for variant, (end, _, style) in LINES.items():
            line = part[part.variant.isin((variant, end))].sort_values("ratio")
            axis.plot(line.ratio, line.ms, color=COLOURS[form], **style)
            axis.fill_between(line.ratio, line.low, line.high, color=COLOURS[form], alpha=0.15, linewidth=0)
    for row in frame[frame.variant == "routers"].head(1).itertuples():  # float32 in every format
        axis.axhline(row.ms, **ROUTERS)
    axis.set(xlim=(0, 1.04), xticks=(0, 0.25, 0.5, 0.75, 1))
    axis.set_ylim(bottom=0)


def _legend(frame: pd.DataFrame) -> list[Line2D]:
    formats = [
        Line2D([], [], color=COLOURS[form], label=form, linewidth=2.5) for form in frame["format"].unique()
    ]
    lines = [Line2D([], [], color=BLACK, label=label, **style) for _, label, style in LINES.values()]
    return [*formats, Line2D([], [], label="routers alone", **ROUTERS), *lines]


def memory(frame: pd.DataFrame) -> Figure:
    """(a) Bytes of the cache by the execution ratio R of all layers; (b) loading the packed model.

    `frame`: part ("cache" or "loading"), name (of a phase; "file" or "added"), ratio, and value: the cache's
    share of a full one, or MiB (benchmark_report.memory_frame).
    """
    if frame.empty:
        return empty()
    figure, axes = canvas(COLUMN, 3.4, 2, 1, height_ratios=(3, 1))
    cache, loading = axes[:, 0]
    cache.plot([0, 1], [0, 100], color="0.5", linewidth=0.8, label="R × full")
    for phase, (label, style) in CACHES.items():
        part = frame[(frame.part == "cache") & (frame.name == phase)]
        if part.empty:  # a line without points would upset the layout
            continue
        cache.plot(part.ratio, 100 * part.value, color=BLUE, linestyle="none", label=label, **style)
    cache.set(xlabel="R, share of all (token, layer) pairs", ylabel="bytes of a full cache (%)")
    cache.set(title="(a) key-value cache", xlim=(0, 1), ylim=(0, None))
    cache.legend(loc="lower right")
    _loading(loading, frame[frame.part == "loading"])
    return figure


def _loading(axis: Axes, frame: pd.DataFrame) -> None:
    axis.set_title("(b) loading the model of 4 bits")
    if frame.empty:
        axis.axis("off")
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", style="italic")
        return
    axis.barh(frame.name, frame.value, color=BLUE, height=0.55)
    axis.invert_yaxis()
    axis.set_xlabel("MiB")
