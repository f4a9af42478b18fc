"""Gumbel noise and what it can flip (Fig. 4; Sec. 3.3): the suite's own draws beside the closed forms.

Ten batches of draws stand where fine-tunings stand in the other figures: they give the claims on the noise
their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pandas as pd

from qtale_lib.statistics import Run

BATCHES, DRAWS = 10, 20_000
EDGES = np.linspace(-3, 6, 91)
GAPS = np.arange(0, 8.25, 0.5)


@lru_cache(maxsize=1)
def draws() -> np.ndarray:
    """Draws of Gumbel(0, 1) by the suite's sampler, [batches, draws, 2], the same on every call."""
    import torch

    from qtale_lib.routing import gumbel

    return gumbel((BATCHES, DRAWS, 2), torch.Generator().manual_seed(0)).numpy()


def runs(statistic: Callable[[np.ndarray], float]) -> list[Run]:
    """`statistic` of each batch of draws [draws, 2]."""
    return [Run("noise", index, float(statistic(batch))) for index, batch in enumerate(draws())]


def mode(noise: np.ndarray) -> float:
    """Peak of a histogram of 0.1-wide bins, smoothed over five bins."""
    counts, edges = np.histogram(noise, bins=np.linspace(-2.05, 2.05, 42))
    smooth = np.convolve(counts, np.ones(5), mode="same")
    return round(float((edges[:-1] + edges[1:])[smooth.argmax()] / 2), 2) + 0.0


def flips_at(gap: float) -> Callable[[np.ndarray], float]:
    """Percent of decisions that noise [draws, 2] turns over when the logits are `gap` apart."""
    return lambda noise: 100 * float(np.mean(noise[:, 1] - noise[:, 0] > gap))


def frame() -> pd.DataFrame:
    """Figure 4, tidy: part ("density" by draw, "flips" by |gap|), x, measured, closed_form."""
    measured, _ = np.histogram(draws(), bins=EDGES)
    centres, width = (EDGES[:-1] + EDGES[1:]) / 2, EDGES[1] - EDGES[0]
    density = {"part": "density", "x": centres, "measured": measured / draws().size / width}
    flips = {
        "part": "flips",
        "x": GAPS,
        "measured": [flips_at(gap)(draws().reshape(-1, 2)) / 100 for gap in GAPS],
    }
    return pd.concat([
        pd.DataFrame({**density, "closed_form": np.exp(-(centres + np.exp(-centres)))}),
        pd.DataFrame({**flips, "closed_form": 1 / (1 + np.exp(GAPS))}),
    ], ignore_index=True)  # fmt: skip


def summary() -> pd.DataFrame:
    """Mode, mean, variance and P(|π| ≤ 1) of the draws beside their closed forms."""
    noise = draws()
    within = math.exp(-math.exp(-1)) - math.exp(-math.e)
    rows = [
        ("mode", mode(noise), 0.0),
        ("mean", noise.mean(), np.euler_gamma),
        ("variance", noise.var(), math.pi**2 / 6),
        ("P(|π| ≤ 1)", np.mean(np.abs(noise) <= 1), within),
        ("flips at |Δ| = 2", flips_at(2.0)(noise.reshape(-1, 2)) / 100, 1 / (1 + math.exp(2))),
    ]
    return pd.DataFrame(rows, columns=["quantity", "measured", "closed form"])
