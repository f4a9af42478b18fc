"""Effects, intervals, power and verdicts: how a claim of the paper is held against what was measured.

Two errors are kept apart. *Sampling error* comes from the questions asked: a cluster-robust variance of the
paired differences (questions that share a fact move together). *Trial error* comes from the fine-tunings: the
spread over seeds or, with one seed, over tasks, since each task is a fine-tuning of its own. An interval that
knows only the first is no evidence about a training method, so a verdict needs repeated trials.

Claims come in families, stated before the data; within one, p-values are corrected by Holm's method. A claim
that is not shown may be false, or the run too small to tell: power says which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isinf, isnan, nan, sqrt
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import nct as noncentral
from scipy.stats import t as student

SHOWN, NOT_SHOWN, NOT_TESTABLE = "shown", "not shown", "not testable here"
NOT_RUN = "not run"
LEVEL, POWER = 0.05, 0.80
MINIMAL_TASKS = 3
MOST_SEEDS = 10_000
RULE = (
    "p: two-sided, below 5 % exactly where the 95 % interval lies within the claimed range; then corrected "
    "by Holm's method over the claims of the family that were run. Power: the chance to show the claim if "
    "the effect were the one that the paper prints (where it prints none that lies within the range by the "
    "smallest effect of interest: that effect; in a range of two ends: its middle), given the spreads "
    "measured, at 5 % over the number of those claims; 0 with fewer than 2 seeds and than "
    f"{MINIMAL_TASKS} tasks, where the spread of fine-tunings is unknown, and where the methods share "
    f"no execution ratio. Seeds for {POWER:.0%}: how many a task would give that power. Shown: "
    f"corrected p below 5 %. Not testable here: not shown, power below {POWER:.0%}, and the interval not "
    "wholly outside the range. Otherwise: not shown."
)


@dataclass(frozen=True)
class Run:
    """What one fine-tuning (task, seed) says about a contrast.

    `differences` [questions] averages to `effect`; `shared` [questions, questions] is 1 where two questions
    share a fact, and 0 elsewhere. Both are None for measurements that are not averages over test questions.
    `ratios`: the lowest and highest execution ratio of a comparison at equal ones; if there are none in
    common, `effect` is NaN.
    """

    task: str
    seed: int
    effect: float
    differences: np.ndarray | None = None
    shared: csr_array | None = None
    ratios: tuple[float, float] = (nan, nan)


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks (each a mean over seeds), its 95 % interval, and what repeats the trial.

    standard_error, freedom: of the mean, by Welch and Satterthwaite; sampling_error: the questions' part.
    trial_variance: what the fine-tunings would add to the mean's variance with one seed a task.
    trial_freedom: degrees of freedom that each seed beyond a task's first adds to it.
    ratio_low, ratio_high: the lowest and highest execution ratio of a comparison at equal ones, else NaN.
    Interval and errors are NaN where neither trials nor questions are repeated.
    """

    effect: float
    low: float
    high: float
    standard_error: float
    freedom: float
    sampling_error: float
    sampling_freedom: float
    trial_variance: float
    trial_freedom: float
    tasks: int
    seeds: int
    runs: int
    questions: int
    ratio_low: float
    ratio_high: float
    trial: str | None


@dataclass(frozen=True)
class Case:
    """A claim and its data: an effect in the range (low, high); `assumed`, an effect within, is for power.

    `made`: how many runs there were to measure it in, those without an effect included.
    """

    measured: Estimate | None
    low: float
    high: float
    assumed: float
    made: int = 0


@dataclass(frozen=True)
class Verdict:
    """One of SHOWN, NOT_SHOWN, NOT_TESTABLE, NOT_RUN, and the reason in a few words."""

    word: str
    reason: str


@dataclass(frozen=True)
class Judgement:
    """p, p corrected over the family, power at the assumed effect, seeds a task for 80 %, and the verdict.

    seeds_needed is inf where the questions' part of the error alone is too large. What cannot be said is NaN.
    """

    p: float
    corrected: float
    power: float
    seeds_needed: float
    verdict: Verdict


class _Part(NamedTuple):
    """A variance and its degrees of freedom."""

    variance: float
    freedom: float


def clustered_variance(differences: np.ndarray, shared: csr_array) -> float:
    """Variance of the mean of `differences` [questions], where questions that share a fact move together.

    shared [questions, questions]: 1 where two questions share a fact, a question with itself among them. The
    sum over all such pairs: with one fact a question the one-way cluster-robust variance, which a bootstrap
    of clusters estimates too; with several the multiway one (Cameron, Gelbach and Miller 2011; for pairs
    Aronow, Samii and Assenova 2015). Unbiased where questions are independent; 0 where all are one cluster.
    """
    # No pigeonhole bootstrap (Owen 2007), which weighs a question by the product of its facts' draws: what
    # questions of two facts vary by on their own, most of their variance here, would count three times.
    residuals = differences - differences.mean()
    total = residuals @ (shared @ residuals)
    if total < 0:  # as may be in small samples whose facts are crossed
        total = residuals @ residuals
    clusters = effective_clusters(shared)
    return float(total) / len(residuals) ** 2 * clusters / (clusters - 1) if clusters > 1 else 0.0


