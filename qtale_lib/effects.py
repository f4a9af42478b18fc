"""Effects behind the paper's claims: what each fine-tuning in the run store says about a contrast.

Effects on answers are gains: accuracy points, or percent of perplexity (100 x log PPL, lower PPL is a gain).
`paper_effect` takes the same contrast from the numbers that the paper prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import log, nan

import numpy as np
import pandas as pd

from qtale_lib import jobs, paper
from qtale_lib.measurements import LOWEST_LAYERS, USUAL_RULE, Answers, Cell, Measurements, group_of
from qtale_lib.statistics import Run

Contrast = dict[tuple[str, int, str], float]  # (method, bits, rule that sets theta) -> weight
Probes = dict[str, pd.DataFrame]  # method -> probes of its routed layers in one fine-tuning

COMMON = 0.02  # execution ratios in common below which two methods are not compared at equal ones
EARLY = 0.3  # "the first three epochs of a 10-epoch training" (Sec. 3.1)


# Contrasts of evaluations (Tables 1-4).


def contrast_runs(store: Measurements, contrast: Contrast, group: str, measure: str) -> list[Run]:
    """One Run per task of the group and seed for which every cell of the contrast was evaluated.

    `measure` is "score" (a gain), or "execution_ratio", "loss_ratio", "off_target" (loss-R minus the
    profile's target), all three in points.
    """
    runs = []
    for task, seed in _trials(store, group):
        cells = {(task, method, seed, bits, rule): w for (method, bits, rule), w in contrast.items()}
        if all(cell in store.answers for cell in cells):
            answers = [store.answers[cell] for cell in cells]
            gain = partial(gain_of, task, seed, answers, list(cells.values()))
            runs.append(gain() if measure == "score" else _ratio(store, cells, measure))
    return [run for run in runs if run is not None]


def equal_ratio_runs(store: Measurements, plus: str, minus: str, bits: int, group: str) -> list[Run]:
    """`plus` minus `minus` at equal execution ratio: one Run per task of the group and seed with a θ sweep.

    Each method's score is interpolated linearly over R between the θ evaluated (0.5 and the profile's sweep),
    and the difference averaged over the R that both reach. That is a weighted sum of evaluations; R itself,
    a mean over all tokens, counts as known. Where both reach next to no R, the Run is without an effect.
    """
    runs = []
    for task, seed in _trials(store, group):
        curves = [_curve(store, task, method, seed, bits) for method in (plus, minus)]
        if any(len(curve) < 2 for curve in curves):
            continue  # no sweep
        runs.append(gain_at_equal_ratio(task, seed, *([store.answers[c] for c in curve] for curve in curves)))
    return runs


def gain_at_equal_ratio(task: str, seed: int, plus: Sequence[Answers], minus: Sequence[Answers]) -> Run:
    """One curve minus another on the same questions, given their points, as `equal_ratio_runs` has it."""
    ratios = [np.array([point.execution_ratio for point in curve]) for curve in (plus, minus)]
    weights = equal_ratio_weights(*ratios)
    if weights is None:
        return Run(task, seed, nan)
    gain = gain_of(task, seed, [*plus, *minus], np.concatenate([weights[0], -weights[1]]))
    return replace(gain, ratios=common_ratios(*ratios))


def gain_between(task: str, seed: int, plus: Answers, minus: Answers) -> Run:
    """One evaluation minus another of the same questions, which need not be of one store."""
    return gain_of(task, seed, [plus, minus], [1.0, -1.0])


def _trials(store: Measurements, group: str) -> list[tuple[str, int]]:
    tasks = [task for task in store.profile.tasks if group_of(task) == group]
    return [(task, seed) for task in tasks for seed in store.profile.seeds]


def _curve(store: Measurements, task: str, method: str, seed: int, bits: int) -> list[Cell]:
    """The evaluated cells along θ, but for the searched one, which lies at another place in every run, and
    for θ → 0, whose R of 1 lies far from all others.
    """
    rules = [r for r in jobs.rules(store.profile, method) if r != "zero" and not jobs.is_found(r)]
    cells = [(task, method, seed, bits, rule) for rule in rules]
    return [cell for cell in cells if cell in store.answers]


def common_ratios(plus: np.ndarray, minus: np.ndarray) -> tuple[float, float]:
    """The lowest and highest ratio that two curves both reach, given the ratios of their points [points]."""
    return float(max(plus.min(), minus.min())), float(min(plus.max(), minus.max()))


def equal_ratio_weights(plus: np.ndarray, minus: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Weights on the points of two curves, given their ratios [points], that average each curve, linearly
    interpolated, over the ratios that both reach; None if these are fewer than COMMON.
    """
    low, high = common_ratios(plus, minus)
    if high - low < COMMON:
        return None
    at = low + (high - low) * (np.arange(1000) + 0.5) / 1000
    return _mean_weights(plus, at), _mean_weights(minus, at)


