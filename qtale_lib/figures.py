"""Figures 1-7, drawn from tidy frames alone: the CSV written beside a figure is the frame it was drawn from.

Figures 3, 4, 7 and the θ curves are as wide as a paper's column, the others as its page, and no text is
smaller than 7 points. Colours of Okabe and Ito, with markers, dashes or hatches beside the colour so that
grey prints read as well; where marks meet, dots lie inside open squares, and crosses reach out of both. Fonts
are embedded; the same frame gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from qtale_lib.paper import GROUPS, METHODS, TASK_LABELS
from qtale_lib.store import replaced

COLUMN, PAGE = 3.25, 6.75  # inches
FORMATS = ("pdf", "png", "svg")
BLACK = "#000000"
ORANGE, SKY, GREEN, BLUE, RED = "C0", "C1", "C2", "C3", "C4"  # places in the palette in use
PALETTES = {
    "okabe-ito": ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"),
    "tol": ("#CCBB44", "#66CCEE", "#228833", "#4477AA", "#EE6677"),
    "grey": ("#8C8C8C", "#C8C8C8", "#777777", "#6E6E6E", "#1A1A1A"),
}
WHOLE = {"clip_on": False, "zorder": 3}  # marks at a limit lie on the axis, not cut in half by it
DOT = {"marker": "o", "markersize": 2.8, **WHOLE}
SQUARE = {"marker": "s", "markersize": 5, "markerfacecolor": "none", "markeredgewidth": 0.9, **WHOLE}
CROSS = {"marker": "x", "markersize": 5.5, "markeredgewidth": 0.9, **WHOLE}
LINES = {
    "dllm": {"color": RED, "linestyle": "-", **DOT},
    "qtale": {"color": BLUE, "linestyle": "--", **SQUARE},
}
RANKED = (
    {"color": BLACK, "linestyle": "-", **DOT},
    {"color": RED, "linestyle": "--", **SQUARE},
    {"color": BLUE, "linestyle": ":", **CROSS},
)
SIXTEEN = {"linestyle": "--", "linewidth": 0.9, **SQUARE, "markersize": 4.5}
QUANTIZED = {"linestyle": "-", "linewidth": 0.9, **DOT, "markersize": 2.3}
LOGITS = {
    "execute": {"color": BLUE, "alpha": 0.75},
    "bypass": {"facecolor": "none", "edgecolor": RED, "hatch": "/////"},
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.prop_cycle": cycler(color=PALETTES["okabe-ito"]),
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "hatch.linewidth": 0.5,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "qtale",
}
UNDATED = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
BAND = "bands: ± one standard error over questions"
SEED_BAND = "bands: ± one s.d. over seeds"
NOT_RUN = "not run in this profile"


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **options
) -> tuple[Figure, np.ndarray]:
    """A figure of that size in inches in the style in use, and its axes as an array [rows, columns]."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(_width.get() or width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


_width: ContextVar[float | None] = ContextVar("width", default=None)


@contextmanager
def styled(width: float | None, changes: dict[str, Any]) -> Iterator[None]:
    """Draw figures of another width (inches), and by other settings of matplotlib than STYLE's, meanwhile."""
    before, token = dict(STYLE), _width.set(width)
    STYLE.update(changes)
    try:
        yield
    finally:
        _width.reset(token)
        STYLE.clear()
        STYLE.update(before)


def save(figure: Figure, data: pd.DataFrame, name: str, directory: Path) -> dict[str, Path]:
    """Write `name` as PDF, PNG and SVG, and the plotted data as CSV; returns the path of every format."""
    paths = {suffix: directory / f"{name}.{suffix}" for suffix in (*FORMATS, "csv")}
    with matplotlib.rc_context(STYLE):
        lay_out(figure)
        for suffix in FORMATS:
            with replaced(paths[suffix]) as file:
                figure.savefig(file, format=suffix, metadata=UNDATED[suffix])
    with replaced(paths["csv"]) as file:
        data.to_csv(file, index=False, lineterminator="\n")
    return paths


