"""Figures of the studies (notebooks 08 to 10), drawn from tidy frames as figures.py draws the paper's."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qtale_lib.execution_ratio import ALL, CURVES
from qtale_lib.figures import (
    BLACK,
    BLUE,
    COLUMN,
    CROSS,
    DOT,
    GREEN,
    ORANGE,
    PAGE,
    RED,
    SKY,
    SQUARE,
    canvas,
    empty,
)
from qtale_lib.paper import METHODS, TASK_LABELS
from qtale_lib.quantizers import FEWER, LAYERS, QUANTIZER
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


ARMS = (  # by their place among the quantizers of a study
    {"color": BLACK, "linestyle": "-", **DOT},
    {"color": RED, "linestyle": "--", **CROSS, "markersize": 4.2},
    {"color": BLUE, "linestyle": "-.", **SQUARE, "markersize": 3.6},
    {"color": GREEN, "linestyle": ":", **DOT},
    {"color": ORANGE, "linestyle": "none", **SQUARE},
    {"color": SKY, "linestyle": "-", **CROSS},
)


def compression(frame: pd.DataFrame) -> Figure:
    """Accuracy by bits, a panel per method and a line per quantizer; and by R, of routed methods and of Full
    with fewer layers, all in 16 bits.

    `frame`: quantizers.frame.
    """
    if frame.empty:
        return empty("not computed")
    methods = list(dict.fromkeys(frame.method))
    quantized = frame[(frame.kind == QUANTIZER) & (frame.bits < 16)]
    arms, whole = list(dict.fromkeys(quantized.arm)), frame[(frame.kind == QUANTIZER) & (frame.bits == 16)]
    columns = len(methods) + 1
    figure, axes = canvas(PAGE, 2.3, 1, columns, sharey=True)
    for axis, method in zip(axes[0], methods, strict=False):
        for arm, look in zip(arms, _looks(len(arms)), strict=True):
            part = quantized[(quantized.arm == arm) & (quantized.method == method)]
            _bars(axis, part.assign(x=part.bits), look, arm)
        usual = whole[whole.method == method]
        axis.axhline(usual.accuracy.iloc[0] if len(usual) else float("nan"), color="0.6", linewidth=0.6)
        axis.set(title=METHODS[method], xlabel="bits", xticks=sorted(set(quantized.bits)))
        axis.margins(x=0.15)
    _by_ratio(axes[0, -1], frame, whole)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, 0].plot([], [], color="0.6", linewidth=0.6, label="16 bits")
    axes[0, 0].errorbar([], [], yerr=[], color="0.5", linewidth=0.6, label=BARS)
    (left, right) = (axis.get_legend_handles_labels() for axis in axes[0, [0, -1]])
    figure.legend(left[0] + right[0], left[1] + right[1], loc="outside upper center", ncols=4)
    return figure


def _looks(count: int) -> list[dict]:
    return [ARMS[place % len(ARMS)] for place in range(count)]


def _by_ratio(axis: Axes, frame: pd.DataFrame, whole: pd.DataFrame) -> None:
    """Full with fewer layers along each family, and every method as it is."""
    for (family, words), look in zip(FEWER.items(), ARMS, strict=False):
        own = frame[(frame.kind == LAYERS) & frame.arm.str.startswith(family)]
        full = whole[whole.method == "full"] if len(own) else own
        part = pd.concat([own, full]).sort_values("R")
        _bars(
            axis, part.assign(x=100 * part.R), {**look, "color": "0.45", "linewidth": 0.8}, f"Full, {words}"
        )
    for method, own in whole[whole.method.isin(LOOKS)].groupby("method", sort=False):
        _bars(axis, own.assign(x=100 * own.R), LOOKS[method], f"{METHODS[method]}, 16 bits")
    axis.set(title="equal R", xlabel="executed layers (%)")
    axis.margins(x=0.2)


def _bars(axis: Axes, part: pd.DataFrame, look: dict, label: str) -> None:
    if part.empty:
        return
    part = part.sort_values("x")
    axis.plot(part.x, part.accuracy, label=label, **{"linewidth": 0.8, **look})
    errors = [part.accuracy - part.low, part.high - part.accuracy]
    axis.errorbar(part.x, part.accuracy, yerr=errors, fmt="none", color=look["color"], linewidth=0.5)


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
    below = sorted({bits for bits in part.bits if bits < 16}, reverse=True)
    lines = {16: "-", **dict(zip(below, (":", "--", "-."), strict=False))}
    cells = list(part[["method", "bits"]].drop_duplicates().itertuples(index=False))
    for place, (method, bits) in enumerate(cells):
        own = part[(part.method == method) & (part.bits == bits)]
        x = own.value.map(values.index) + 0.12 * (place - (len(cells) - 1) / 2)
        look = {**LOOKS[method], "linestyle": lines.get(bits, ":"), "linewidth": 0.8}
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