def _mean_weights(ratios: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Weights [points] that give the mean of a curve, linear between its points, over the places `at`."""
    order = np.argsort(ratios, kind="stable")
    weights = np.empty(len(ratios))
    weights[order] = [np.interp(at, ratios[order], unit).mean() for unit in np.eye(len(ratios))]
    return weights


def gain_of(task: str, seed: int, answers: Sequence[Answers], weights: Sequence[float]) -> Run:
    """A weighted sum of scores of one task and seed, on the same questions."""
    shares = [answer.scores * answer.weights / answer.weights.mean() for answer in answers]
    gains = gain_sign(group_of(task)) * np.dot(list(weights), shares)
    return Run(task, seed, float(gains.mean()), gains, answers[0].shared)


def _ratio(store: Measurements, weights: dict[Cell, float], measure: str) -> Run | None:
    task, _, seed, *_ = next(iter(weights))
    name, target = (
        ("loss_ratio", store.profile.training.rate_target) if measure == "off_target" else (measure, 0.0)
    )
    values = [getattr(store.answers[cell], name) for cell in weights]
    if None in values:
        return None
    return Run(task, seed, 100 * float(np.dot(list(weights.values()), np.array(values) - target)))


def gain_sign(group: str) -> float:
    """Of a gain in a group's score: a fall of PPL is one."""
    return -1.0 if group == "alpaca" else 1.0


def paper_rule(method: str, bits: int) -> str:
    """How Tables 1-3 of the paper set theta: QTALE's is searched once the model is quantized."""
    return "searched" if method == "qtale" and bits < 16 else USUAL_RULE[method]


def paper_effect(contrast: Contrast, group: str, measure: str) -> float | None:
    """The contrast in the paper's tables, mean over its two models; None where a cell is not printed."""
    keys = [[(measure, model, group, *cell) for cell in contrast] for model in paper.MODELS.values()]
    if not all(key in _printed() for row in keys for key in row):
        return None
    values = [np.dot(list(contrast.values()), [_printed()[key] for key in row]) for row in keys]
    return (gain_sign(group) if measure == "score" else 100.0) * float(np.mean(values))


@lru_cache(maxsize=1)
def _printed() -> dict[tuple, float]:
    """What the paper prints, keyed (measure, model, group, method, bits, rule); PPL as 100 x log PPL."""
    found: dict[tuple, float] = {}
    names = {"avg": "csqa", "mmlu": "mmlu", "alpaca_ppl": "alpaca"}
    for row in paper.accuracy().query("task in @names").itertuples():
        cell = (names[row.task], row.method, row.bits, paper_rule(row.method, row.bits))
        found["score", row.model, *cell] = _score(names[row.task], row.value)
    for row in paper.efficiency().itertuples():
        cell = (row.task, row.method, row.bits, paper_rule(row.method, row.bits))
        found["execution_ratio", row.model, *cell] = row.relative
    for row in paper.ablation().itertuples():
        method = "qtale" if row.entropy_loss == "yes" else "dllm"
        cell = (row.model, row.task, method, 4, "argmax" if row.theta == "0.5" else "searched")
        found["score", *cell] = _score(row.task, row.value)
        found["execution_ratio", *cell] = row.execution_ratio
    return found


def _score(group: str, value: float) -> float:
    return 100 * log(value) if group == "alpaca" else value


# Probes of the routers (Figures 2, 3, 5-7).


def probe_runs(store: Measurements, effect: Callable[[Probes], float], methods: tuple[str, ...]) -> list[Run]:
    """`effect` of every commonsense fine-tuning for which all `methods` were probed before and after."""
    frame = store.layers[store.layers.flip_expected.notna()]
    runs = []
    for (task, seed), part in frame.groupby(["task", "seed"]):
        probes = {method: part[part.method == method] for method in methods}
        if group_of(task) == "csqa" and all(probe.epoch.nunique() > 1 for probe in probes.values()):
            runs.append(Run(task, int(seed), float(effect(probes))))
    return runs


def _course(probe: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """Mean over a method's own three lowest layers: before training, after 3/10 of it, at its end.

    Shares come in percent. The layers are each method's own: those that D-LLM's outcome picks would favour a
    difference between the methods even where there is none.
    """
    final = probe[probe.epoch == probe.epoch.max()]
    lowest = final.nsmallest(LOWEST_LAYERS, "ratio").layer
    means = probe[probe.layer.isin(lowest)].groupby("epoch")[column].mean()
    means *= 1.0 if column.endswith("gap") else 100.0
    early = np.abs(means.index - EARLY * means.index.max()).argmin()
    return means.iloc[0], means.iloc[early], means.iloc[-1]


def at_end(column: str) -> Callable[[Probes], float]:
    """D-LLM's lowest layers at the last epoch."""
    return lambda probes: _course(probes["dllm"], column)[2]


def change(column: str) -> Callable[[Probes], float]:
    """D-LLM's lowest layers: last epoch minus epoch 0."""

    def effect(probes: Probes) -> float:
        start, _, end = _course(probes["dllm"], column)
        return end - start

    return effect


def early_fall(column: str) -> Callable[[Probes], float]:
    """D-LLM's lowest layers: fall in the first 3/10 of training minus the fall after it."""

    def effect(probes: Probes) -> float:
        start, early, end = _course(probes["dllm"], column)
        return (start - early) - (early - end)

    return effect


def difference(column: str) -> Callable[[Probes], float]:
    """QTALE's lowest layers minus D-LLM's lowest layers at the last epoch."""
    return lambda probes: _course(probes["qtale"], column)[2] - _course(probes["dllm"], column)[2]


# How unevenly the layers take part (Fig. 2): measures of the routed layers' ratios at the last epoch.


def deviation(ratios: np.ndarray) -> float:
    """Standard deviation over layers, in points. ratios [layers]: shares of the tokens routed."""
    return 100 * float(np.std(ratios, ddof=1))


def gini(ratios: np.ndarray) -> float:
    """Gini coefficient of the layers' ratios [layers]: 0 if all are alike, near 1 if one layer runs alone."""
    ordered, count = np.sort(ratios), len(ratios)
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return float(ranks @ ordered / (count * ordered.sum())) if ordered.sum() else 0.0


def evenness(ratios: np.ndarray) -> float:
    """Entropy of the layers' shares of all execution over its maximum, the log of their number: 1 is even."""
    shares = ratios[ratios > 0] / ratios.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(ratios))) if len(shares) else 1.0


def over_layers(
    measure: Callable[[np.ndarray], float], weights: dict[str, float]
) -> Callable[[Probes], float]:
    """A measure of the routed layers' ratios at the last epoch, summed over methods with weights."""

    def effect(probes: Probes) -> float:
        return sum(weight * measure(_final_ratios(probes[method])) for method, weight in weights.items())

    return effect


def _final_ratios(probe: pd.DataFrame) -> np.ndarray:
    return probe[probe.epoch == probe.epoch.max()].routed_ratio.to_numpy()
