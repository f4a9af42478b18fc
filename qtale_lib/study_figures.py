"""Figures of the studies (notebooks 08 and 10), drawn from tidy frames as figures.py draws the paper's."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtale_lib.execution_ratio import ALL, CURVES
from qtale_lib.figures import BLACK, BLUE, CROSS, DOT, PAGE, RED, SQUARE, canvas, empty
from qtale_lib.paper import TASK_LABELS

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
