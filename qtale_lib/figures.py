"""Figures 1-7, drawn from tidy frames alone: the CSV written beside a figure is the frame it was drawn from.

One style for a paper's column; colours of Okabe and Ito, with markers, dashes or hatches beside the colour so
that grey prints read as well; fonts embedded; the same frame gives the same bytes.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from qtale_lib.paper import GROUPS, METHODS, TASK_LABELS

COLUMN, PAGE = 3.25, 6.75  # inches
FORMATS = ("pdf", "png", "svg")
BLACK, ORANGE, SKY, GREEN, BLUE, RED = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
LINES = {
    "dllm": {"color": RED, "linestyle": "-", "marker": "o"},
    "qtale": {"color": BLUE, "linestyle": "--", "marker": "s"},
}
RANKED = (
    {"color": BLACK, "linestyle": "-", "marker": "o"},
    {"color": RED, "linestyle": "--", "marker": "s"},
    {"color": BLUE, "linestyle": ":", "marker": "^"},
)
LOGITS = {
    "execute": {"color": BLUE, "alpha": 0.75},
    "bypass": {"facecolor": "none", "edgecolor": RED, "hatch": "/////"},
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "hatch.linewidth": 0.5,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "qtale",
}
UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
NOT_RUN = "not run in this profile"


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of that size in inches in the suite's style, and its axes as an array [rows, columns]."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, data: pd.DataFrame, name: str, directory: Path) -> dict[str, Path]:
    """Write `name` as PDF, PNG and SVG, and the plotted data as CSV; returns the path of every format."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {suffix: directory / f"{name}.{suffix}" for suffix in (*FORMATS, "csv")}
    with matplotlib.rc_context(STYLE):
        for suffix in FORMATS:
            figure.savefig(paths[suffix], metadata=UNDATED[suffix])
    data.to_csv(paths["csv"], index=False, lineterminator="\n")
    return paths


def empty(message: str = NOT_RUN) -> Figure:
    """A figure that says why there is none."""
    figure, axes = canvas(COLUMN, 0.6)
    axes[0, 0].axis("off")
    axes[0, 0].text(0.5, 0.5, message, ha="center", va="center", style="italic")
    return figure


# Figure 1.


