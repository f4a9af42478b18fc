"""Figures of the studies (notebooks 08 and 10), drawn from tidy frames as figures.py draws the paper's."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtale_lib.execution_ratio import ALL, CURVES
from qtale_lib.figures import BLACK, BLUE, COLUMN, CROSS, DOT, PAGE, RED, SQUARE, canvas, empty
from qtale_lib.paper import METHODS, TASK_LABELS
from qtale_lib.sensitivity import label

LOOKS = {
    "qtale": {"color": BLUE, "linestyle": "--", **SQUARE, "markersize": 3.6},
    "dllm": {"color": RED, "linestyle": "-", **DOT},
    "targets": {"color": BLACK, "linestyle": ":", **CROSS, "markersize": 4.2},
}
RING = {"color": "0.5", "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 0.6}
BARS = "bars: 95 % intervals over seeds and questions"


def pareto(frame: pd.DataFrame) -> Figure:
    """Accuracy by FLOPs: a row per bit width, a column per task (beside the mean over all, if several).

    `frame`: execution_ratio.frame; the points of a panel's Pareto front are ringed.
    """
    if frame.empty:
        return empty("not computed")
    tasks = [task for task in dict.fromkeys(frame.task) if task != ALL]
    tasks += [ALL] if len(tasks) > 1 else []
    widths = list(dict.fromkeys(frame.bits))
    figure, axes = canvas(PAGE, 0.7 + 1.35 * len(widths), len(widths), len(tasks), sharex=True)
    for row, bits in zip(axes, widths, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            _panel(axis, frame[(frame.bits == bits) & (frame.task == task)])
        row[0].set_ylabel(f"{bits} bits\naccuracy (%)")
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title("mean" if task == ALL else TASK_LABELS[task])
    figure.supxlabel("FLOPs of layers and routers (% of Full's layers)", fontsize=7.5)
    axis.plot(
        [], [], color="0.5", linestyle="none", marker="o", markersize=7, mfc="none", label="Pareto front"
    )
    axis.errorbar([], [], yerr=[], color="0.5", linewidth=0.6, label=BARS)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _panel(axis: Axes, frame: pd.DataFrame) -> None:
    for curve, look in LOOKS.items():
        part = frame[frame.curve == curve].sort_values("flops")
        if part.empty:
            continue
        x, below, above = 100 * part.flops, part.accuracy - part.low, part.high - part.accuracy
        axis.plot(x, part.accuracy, linewidth=0.8, label=CURVES[curve], **{**look, "clip_on": True})
        axis.errorbar(x, part.accuracy, yerr=[below, above], fmt="none", color=look["color"], linewidth=0.5)
    best = frame[frame.on_front]
    axis.plot(
        100 * best.flops, best.accuracy, "o", color="0.5", markersize=7, mfc="none", markeredgewidth=0.6
    )


# Sensitivity.


def factor(part: pd.DataFrame) -> Figure:
    """What one setting does: points of accuracy against its default, left, and R, right, by value.

    `part`: a factor's rows of sensitivity.effects. Filled marks are 16 bits, open ones fewer; the default is
    marked below.
    """
    if part.empty:
        return empty("not computed")
    part = part.assign(value=[f"{v:g}" if isinstance(v, float) else str(v) for v in part.value])
    values = list(dict.fromkeys(part.value))
    figure, axes = canvas(PAGE, 1.9, 1, 2)
    gains, ratios = axes[0]
    cells = list(part[["method", "bits"]].drop_duplicates().itertuples(index=False))
    for place, (method, bits) in enumerate(cells):
        own = part[(part.method == method) & (part.bits == bits)]
        x = own.value.map(values.index) + 0.12 * (place - (len(cells) - 1) / 2)
        look = {**LOOKS[method], "linestyle": "-" if bits == 16 else ":", "linewidth": 0.8}
        look |= {"markerfacecolor": look["color"] if bits == 16 else "none"}
        errors = [own.effect - own.low, own.high - own.effect]
        gains.errorbar(
            x, own.effect, yerr=errors, label=f"{METHODS[method]}, {bits} bits", **look, elinewidth=0.6
        )
        ratios.plot(x, 100 * own.R, **look)
    default = part[part.default].value.iloc[0]
    ticks = [f"{value}\n(default)" if value == default else value for value in values]
    for axis in (gains, ratios):
        axis.set(
            xticks=range(len(values)),
            xticklabels=ticks,
            xlabel=label(part.factor.iloc[0]),
            xlim=(-0.5, len(values) - 0.5),
        )
    gains.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    gains.set_ylabel("gain on the default (points)")
    ratios.set_ylabel("execution ratio (%)")
    figure.legend(*gains.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def aims(frame: pd.DataFrame) -> Figure:
    """Accuracy by R, a mark a rule for θ; a line leads from the R that a rule aims at, below, to its mark.

    `frame`: theta_aims.frame, of which the fewest bits are drawn.
    """
    if frame.empty:
        return empty("not computed")
    figure, axes = canvas(COLUMN, 3.0)
    axis, part = axes[0, 0], frame[frame.bits == frame.bits.min()]
    markers = dict(zip(dict.fromkeys(part.rule), "o^sDvx*", strict=False))
    for row in part.itertuples():
        colour = LOOKS[row.method]["color"]
        bars = [[row.accuracy - row.low], [row.high - row.accuracy]]
        axis.errorbar(100 * row.R, row.accuracy, yerr=bars, color=colour, elinewidth=0.6,
                      marker=markers[row.rule], markersize=4.5, markerfacecolor="none")  # fmt: skip
        if pd.notna(row.aimed):
            axis.plot(
                [100 * row.aimed, 100 * row.R], [row.low, row.accuracy], ":", color=colour, linewidth=0.6
            )
    for rule, marker in markers.items():
        axis.plot([], [], marker, color="0.3", markerfacecolor="none", markersize=4.5, label=rule)
    for method in dict.fromkeys(part.method):
        axis.plot([], [], color=LOOKS[method]["color"], label=METHODS[method])
    axis.set(xlabel="execution ratio (%)", ylabel=f"accuracy, {part.bits.min()} bits (%)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