def lay_out(figure: Figure) -> None:
    """Find every place once and for all: each format would come out a little different otherwise."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


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
    height = max(2.4, 0.13 * frame.layer.nunique())  # a line of text for every layer
    figure, axes = canvas(PAGE, 1.0 + height, 1, len(panels))
    for axis, panel in zip(axes[0], panels, strict=True):
        _stack(axis, frame[frame.panel == panel])
    return figure


def _stack(axis: Axes, frame: pd.DataFrame) -> None:
    first = frame.iloc[0]
    axis.set_title(f"({first.panel}) {first.title}")
    axis.text(0.5, -0.02, first.note, ha="center", va="top", transform=axis.transAxes)
    axis.axis("off")
    layers = frame.dropna(subset=["layer"])
    axis.set(xlim=(-0.12, 1.3), ylim=(-0.2, max(len(layers), 1)))
    for row in layers.itertuples():
        _box(axis, row.layer, row.fill, row.executed)
    if layers.empty:
        axis.text(0.5, 0.5, NOT_RUN, ha="center", va="center", style="italic")


def _box(axis: Axes, layer: float, fill: float, executed: float) -> None:
    dashed = {"linestyle": (0, (3, 2)), "edgecolor": "0.55"}
    outline = dashed if executed < 0.5 else {"edgecolor": BLACK}
    shade = {"facecolor": BLUE, "alpha": 0.12 + 0.78 * executed, "linewidth": 0}
    axis.add_patch(Rectangle((0, layer), fill, 0.78, **shade))
    axis.add_patch(Rectangle((0, layer), 1, 0.78, fill=False, linewidth=0.8, **outline))
    axis.text(1.04, layer + 0.39, f"{100 * executed:.0f}", va="center")


# Figure 2.


def heatmaps(frame: pd.DataFrame) -> Figure:
    """Fig. 2: execution ratio by layer (across) and epoch (down), one panel per task.

    `frame`: task, epoch, layer, ratio.
    """
    if frame.empty:
        return empty()
    tasks = list(dict.fromkeys(frame.task))
    rows, columns = math.ceil(len(tasks) / 2), min(len(tasks), 2)
    figure, axes = canvas(PAGE if columns > 1 else COLUMN, 0.5 + 1.15 * rows, rows, columns)
    for axis, task in zip(axes.flat, tasks, strict=False):
        image = _heatmap(axis, frame[frame.task == task], figure.get_figwidth() / columns)
        axis.set_title(TASK_LABELS[task])
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    figure.colorbar(image, ax=axes, label="execution ratio", shrink=0.9, pad=0.015, aspect=15)
    return figure


def _heatmap(axis: Axes, frame: pd.DataFrame, width: float):
    wide = frame.pivot(index="epoch", columns="layer", values="ratio")
    image = axis.imshow(wide, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    step = 1 if wide.shape[1] <= 16 else 4
    axis.set(xticks=range(0, wide.shape[1], step), xticklabels=wide.columns[::step])
    axis.set(yticks=range(len(wide)), yticklabels=[f"{epoch:.3g}" for epoch in wide.index])
    axis.set(xlabel="layer", ylabel="epoch")
    axis.spines[:].set_visible(True)
    if wide.shape[1] <= 3.6 * width:  # inches of the panel and its labels: else the numbers would touch
        for (row, column), value in np.ndenumerate(wide.to_numpy()):
            ink = "white" if value < 0.55 else "black"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink)
    return image


# Figures 3 and 7.


def ratios_and_flips(frame: pd.DataFrame) -> Figure:
    """Fig. 3: (a) execution ratio and (b) flip share by epoch for a few layers of D-LLM.

    `frame`: epoch, layer, ratio, floor (the ratio that always-run tokens give to any layer), flip (measured)
    and flip_expected (closed form, drawn as a line); one row per epoch and layer. Bands reach one standard
    deviation over seeds up and down (ratio_spread, flip_spread), where these are known.
    """
    if frame.empty:
        return empty()
    figure, axes = canvas(COLUMN, 3.8, 2, 1, sharex=True)
    (ratio, flips), layers = axes[:, 0], sorted(frame.layer.unique())
    for style, layer in zip(RANKED, layers, strict=False):
        part = frame[frame.layer == layer]
        ratio.plot(part.epoch, 100 * part.ratio, label=f"layer {layer}", **style)
        _band(ratio, part, "ratio", style["color"])
        _flip_lines(flips, part, f"layer {layer}", style)
    ratio.axhline(100 * frame.floor.mean(), color="0.5", linewidth=0.7, label="tokens that always run")
    ratio.set(ylabel="execution ratio (%)", ylim=(0, 104), title="(a) execution ratio")
    flips.set_title("(b) flips by noise; lines: mean σ(−|Δ|)")
    flips.set_ylabel("decisions flipped (%)")
    _percent_flipped(flips)
    _explain_bands(ratio, frame)
    figure.legend(*ratio.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def flips_compared(frame: pd.DataFrame) -> Figure:
    """Fig. 7: flip share by epoch, D-LLM against QTALE, one panel per layer, stacked.

    `frame`: method, epoch, layer, flip, flip_expected, flip_spread (drawn as in Fig. 3).
    """
    if frame.empty:
        return empty()
    layers = sorted(frame.layer.unique())
    figure, axes = canvas(COLUMN, 0.9 + 1.2 * len(layers), len(layers), 1, sharex=True, sharey=True)
    for axis, layer in zip(axes[:, 0], layers, strict=True):
        for method, part in frame[frame.layer == layer].groupby("method"):
            _flip_lines(axis, part, METHODS[method], LINES[method])
        axis.set_title(f"layer {layer}")
    figure.supylabel("decisions flipped (%)", fontsize=STYLE["axes.labelsize"])
    _percent_flipped(axis)
    axis.plot([], [], color="0.4", linewidth=0.9, label="lines: mean σ(−|Δ|)")
    _explain_bands(axis, frame)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3 if len(labels) < 4 else 2)
    return figure


def _percent_flipped(axis: Axes) -> None:
    axis.set(xlabel="epoch")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _flip_lines(axis: Axes, part: pd.DataFrame, label: str, style: dict) -> None:
    axis.plot(part.epoch, 100 * part.flip, label=label, **{**style, "linestyle": "none"})
    axis.plot(part.epoch, 100 * part.flip_expected, **{**style, "marker": "none", "linewidth": 0.9})
    _band(axis, part, "flip", style["color"])


def _band(axis: Axes, part: pd.DataFrame, name: str, colour: str) -> None:
    """The spread over seeds; nothing with one."""
    middle, spread = 100 * part[name], 100 * part[f"{name}_spread"]
    if spread.notna().any():
        low, high = (middle - spread).clip(lower=0), (middle + spread).clip(upper=100)
        axis.fill_between(part.epoch, low, high, color=colour, alpha=0.15, linewidth=0)


def _explain_bands(axis: Axes, frame: pd.DataFrame) -> None:
    if frame.flip_spread.notna().any():
        axis.fill_between([], [], color="0.4", alpha=0.15, linewidth=0, label=SEED_BAND)


# Beside Table 4.


def theta_curves(frame: pd.DataFrame) -> Figure:
    """Calibration score by theta, then the execution ratio: a row per group of tasks, a column per method.

    `frame`: group, method, bits, theta, score, execution_ratio, and stderr (of an accuracy, over questions;
    drawn as a band). The last row holds the ratios of all groups, one line for each bit width.
    """
    if frame.empty:
        return empty()
    groups = [group for group in GROUPS if group in set(frame.group)]
    methods = [method for method in METHODS if method in set(frame.method)]
    rows = len(groups) + 1
    figure, axes = canvas(COLUMN, 1.35 + 0.82 * rows, rows, len(methods), sharex=True, sharey="row")
    for column, method in zip(axes.T, methods, strict=True):
        part = frame[frame.method == method]
        for axis, group in zip(column, groups, strict=False):
            _scores(axis, part[part.group == group], LINES[method]["color"])
        _ratios(column[-1], part, groups)
        column[0].set_title(METHODS[method])
        column[-1].set(xlabel="θ", xlim=(0, 0.53), xticks=(0.1, 0.2, 0.3, 0.4, 0.5))
    _label_rows(axes[:, 0], groups)
    _theta_legends(figure, frame, groups)
    return figure


def _scores(axis: Axes, frame: pd.DataFrame, colour: str) -> None:
    for bits, part in frame.groupby("bits", sort=False):
        axis.plot(part.theta, part.score, color=colour, **_bits_look(bits))
        if part.stderr.notna().all():
            band = (part.score - part.stderr, part.score + part.stderr)
            axis.fill_between(part.theta, *band, color=colour, alpha=0.15, linewidth=0)


def _bits_look(bits: int) -> dict:
    return {"label": f"{bits} bits", **(SIXTEEN if bits == 16 else QUANTIZED)}


def _ratios(axis: Axes, frame: pd.DataFrame, groups: list[str]) -> None:
    for style, group in zip(RANKED, groups, strict=False):
        for _, part in frame[frame.group == group].groupby("bits"):
            axis.plot(part.theta, 100 * part.execution_ratio, **{**style, "marker": "none"})


def _label_rows(axes: np.ndarray, groups: list[str]) -> None:
    for axis, group in zip(axes, groups, strict=False):
        axis.set_ylabel(f"{TASK_LABELS[group]}\n{'PPL' if group == 'alpaca' else 'accuracy (%)'}")
    axes[-1].set_ylabel("execution\nratio (%)")


def _theta_legends(figure: Figure, frame: pd.DataFrame, groups: list[str]) -> None:
    """Above: the scores' bit widths, and what is known of their noise; below: the ratios' groups."""
    bits = [Line2D([], [], color="0.25", **_bits_look(bits)) for bits in sorted(frame.bits.unique())]
    figure.legend(handles=bits, title=BAND, loc="outside upper center", ncols=2)
    styles = [{**style, "marker": "none"} for style in RANKED]
    ratios = [Line2D([], [], label=TASK_LABELS[g], **style) for g, style in zip(groups, styles, strict=False)]
    figure.legend(handles=ratios, loc="outside lower center", ncols=3)


# Figure 4.


def noise(frame: pd.DataFrame) -> Figure:
    """Fig. 4: histogram of Gumbel(0, 1) draws with their density, and the flip curve that follows.

    `frame`: part ("density" or "flips"), x (draw, or |Δ|), measured, closed_form.
    """
    figure, axes = canvas(COLUMN, 3.8, 2, 1)
    _density(axes[0, 0], frame[frame.part == "density"])
    _flip_curve(axes[1, 0], frame[frame.part == "flips"])
    return figure


def _density(density: Axes, part: pd.DataFrame) -> None:
    width = part.x.iloc[1] - part.x.iloc[0]
    near = part.x.abs() <= 1
    density.bar(part.x[near], part.measured[near], width, color=SKY, label="draws, |π| ≤ 1")
    density.bar(part.x[~near], part.measured[~near], width, color="0.85", label="draws, |π| > 1")
    density.plot(part.x, part.closed_form, color=BLACK, label="density")
    for x, text, style in ((0.0, "mode 0", "--"), (np.euler_gamma, "mean 0.577", ":")):
        density.axvline(x, color=BLACK, linestyle=style, linewidth=0.9, label=text)
    density.set(xlabel="π", ylabel="density", title="(a) π ~ Gumbel(0, 1)", xlim=(-3, 6))
    density.legend(loc="upper right")


def _flip_curve(flips: Axes, part: pd.DataFrame) -> None:
    flips.plot(part.x, 100 * part.closed_form, color=BLACK, label="closed form σ(−|Δ|)")
    flips.plot(part.x, 100 * part.measured, color=BLUE, linestyle="none", label="measured", **DOT)
    flips.set(xlabel="logit gap |Δ|", ylabel="decisions flipped (%)", ylim=(0, 52))
    flips.set_title("(b) what the noise can flip")
    flips.legend()


# Figures 5 and 6.


def logit_histograms(frame: pd.DataFrame) -> Figure:
    """Fig. 5, 6: router logits, one row of panels per layer, one column per epoch.

    `frame`: epoch, layer, kind (execute, bypass), left, right, count, gap (mean of execute − bypass), low and
    high (percent of tokens in the seeds where these are fewest and most; drawn as a band where known).
    """
    if frame.empty:
        return empty()
    layers, epochs = sorted(frame.layer.unique()), sorted(frame.epoch.unique())
    size = (PAGE, 0.45 + 1.15 * len(layers))
    figure, axes = canvas(*size, len(layers), len(epochs), sharex=True, sharey="row")
    filled = frame[frame["count"] > 0]
    axes[0, 0].set_xlim(filled.left.min() - 0.5, filled.right.max() + 0.5)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
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
        axis.set_ylabel(f"{layer}\ntokens (%)")


def _logits(axis: Axes, frame: pd.DataFrame) -> None:
    for kind, look in LOGITS.items():
        part = frame[frame.kind == kind]
        share = 100 * part["count"] / max(part["count"].sum(), 1)
        edges = [*part.left, part.right.iloc[-1]]
        axis.stairs(share, edges, fill=True, label=kind, linewidth=0.7, **look)
        if part.high.notna().all():
            colour = look.get("color") or look["edgecolor"]
            axis.stairs(part.high, edges, baseline=part.low, fill=True, color=colour, alpha=0.25)
    axis.margins(y=0.2)  # room for the text
    axis.text(0.03, 0.97, f"mean gap {_signed(frame.gap.iloc[0])}", transform=axis.transAxes, va="top")


def _signed(value: float) -> str:
    """The value with one decimal and its sign, which what rounds to zero has not."""
    return f"{value:+.1f}".replace("-", "−") if round(value, 1) else "0.0"
