"""The picture of notebook 13, for papers: what two models execute of a text, and what they expect next."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from qtale_lib.figures import BLUE, PAGE, RED, canvas, empty

COLUMNS = ["part", "side", "title", "place", "token", "layer", "value"]
SIDES = {"left": {"color": RED}, "right": {"color": BLUE, "hatch": "/////", "edgecolor": "white"}}
LOOKS = {"full": {"color": "0.75"}, **SIDES}  # of the bars of the next token
ROW, LOWEST, TALLEST = 0.135, 1.6, 8.1  # inches: a token, all tokens at least and at most
LABELLED = 60  # tokens that are named, at most
SHORT = 14  # characters of a token that are shown


def explored(frame: pd.DataFrame) -> Figure:
    """A text's tokens (down) by the layers (across) that execute them in two models, with each layer's share
    of the tokens above, and the next token's distribution beside the full model's.

    `frame` (COLUMNS): part "route", a row per side (left, right), token and layer, value 1 where it is
    executed; part "next", a row per side (full too, if known) and token, value its probability.
    """
    if frame.empty:
        return empty("nothing was read")
    routes, following = frame[frame.part == "route"], frame[frame.part == "next"]
    height = min(max(ROW * routes.place.nunique(), LOWEST), TALLEST)
    size = (PAGE, height + 1.6)
    ratios = {"width_ratios": (1, 1, 0.7), "height_ratios": (0.5, height)}
    figure, axes = canvas(*size, 2, 3, **ratios)
    for column, side in zip(axes.T, SIDES, strict=False):
        part = routes[routes.side == side]
        executed = part.value.to_numpy().reshape(part.place.nunique(), -1)  # [tokens, layers]
        _shares(column[0], executed.mean(0), side)
        _map(column[1], executed, side)
        column[0].set_title(part.title.iloc[0], parse_math=False)
    _name_tokens(axes[1, 0], part.drop_duplicates("place").token)
    axes[0, 0].set_ylabel("tokens (%)")
    axes[0, 2].axis("off")
    _next(axes[1, 2], following)
    figure.legend(*axes[1, 2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _shares(axis: Axes, shares: np.ndarray, side: str) -> None:
    axis.bar(range(len(shares)), 100 * shares, 0.8, **SIDES[side])
    axis.set(ylim=(0, 100), yticks=(0, 50, 100), xticks=[], xlim=(-0.5, len(shares) - 0.5))


def _map(axis: Axes, executed: np.ndarray, side: str) -> None:
    """Pale where a token skips a layer."""
    edges = [np.arange(count + 1) - 0.5 for count in reversed(executed.shape)]
    inks = ListedColormap(["0.95", axis.plot([], [], color=SIDES[side]["color"])[0].get_color()])
    axis.pcolormesh(*edges, executed, cmap=inks, vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
    axis.set(yticks=[], xticks=range(0, executed.shape[1], -(-executed.shape[1] // 8)), xlabel="layer")
    axis.invert_yaxis()


def _name_tokens(axis: Axes, tokens: pd.Series) -> None:
    step = -(-len(tokens) // LABELLED)
    axis.set_yticks(range(0, len(tokens), step), _short(tokens)[::step], parse_math=False)


def _next(axis: Axes, frame: pd.DataFrame) -> None:
    sides = [side for side in LOOKS if side in set(frame.side)]
    names, thick = _short(frame.drop_duplicates("place").token), 0.8 / len(sides)
    for number, side in enumerate(sides):
        part = frame[frame.side == side]
        offset = (number - (len(sides) - 1) / 2) * thick
        axis.barh(part.place + offset, 100 * part.value, thick, label=part.title.iloc[0], **LOOKS[side])
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set(xlim=(0, 100), xlabel="next token (%)", ylim=(len(names) - 0.5, -0.5))


def _short(tokens: pd.Series) -> list[str]:
    return [token if len(token) <= SHORT else f"{token[: SHORT - 1]}…" for token in tokens.astype(str)]