def effective_clusters(shared: csr_array) -> float:
    """How many clusters of equal size hold as many pairs of questions as `shared` does (Kish 1965).

    One less is the degrees of freedom of clustered_variance, where questions are independent.
    """
    return shared.shape[0] ** 2 / shared.sum()


def estimate(runs: list[Run]) -> Estimate | None:
    """The mean effect with its interval, by the rule of the module's first paragraph; None without one."""
    by_task = _with_effect(runs)
    if not by_task:
        return None
    used = [run for group in by_task.values() for run in group]
    effects = np.array([np.mean([run.effect for run in group]) for group in by_task.values()])
    sampling = _sum([_sampling_part(group, len(by_task)) for group in by_task.values()])
    total, single, trial = _trial_parts(by_task, effects, sampling)
    error, effect = sqrt(total.variance), float(effects.mean())
    if trial is None and used[0].differences is None:
        error = nan
    margin = float(student.ppf(1 - LEVEL / 2, total.freedom)) * error
    return Estimate(
        effect=effect,
        low=effect - margin,
        high=effect + margin,
        standard_error=error,
        freedom=total.freedom,
        sampling_error=sqrt(sampling.variance),
        sampling_freedom=sampling.freedom,
        trial_variance=single.variance,
        trial_freedom=single.freedom,
        tasks=len(by_task),
        seeds=min(len(group) for group in by_task.values()),
        runs=len(used),
        questions=sum(_questions(group) for group in by_task.values()),
        ratio_low=min(run.ratios[0] for run in used),
        ratio_high=max(run.ratios[1] for run in used),
        trial=trial,
    )


