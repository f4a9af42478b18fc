"""Which tokens skip, as contrasts of two sets of tokens: which executes more. Stated when the shares of the
first seed of tiny and tiny-full had been published, and before those of any other were read.

An effect is the share of the routed layers that the first set's tokens execute, less the second's, in
points; one of every fine-tuning, all of them on the same prompts. The paper says nothing of this: the
expectations are ours. Tokens that always run are in neither set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtale_lib import jobs, token_tables
from qtale_lib.measurements import Measurements
from qtale_lib.statistics import Run

FIRST = 8  # places that count as a sequence's beginning


@dataclass(frozen=True)
class TokenContrast:
    """`plus` executes more than `minus`: which groups (see token_routes) of the kind `by` are in either."""

    id: str
    said: str
    measured: str
    by: str
    plus: Callable[[str], bool]
    minus: Callable[[str], bool]


CONTRASTS = (
    TokenContrast(
        "surprising",
        "what surprises the model runs more of its layers",
        "tokens of more than 1 nat − those of less than 0.1",  # edges of token_routes.SURPRISAL
        "surprisal",
        lambda name: int(name) >= 3,
        lambda name: int(name) <= 1,
    ),
    TokenContrast(
        "names",
        "entities run more layers than function words",
        "names − function words",
        "kind",
        lambda name: name.startswith("name, "),
        lambda name: name.startswith("function word, "),
    ),
    TokenContrast(
        "responses",
        "what is written runs more layers than what is read",
        "tokens of the response − of the prompt",
        "kind",
        lambda name: name.endswith(", response"),
        lambda name: name.endswith(", prompt"),
    ),
    TokenContrast(
        "beginning",
        "a sequence's first tokens, which all later ones may attend to, run more layers",
        f"the first {FIRST} places, but for those that always run − the later ones",
        "place",
        lambda name: int(name) < FIRST,
        lambda name: int(name) >= FIRST,
    ),
)


def contrast_runs(store: Measurements, contrast: TokenContrast, method: str) -> list[Run]:
    """One Run per seed whose routes were read; without one where either set is empty."""
    routing, runs = store.profile.routing, []
    for (other, seed), value in token_tables.held_of_seeds(store).items():
        groups = [group for group in value["groups"] if group["by"] == contrast.by]
        if contrast.by == "place":
            groups = [group for group in groups if int(group["name"]) >= routing.always_run_tokens]
        sides = [
            _share([group for group in groups if chosen(group["name"])], routing.always_run_layers)
            for chosen in (contrast.plus, contrast.minus)
        ]
        if other == method and None not in sides:
            runs.append(Run(jobs.WRITTEN_TASK, seed, 100 * (sides[0] - sides[1])))
    return runs


def _share(groups: list[dict[str, Any]], always_run: int) -> float | None:
    """Of the routed layers, what the groups' tokens execute, mean over tokens; None without any."""
    if not groups:
        return None
    means = [np.mean(group["executed"][always_run:]) for group in groups]
    return float(np.average(means, weights=[group["tokens"] for group in groups]))