def overview(frame: pd.DataFrame) -> Figure:
    """Fig. 1: one panel per technique, one box per layer.

    `frame`: panel, title, note, layer, fill (memory, 1 = 16 bit), executed (share of tokens); a panel without
    data has one row with layer NaN. A box is filled up to its memory; the fill fades, and the outline turns
    dashed and grey, as fewer tokens execute the layer.
    """
    panels = list(dict.fromkeys(frame.panel))
    figure, axes = canvas(PAGE, 3.4, 1, len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        _stack(axis, frame[frame.panel == panel])
    return figure


def _stack(axis: Axes, frame: pd.DataFrame) -> None:
    first = frame.iloc[0]
    axis.set_title(f"({first.panel}) {first.title}")
    axis.text(0.5, -0.02, first.note, ha="center", va="top", transform=axis.transAxes, fontsize=6.5)
    axis.axis("off")
    layers = frame.dropna(subset=["layer"])
    axis.set(xlim=(-0.12, 1.3), ylim=(-0.2, max(len(layers), 1)))
    for row in layers.itertuples():
        _box(axis, row.layer, row.fill, row.executed)
    if layers.empty:
        axis.text(0.5, 0.5, NOT_RUN, ha="center", va="center", style="italic", fontsize=6.5)


def _box(axis: Axes, layer: float, fill: float, executed: float) -> None:
    dashed = {"linestyle": (0, (3, 2)), "edgecolor": "0.55"}
    outline = dashed if executed < 0.5 else {"edgecolor": BLACK}
    shade = {"facecolor": BLUE, "alpha": 0.12 + 0.78 * executed, "linewidth": 0}
    axis.add_patch(Rectangle((0, layer), fill, 0.78, **shade))
    axis.add_patch(Rectangle((0, layer), 1, 0.78, fill=False, linewidth=0.8, **outline))
    axis.text(1.04, layer + 0.39, f"{100 * executed:.0f}", va="center", fontsize=5.5)


# Figure 2.


def heatmaps(frame: pd.DataFrame) -> Figure:
    """Fig. 2: execution ratio by layer (across) and epoch (down), one panel per task.

    `frame`: task, epoch, layer, ratio.
    """
    if frame.empty:
        return empty()
    tasks = list(dict.fromkeys(frame.task))
    rows, columns = math.ceil(len(tasks) / 2), min(len(tasks), 2)
    figure, axes = canvas(PAGE if columns > 1 else COLUMN * 1.3, 0.5 + 1.15 * rows, rows, columns)
    for axis, task in zip(axes.flat, tasks, strict=False):
        image = _heatmap(axis, frame[frame.task == task])
        axis.set_title(TASK_LABELS[task])
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    figure.colorbar(image, ax=axes, label="execution ratio", shrink=0.9, pad=0.015, aspect=15)
    return figure


def _heatmap(axis: Axes, frame: pd.DataFrame):
    wide = frame.pivot(index="epoch", columns="layer", values="ratio")
    image = axis.imshow(wide, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    step = 1 if wide.shape[1] <= 16 else 4
    axis.set(xticks=range(0, wide.shape[1], step), xticklabels=wide.columns[::step])
    axis.set(yticks=range(len(wide)), yticklabels=[f"{epoch:.3g}" for epoch in wide.index])
    axis.set(xlabel="layer", ylabel="epoch")
    axis.spines[:].set_visible(True)
    if wide.shape[1] <= 16:
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            ink = "white" if value < 0.55 else "black"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=5.5)
    return image


# Figures 3 and 7.


def ratios_and_flips(frame: pd.DataFrame) -> Figure:
    """Fig. 3: (a) execution ratio and (b) flip share by epoch for a few layers of D-LLM.

    `frame`: epoch, layer, ratio, floor (the ratio that always-run tokens give to any layer), flip (measured)
    and flip_expected (closed form, drawn as a line); one row per epoch and layer.
    """
    if frame.empty:
        return empty()
    figure, axes = canvas(PAGE, 2.3, 1, 2)
    (ratio, flips), layers = axes[0], sorted(frame.layer.unique())
    for style, layer in zip(RANKED, layers, strict=False):
        part = frame[frame.layer == layer]
        ratio.plot(part.epoch, 100 * part.ratio, label=f"layer {layer}", **style)
        _flip_lines(flips, part, f"layer {layer}", style)
    ratio.axhline(100 * frame.floor.mean(), color="0.5", linewidth=0.7, label="tokens that always run")
    ratio.set(xlabel="epoch", ylabel="execution ratio (%)", ylim=(0, 104), title="(a) execution ratio")
    flips.set(xlabel="epoch", ylabel="decisions flipped (%)")
    flips.set_title("(b) flips by Gumbel noise: points; mean σ(−|Δ|): lines")
    flips.set_ylim(bottom=0)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def flips_compared(frame: pd.DataFrame) -> Figure:
    """Fig. 7: flip share by epoch, D-LLM against QTALE, one panel per layer.

    `frame`: method, epoch, layer, flip, flip_expected.
    """
    if frame.empty:
        return empty()
    layers = sorted(frame.layer.unique())
    figure, axes = canvas(PAGE, 2.0, 1, len(layers), sharey=True)
    for axis, layer in zip(axes[0], layers, strict=True):
        for method, part in frame[frame.layer == layer].groupby("method"):
            _flip_lines(axis, part, f"{METHODS[method]}, measured", LINES[method])
        axis.set(xlabel="epoch", title=f"layer {layer}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(ylabel="decisions flipped (%)")
    axes[0, 0].set_ylim(bottom=0)
    _explain_lines(axes[0, -1])
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _flip_lines(axis: Axes, part: pd.DataFrame, label: str, style: dict) -> None:
    axis.plot(part.epoch, 100 * part.flip, label=label, **{**style, "linestyle": "none"})
    axis.plot(part.epoch, 100 * part.flip_expected, **{**style, "marker": "none", "linewidth": 0.9})


def _explain_lines(axis: Axes) -> None:
    axis.plot([], [], color="0.4", linewidth=0.9, label="closed form: mean σ(−|Δ|)")


# Beside Table 4.


def theta_curves(frame: pd.DataFrame) -> Figure:
    """Calibration score by execution ratio as theta falls from 0.5, one panel per group of tasks.

    `frame`: group, method, bits, theta, score, execution_ratio. Filled marks: quantized; open marks: 16 bit.
    """
    if frame.empty:
        return empty()
    groups = [group for group in GROUPS if group in set(frame.group)]
    figure, axes = canvas(PAGE, 2.4, 1, len(groups))
    for axis, group in zip(axes[0], groups, strict=True):
        for (method, bits), part in frame[frame.group == group].groupby(["method", "bits"], sort=False):
            fill = {"fillstyle": "none", "linewidth": 0.7} if bits == 16 else {}
            label = f"{METHODS[method]}, {bits} bits"
            axis.plot(100 * part.execution_ratio, part.score, label=label, **{**LINES[method], **fill})
        score = "PPL" if group == "alpaca" else "accuracy (%)"
        axis.set(xlabel="execution ratio (%)", ylabel=score, title=TASK_LABELS[group])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


# Figure 4.


def noise(frame: pd.DataFrame) -> Figure:
    """Fig. 4: histogram of Gumbel(0, 1) draws with their density, and the flip curve that follows.

    `frame`: part ("density" or "flips"), x (draw, or |Δ|), measured, closed_form.
    """
    figure, axes = canvas(PAGE, 2.1, 1, 2)
    density, flips = axes[0]
    part = frame[frame.part == "density"]
    width = part.x.iloc[1] - part.x.iloc[0]
    near = part.x.abs() <= 1
    density.bar(part.x[near], part.measured[near], width, color=SKY, label="draws, |π| ≤ 1")
    density.bar(part.x[~near], part.measured[~near], width, color="0.85", label="draws, |π| > 1")
    density.plot(part.x, part.closed_form, color=BLACK, label="density")
    for x, text, style in ((0.0, "mode 0", "--"), (np.euler_gamma, "mean 0.577", ":")):
        density.axvline(x, color=RED, linestyle=style, linewidth=0.9, label=text)
    density.set(xlabel="π", ylabel="density", title="(a) π ~ Gumbel(0, 1)", xlim=(-3, 6))
    density.legend(loc="upper right")
    part = frame[frame.part == "flips"]
    flips.plot(part.x, 100 * part.closed_form, color=BLACK, label="closed form σ(−|Δ|)")
    flips.plot(part.x, 100 * part.measured, "o", color=BLUE, label="measured")
    flips.set(xlabel="logit gap |Δ|", ylabel="decisions flipped (%)", ylim=(0, 52))
    flips.set_title("(b) what the noise can flip")
    flips.legend()
    return figure


# Figures 5 and 6.


def logit_histograms(frame: pd.DataFrame) -> Figure:
    """Fig. 5, 6: router logits, one row of panels per layer, one column per epoch.

    `frame`: epoch, layer, kind (execute, bypass), left, right, count, gap (mean of execute − bypass).
    """
    if frame.empty:
        return empty()
    layers, epochs = sorted(frame.layer.unique()), sorted(frame.epoch.unique())
    size = (PAGE, 0.45 + 1.15 * len(layers))
    figure, axes = canvas(*size, len(layers), len(epochs), sharex=True, sharey="row")
    filled = frame[frame["count"] > 0]
    axes[0, 0].set_xlim(filled.left.min() - 0.5, filled.right.max() + 0.5)
    for (row, column), axis in np.ndenumerate(axes):
        part = frame[(frame.layer == layers[row]) & (frame.epoch == epochs[column])]
        _logits(axis, part)
        _label_outer(axis, row, column, len(layers), f"layer {layers[row]}", f"epoch {epochs[column]:.3g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _label_outer(axis: Axes, row: int, column: int, rows: int, layer: str, epoch: str) -> None:
    if row == 0:
        axis.set_title(epoch)
    if row == rows - 1:
        axis.set_xlabel("logit")
    if column == 0:
        axis.set_ylabel(f"{layer}\nshare of tokens (%)")


def _logits(axis: Axes, frame: pd.DataFrame) -> None:
    for kind, look in LOGITS.items():
        part = frame[frame.kind == kind]
        share = 100 * part["count"] / max(part["count"].sum(), 1)
        axis.stairs(share, [*part.left, part.right.iloc[-1]], fill=True, label=kind, linewidth=0.7, **look)
    axis.margins(y=0.2)  # room for the text
    gap = f"mean gap {frame.gap.iloc[0]:+.1f}".replace("-", "−")
    axis.text(0.03, 0.97, gap, transform=axis.transAxes, va="top", fontsize=6)
