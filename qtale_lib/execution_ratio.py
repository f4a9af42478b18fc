"""Accuracy against execution ratio (notebook 08): curves, Pareto fronts, and who wins at equal FLOPs.

Three curves a bit width: QTALE and D-LLM (the same without the entropy term) along θ, and D-LLM trained for
several ratios, each at θ = 0.5. Their routers are alike, so equal R are equal FLOPs, routers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import efficiency, paper
from qtale_lib.claims import Claim
from qtale_lib.contrasts import stated
from qtale_lib.effects import gain_at_equal_ratio
from qtale_lib.efficiency_tables import shape
from qtale_lib.jobs import fixed_theta, is_found, rules
from qtale_lib.measurements import Answers, Measurements
from qtale_lib.statistics import Run, estimate
from qtale_lib.studies import Study
from qtale_lib.tables import Table, number

CURVES = {"qtale": "QTALE along θ", "dllm": "D-LLM along θ", "targets": "D-LLM trained for R"}
RIVALS = {"dllm": "the same without the entropy term, along θ", "targets": "D-LLM trained for R, θ 0.5"}
TARGET = "training.rate_target"
ALL = "all"  # the mean over the study's tasks
POINTS = ("curve", "bits", "task", "target", "theta", "R", "flops",
          "accuracy", "low", "high", "seeds", "on_front")  # fmt: skip
GAINS = ("bits", "rival", "task", "effect", "low", "high", "seeds", "ratio_low", "ratio_high")


@dataclass(frozen=True)
class Point:
    """A point of a curve: whose answers, under which rule for θ. `compared`: at equal ratios, too."""

    curve: str
    store: Measurements
    method: str
    rule: str
    compared: bool = True

    def answers(self, task: str, seed: int, bits: int) -> Answers | None:
        """Of one fine-tuning; None where it was not evaluated."""
        return self.store.answers.get((task, self.method, seed, bits, self.rule))


def points(study: Study) -> list[Point]:
    """Of all three curves; θ → 0, whose R of 1 lies far from all others, is drawn and not compared."""
    along = [
        Point(method, study.own, method, rule, rule != "zero")
        for method in ("qtale", "dllm")
        for rule in rules(study.profile, method)
        if not is_found(rule)
    ]
    trained = [store for setting, store in study.measured if setting.factor in (None, TARGET)]
    return [*along, *(Point("targets", store, "dllm", "argmax") for store in trained)]


def frame(study: Study) -> pd.DataFrame:
    """One row (POINTS) per curve, bit width, task (and the mean over all, `ALL`) and point, by rising R.

    R and flops (R and what the routers add, both relative to the layers of Full): means over seeds, or over
    tasks and seeds. accuracy in percent, expected where that is known, with its 95 % interval over seeds and
    questions. on_front: no other point of the width and task is as cheap and as accurate.
    """
    rows = [row for point in points(study) for row in _rows(study, point)]
    found = pd.DataFrame(rows, columns=list(POINTS))
    found["on_front"] = False
    for _, part in found.groupby(["bits", "task"], sort=False):
        found.loc[part.index, "on_front"] = front(part.flops.to_numpy(), part.accuracy.to_numpy())
    return found.sort_values(["bits", "task", "curve", "R"], ascending=[False, True, True, True],
                             kind="stable", ignore_index=True)  # fmt: skip


def _rows(study: Study, point: Point) -> Iterator[dict[str, Any]]:
    profile = study.profile
    for bits in profile.bits:
        cells = [(t, s, point.answers(t, s, bits)) for t in profile.tasks for s in profile.seeds]
        cells = [cell for cell in cells if cell[2]]
        present = list(dict.fromkeys(task for task, *_ in cells))
        for task in [*present, *([ALL] if present else [])]:
            own = [cell for cell in cells if task in (ALL, cell[0])]
            measured = estimate([Run(t, s, a.mean, a.scores, a.shared) for t, s, a in own])
            ratio = float(np.mean([answers.execution_ratio for *_, answers in own]))
            yield {
                "curve": point.curve, "bits": bits, "task": task, "R": ratio,
                "target": point.store.profile.training.rate_target, "theta": fixed_theta(point.rule),
                "flops": ratio + _routers(point.store), "accuracy": measured.effect,
                "low": measured.low, "high": measured.high, "seeds": measured.seeds,
            }  # fmt: skip


def _routers(store: Measurements) -> float:
    """FLOPs of the routers, relative to those of all decoder layers."""
    flops = efficiency.flops_per_token(shape(store), 1.0, store.profile.routing)
    return flops["routers"] / flops["layers"]


def front(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which points are on the Pareto front, bool [points]: no other is as cheap and as good, and better in
    one of the two. Among points that are equal in both, all are.
    """
    cheaper, better = costs[:, None] <= costs[None, :], values[:, None] >= values[None, :]
    strictly = (costs[:, None] < costs[None, :]) | (values[:, None] > values[None, :])
    return ~(cheaper & better & strictly).any(axis=0)


# Equal FLOPs.


