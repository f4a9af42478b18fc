"""θ without a grid in notebook 10: what the rules of threshold_rules.py run, and how well they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.claims import Claim
from qtale_lib.contrasts import stated
from qtale_lib.measurements import ROUTED_METHODS, Measurements, group_of
from qtale_lib.sensitivity import AIMS
from qtale_lib.statistics import Run, estimate
from qtale_lib.studies import Study
from qtale_lib.tables import Table, number, or_dash

COLUMNS = ("rule", "method", "bits", "aimed", "R", "off", "off_spread", "accuracy", "low", "high", "seeds")
SEARCHED = ("searched", "argmax")


def stores(study: Study) -> list[Measurements]:
    """Of the settings that have such rules."""
    return [store for setting, store in study.measured if setting.factor == AIMS]


def frame(study: Study) -> pd.DataFrame:
    """One row (COLUMNS) per rule (those that search, and θ = 0.5, beside), method and bit width.

    aimed: the R that the rule aims at, mean over fine-tunings (NaN where it aims at none); R: on the
    questions evaluated, and `off` from what was aimed at, in points, with its deviation over seeds; accuracy
    in percent with its 95 % interval over seeds and questions.
    """
    rows = []
    for store in stores(study):
        profile = store.profile
        for rule in (*profile.theta_aims, *SEARCHED):
            cells = [(m, b) for m in profile.methods if m in ROUTED_METHODS for b in profile.bits]
            rows += [row for cell in cells if (row := _row(store, rule, *cell))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(store: Measurements, rule: str, method: str, bits: int) -> dict[str, Any] | None:
    runs = [
        (task, seed, answers)
        for (task, m, seed, b, r), answers in store.answers.items()
        if (m, b, r) == (method, bits, rule) and group_of(task) != "alpaca"
    ]
    if not runs:
        return None
    measured = estimate([Run(task, seed, a.mean, a.scores, a.shared) for task, seed, a in runs])
    off = pd.DataFrame(
        [
            (seed, 100 * (a.execution_ratio - aimed(store, rule, t, method, seed, bits)))
            for t, seed, a in runs
        ],
        columns=["seed", "off"],
    )
    return {
        "rule": rule, "method": method, "bits": bits,
        "aimed": np.mean([aimed(store, rule, t, method, seed, bits) for t, seed, _ in runs]),
        "R": np.mean([a.execution_ratio for *_, a in runs]),
        "off": off.off.mean(), "off_spread": off.groupby("seed").off.mean().std(),
        "accuracy": measured.effect, "low": measured.low, "high": measured.high, "seeds": measured.seeds,
    }  # fmt: skip


def aimed(store: Measurements, rule: str, task: str, method: str, seed: int, bits: int) -> float:
    """The R that a rule aims at in one fine-tuning; NaN for one that aims at none."""
    if rule in SEARCHED:
        return np.nan
    spec = {"task": task, "method": method, "seed": seed, "bits": bits, "theta": rule}
    return store.lab.result("threshold", **spec)["value"]["ratio"]


def table(study: Study) -> Table:
    """What each rule aims at, runs and scores, the search beside."""
    found = frame(study)
    text = pd.DataFrame({
        "θ by": found.rule, "method": found.method.map(paper.METHODS), "bits": found.bits.astype(str),
        "R aimed at": [or_dash(value, 3) for value in found.aimed],
        "R": [number(value, 3) for value in found.R],
        "off (points)": [or_dash(value, 1, sign=True) for value in found.off],
        "accuracy [95 %]": [
            f"{number(r.accuracy, 1)} [{number(r.low, 1)}, {number(r.high, 1)}]" for r in found.itertuples()
        ],
    })  # fmt: skip
    notes = (
        "ratio: of execution; flops: of Full's layers, routers included; by layer: a θ for each, so that "
        "all routed layers run the same share. searched: Sec. 3.4; argmax: θ 0.5.",
        f"Means over {', '.join(study.profile.tasks)} and {len(study.profile.seeds)} seed(s), on validation "
        "questions; intervals over seeds and questions. θ was found on calibration texts.",
    )
    caption = f"θ without a grid, study {study.profile.name}"
    return Table("sensitivity_theta_aims", caption, text, found, ("rule", "method", "bits"), notes)


# Claims: that a rule runs what it aims at.


def claims_of(study: Study) -> list[Claim]:
    """One per rule, at the fewest bits, mean over the methods."""
    return [_claim(store, rule) for store in stores(study) for rule in store.profile.theta_aims]


def _claim(store: Measurements, rule: str) -> Claim:
    metric, bits = stated().ratios, min(store.profile.bits)
    methods = [method for method in store.profile.methods if method in ROUTED_METHODS]
    names = " and ".join(paper.METHODS[method] for method in methods)
    return Claim(
        id=f"S θ by {rule}",
        family="sensitivity",
        notebook="10",
        quote=f"θ by {rule}",
        source="ours, in place of the search of Sec. 3.4",
        measured=f"{bits} bits, {names}: R − R aimed at, within ± {metric.smallest:g}",
        unit=metric.unit,
        runs=_runs(store, rule, methods, bits),
        smallest=metric.smallest,
        group="csqa",
        low=-metric.smallest,
        high=metric.smallest,
    )


def _runs(store: Measurements, rule: str, methods: list[str], bits: int) -> Callable[[Study], list[Run]]:
    """Points off what was aimed at, one Run per task and seed: the mean over the methods."""

    def runs(study: Study) -> list[Run]:
        made = []
        for task in store.profile.tasks:
            for seed in store.profile.seeds:
                cells = [(task, method, seed, bits, rule) for method in methods]
                if group_of(task) != "alpaca" and all(cell in store.answers for cell in cells):
                    off = [
                        store.answers[cell].execution_ratio - aimed(store, rule, task, cell[1], seed, bits)
                        for cell in cells
                    ]
                    made.append(Run(task, seed, 100 * float(np.mean(off))))
        return made

    return runs