def _with_effect(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs that have an effect, by task.

    A task of several seeds is left out whole where fewer than two are left: its spread over seeds would be
    unknown, and with it that of all tasks.
    """
    by_task = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    left = {task: [run for run in group if not isnan(run.effect)] for task, group in by_task.items()}
    return {task: group for task, group in left.items() if len(group) >= min(2, len(by_task[task]))}


def _questions(group: list[Run]) -> int:
    return 0 if group[0].differences is None else len(group[0].differences)


def _sum(parts: Sequence[_Part]) -> _Part:
    """The sum of independent parts (Welch and Satterthwaite)."""
    variance = sum(part.variance for part in parts)
    if variance == 0:
        return _Part(0.0, 1.0)
    return _Part(variance, variance**2 / sum(part.variance**2 / part.freedom for part in parts))


def _sampling_part(group: list[Run], tasks: int) -> _Part:
    """One task's share of the variance from questions.

    The seeds of a task answer the same questions, so their differences are averaged first.
    """
    if group[0].differences is None:
        return _Part(0.0, 1.0)
    mean = np.mean([run.differences for run in group], axis=0)
    variance = clustered_variance(mean, group[0].shared) / tasks**2
    return _Part(variance, max(effective_clusters(group[0].shared) - 1, 1))


def _trial_parts(by_task: dict, effects: np.ndarray, sampling: _Part) -> tuple[_Part, _Part, str | None]:
    """The mean's variance, the trial part of it for one seed a task, and where the trial error comes from."""
    count = len(by_task)
    if all(len(group) > 1 for group in by_task.values()):
        spreads = [np.var([run.effect for run in group], ddof=1) / count**2 for group in by_task.values()]
        seeds = [len(group) for group in by_task.values()]
        parts = [_Part(float(v) / n, n - 1) for v, n in zip(spreads, seeds, strict=True)]
        return _sum([sampling, *parts]), _sum([_Part(float(v), 1) for v in spreads]), "seeds"
    if count >= MINIMAL_TASKS:
        # the spread over tasks holds the sampling error already: tasks differ in their questions
        between = _Part(float(np.var(effects, ddof=1)) / count, count - 1)
        total = between if between.variance >= sampling.variance else sampling
        return total, _Part(total.variance - sampling.variance, count), "tasks"
    return sampling, _Part(nan, nan), None


def assumed_effect(low: float, high: float, paper: float | None, smallest: float) -> float:
    """The effect at which power is computed: the paper's if it lies in the range (low, high), at least the
    smallest effect of interest away from its ends, for nearer to them no run has power; else, within a range
    of two ends their middle, and of one end the smallest effect of interest beyond it.
    """
    slack = 1e-9  # a printed 0.55 is 55.00000000000001 %
    if paper is not None and low + smallest - slack <= paper <= high - smallest + slack:
        return paper
    if isinf(high):
        return low + smallest
    return high - smallest if isinf(low) else (low + high) / 2


def p_value(measured: Estimate | None, low: float, high: float) -> float:
    """Two-sided p of "the effect lies outside the range (low, high)"; NaN without repeated trials.

    Twice the larger of the one-sided p at the two ends, so that p < 5 % says that the 95 % interval lies
    within the range.
    """
    if measured is None or measured.trial is None:
        return nan
    nearest = min(measured.effect - low, high - measured.effect)
    if measured.standard_error == 0:
        return 0.0 if nearest > 0 else 1.0
    return min(1.0, 2 * float(student.sf(nearest / measured.standard_error, measured.freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given; NaN stays and does not count."""
    known = sorted((p, index) for index, p in enumerate(p_values) if not isnan(p))
    corrected, largest = [nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def power_at(effect: float, low: float, high: float, error: float, freedom: float, level: float) -> float:
    """The chance that the (1 − level) interval lies within (low, high) if the true effect is `effect`.

    By the noncentral t; with two ends the lower bound of Bonferroni.
    """
    if error == 0:
        return float(low < effect < high)
    needed = student.ppf(1 - level / 2, freedom)
    depths = [depth for depth in (effect - low, high - effect) if not isinf(depth)]
    missed = sum(float(noncentral.cdf(needed, freedom, depth / error)) for depth in depths)
    return 1.0 if isnan(missed) else max(0.0, 1.0 - missed)  # scipy gives NaN far out, where it is next to 0


def _power_with(seeds: float, case: Case, level: float) -> float:
    """Power of the case's claim with so many seeds a task, at least 2, and the same questions."""
    measured = case.measured
    sampling = _Part(measured.sampling_error**2, measured.sampling_freedom)
    trial = _Part(measured.trial_variance / seeds, measured.trial_freedom * (seeds - 1))
    total = sampling if isinf(seeds) else _sum([sampling, trial])
    return power_at(case.assumed, case.low, case.high, sqrt(total.variance), total.freedom, level)


def seeds_needed(case: Case, level: float = LEVEL) -> float:
    """The fewest seeds a task that give the claim 80 % power at its assumed effect, with the same questions.

    inf if even MOST_SEEDS do not; NaN where the spread of fine-tunings is unknown. With one seed
    that spread is taken from what the spread over tasks holds beyond sampling error: too much, if anything.
    """
    if case.measured is None or case.measured.trial is None:
        return nan
    if _power_with(MOST_SEEDS, case, level) < POWER:
        return inf
    few, enough = 1, MOST_SEEDS
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if _power_with(middle, case, level) >= POWER else (middle, enough)
    return float(enough)


def judge(family: Sequence[Case]) -> list[Judgement]:
    """RULE applied to the claims of one family."""
    raw = [p_value(case.measured, case.low, case.high) for case in family]
    level = LEVEL / max(sum(not isnan(p) for p in raw), 1)
    return [
        _judged(case, p, corrected, level) for case, p, corrected in zip(family, raw, holm(raw), strict=True)
    ]


def _judged(case: Case, p: float, corrected: float, level: float) -> Judgement:
    power, measured = _power(case, level), case.measured
    decided = _verdict(case, p, corrected, power)
    return Judgement(p, corrected, power, nan if measured is None else seeds_needed(case, level), decided)


def _power(case: Case, level: float) -> float:
    measured = case.measured
    if measured is None:
        return 0.0 if case.made else nan
    if measured.trial is None:
        return 0.0
    error, freedom = measured.standard_error, measured.freedom
    return power_at(case.assumed, case.low, case.high, error, freedom, level)


def _verdict(case: Case, p: float, corrected: float, power: float) -> Verdict:
    measured = case.measured
    if measured is None and case.made:
        return Verdict(NOT_TESTABLE, "too few runs with an execution ratio in common")
    if measured is None:
        return Verdict(NOT_RUN, "no part of this profile")
    if measured.trial is None:
        return Verdict(NOT_TESTABLE, "too few fine-tunings to know their spread")
    if corrected < LEVEL:
        return Verdict(SHOWN, "the interval lies within the claimed range")
    if measured.high <= case.low or measured.low >= case.high:
        return Verdict(NOT_SHOWN, "the interval lies wholly outside the claimed range")
    place = "lies within the claimed range but for the correction"
    place = place if p < LEVEL else "reaches out of the claimed range"
    return Verdict(NOT_TESTABLE if power < POWER else NOT_SHOWN, f"the interval {place}; power {power:.0%}")