def equal_cost_runs(study: Study, rival: str, bits: int) -> list[Run]:
    """QTALE along θ minus another curve at equal R: one Run per task and seed for which both curves have at
    least two points, averaged over the R that both reach.
    """
    runs, everything = [], [point for point in points(study) if point.compared]
    for task in study.profile.tasks:
        for seed in study.profile.seeds:
            curves = [
                [a for p in everything if p.curve == name and (a := p.answers(task, seed, bits))]
                for name in ("qtale", rival)
            ]
            if all(len(curve) > 1 for curve in curves):
                runs.append(gain_at_equal_ratio(task, seed, *curves))
    return runs


def gains(study: Study) -> pd.DataFrame:
    """One row (GAINS) per bit width, rival and task (and the mean over all): points of accuracy that QTALE
    gains at equal FLOPs, with the 95 % interval over seeds and questions; NaN where no R is in common.
    """
    rows = []
    for bits in study.profile.bits:
        for rival in RIVALS:
            runs = equal_cost_runs(study, rival, bits)
            for task in [*dict.fromkeys(run.task for run in runs), *([ALL] if runs else [])]:
                measured = estimate([run for run in runs if task in (ALL, run.task)])
                numbers = {name: getattr(measured, name, np.nan) for name in GAINS[3:]}
                rows.append({"bits": bits, "rival": rival, "task": task, **numbers})
    return pd.DataFrame(rows, columns=list(GAINS))


# Tables.


def gains_table(study: Study) -> Table:
    """Who wins at equal FLOPs, by how much, how sure: a row per bit width and rival, a column per task."""
    found = gains(study)
    held = found.set_index(["bits", "rival", "task"])
    text = [
        {"bits": str(bits), "QTALE along θ, against": RIVALS[rival],
         **{_label(task): _interval(held, bits, rival, task) for task in _tasks(found)}}
        for bits, rival in found[["bits", "rival"]].drop_duplicates().values
    ]  # fmt: skip
    notes = (
        "Accuracy points that QTALE, trained for R 0.5, gains at equal FLOPs (R; the routers of both cost "
        "the same), averaged over the R that both reach; in brackets the 95 % interval over seeds and "
        "questions, with one seed over questions alone. –: no R in common.",
        "Each curve is linear between its points; R, a mean over all tokens, counts as known.",
    )
    return Table(
        "execution_ratio_gains", f"Who wins at equal FLOPs, study {study.profile.name}",
        pd.DataFrame(text), found, ("bits", "rival", "task"), notes,
    )  # fmt: skip


def front_table(found: pd.DataFrame, study: Study) -> Table:
    """The Pareto front of the mean over all tasks at each bit width; `found`: frame."""
    part = found[found.task == ALL]
    shown = part[part.on_front]
    text = pd.DataFrame({
        "bits": shown.bits.astype(str), "curve": shown.curve.map(CURVES),
        "trained for R": shown.target.map("{:g}".format), "θ": shown.theta.map("{:g}".format),
        "R": shown.R.map(partial(number, digits=3)), "FLOPs": shown.flops.map(partial(number, digits=3)),
        "accuracy [95 %]": [
            f"{number(r.accuracy, 1)} [{number(r.low, 1)}, {number(r.high, 1)}]" for r in shown.itertuples()
        ],
    })  # fmt: skip
    notes = (
        f"Mean over {', '.join(map(_label, study.profile.tasks))}; accuracy in percent. FLOPs: of the layers "
        "and routers, relative to the layers of Full.",
        "Points that no other beats in both. The front takes the highest of many scores that each have an "
        "error: it lies too high, by how much its intervals say. The verdicts choose no point.",
    )
    caption = f"Pareto front, study {study.profile.name}"
    return Table("execution_ratio_front", caption, text, part, ("bits", "curve", "target", "theta"), notes)


def _tasks(found: pd.DataFrame) -> list[str]:
    return [task for task in dict.fromkeys(found.task) if task != ALL] + [ALL]


def _label(task: str) -> str:
    return paper.TASK_LABELS.get(task, task)


def _interval(held: pd.DataFrame, *key: Any) -> str:
    if key not in held.index or pd.isna(held.loc[key, "effect"]):
        return "–"
    row = held.loc[key]
    return f"{number(row.effect, 1, sign=True)} [{number(row.low, 1)}, {number(row.high, 1)}]"


# Claims.


def _claim(rival: str, bits: int, said: dict[str, str]) -> Claim:
    metric = stated().metrics["csqa"]
    return Claim(
        id=f"E {said['id']}, {bits} bits",
        family="execution ratio",
        notebook="08",
        quote=said["quote"],
        source=said["source"],
        measured=f"{bits} bits, equal FLOPs: QTALE along θ − {RIVALS[rival]}, above 0",
        unit=metric.unit,
        runs=_runs(rival, bits),
        smallest=metric.smallest,
        group="csqa",
        low=0.0,
    )


def _runs(rival: str, bits: int) -> Callable[[Study], list[Run]]:
    return lambda study: equal_cost_runs(study, rival, bits)


V3 = {
    "id": "entropy term",
    "quote": "improves accuracy-execution ratio compared to a baseline approach",
    "source": "v3 (second-hand: as a third party words a figure's caption)",
}
FAIR = {
    "id": "trained for R",
    "quote": "redundancy to absorb quantization errors",
    "source": "Sec. 3.3, 3.4; the comparison with D-LLM trained for the same R is ours",
}
SAID = {"dllm": V3, "targets": FAIR}
CLAIMS = tuple(_claim(rival, bits, said) for rival, said in SAID.items() for bits in (16, 4, 3))
