"""Effects, intervals and verdicts: how a claim of the paper is held against what was measured.

Two errors are kept apart. *Sampling error* comes from the questions asked: a paired bootstrap over facts
(questions that share a fact move together). *Trial error* comes from the fine-tunings: the spread over seeds
or, with one seed, over tasks, since each task is a fine-tuning of its own. An interval that knows only the
first is no evidence about a training method, so a verdict needs repeated trials.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import nan, sqrt

import numpy as np
from scipy.stats import t as student

SHOWN, NOT_SHOWN, NOT_TESTABLE = "shown", "not shown", "not testable here"
CONFIDENCE, POWER = 0.95, 0.80
MINIMAL_TASKS = 3
RULE = (
    "Shown: the 95 % interval lies wholly within the claimed range. Not testable here: nothing was run for "
    f"it, the fine-tunings are too few to know their spread (fewer than 2 seeds and than {MINIMAL_TASKS} "
    "tasks), or the interval reaches out of the claimed range while the smallest effect found with "
    f"{POWER:.0%} power exceeds the one that the paper prints (where it prints none, the range alone "
    "decides). Otherwise: not shown."
)


@dataclass(frozen=True)
class Run:
    """What one fine-tuning (task, seed) says about a contrast.

    `differences` [questions] averages to `effect`; `clusters` [questions] labels questions that share facts.
    Both are None for measurements that are not averages over test questions.
    """

    task: str
    seed: int
    effect: float
    differences: np.ndarray | None = None
    clusters: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks (each a mean over seeds), its 95 % interval, and what repeats the trial.

    Interval, errors and detectable effect are NaN where neither trials nor questions are repeated.
    """

    effect: float
    low: float
    high: float
    standard_error: float
    sampling_error: float
    detectable: float
    tasks: int
    seeds: int
    questions: int
    trial: str | None


@dataclass(frozen=True)
class Verdict:
    """One of SHOWN, NOT_SHOWN, NOT_TESTABLE, and the reason in a few words."""

    word: str
    reason: str


def bootstrap_variance(differences: np.ndarray, clusters: np.ndarray, resamples: int = 1000) -> float:
    """Variance of the mean of `differences` [questions] when whole clusters are drawn with replacement."""
    _, labels = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(labels, weights=differences), np.bincount(labels)
    count = len(sums)
    if count < 2:
        return 0.0
    draws = _draws(count, resamples)
    return float(np.var((draws @ sums) / (draws @ sizes), ddof=1))


@lru_cache(maxsize=16)
def _draws(count: int, resamples: int) -> np.ndarray:
    """How often each of `count` clusters is drawn, [resamples, count]; the same on every call."""
    chances = np.full(count, 1 / count)
    return np.random.default_rng(0).multinomial(count, chances, size=resamples).astype(np.float64)


def estimate(runs: list[Run]) -> Estimate | None:
    """The mean effect with its interval, by the rule of the module's first paragraph; None without runs."""
    if not runs:
        return None
    by_task = defaultdict(list)
    for run in runs:
        by_task[run.task].append(run)
    effects = np.array([np.mean([run.effect for run in group]) for group in by_task.values()])
    sampling = [_sampling_part(group, len(by_task)) for group in by_task.values()]
    parts, trial = _trial_parts(by_task, effects, sampling)
    (error, freedom), effect = _error(parts), float(effects.mean())
    if trial is None and runs[0].differences is None:
        error = nan
    margin = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    return Estimate(
        effect=effect,
        low=effect - margin,
        high=effect + margin,
        standard_error=error,
        sampling_error=sqrt(sum(variance for variance, _ in sampling)),
        detectable=margin + float(student.ppf(POWER, freedom)) * error,
        tasks=len(by_task),
        seeds=min(len(group) for group in by_task.values()),
        questions=sum(_questions(group) for group in by_task.values()),
        trial=trial,
    )


def _questions(group: list[Run]) -> int:
    return 0 if group[0].differences is None else len(group[0].differences)


def _sampling_part(group: list[Run], tasks: int) -> tuple[float, int]:
    """One task's share of the variance from questions, and its degrees of freedom.

    The seeds of a task answer the same questions, so their differences are averaged before the bootstrap.
    """
    if group[0].differences is None:
        return 0.0, 1
    mean = np.mean([run.differences for run in group], axis=0)
    return bootstrap_variance(mean, group[0].clusters) / tasks**2, max(len(set(group[0].clusters)) - 1, 1)


def _trial_parts(by_task: dict, effects: np.ndarray, sampling: list) -> tuple[list, str | None]:
    """Parts (variance, degrees of freedom) of the effect's variance, and where the trial error comes from."""
    count = len(by_task)
    if all(len(group) > 1 for group in by_task.values()):
        spreads = [np.array([run.effect for run in group]) for group in by_task.values()]
        seeds = [(float(np.var(s, ddof=1)) / len(s) / count**2, len(s) - 1) for s in spreads]
        return [*sampling, *seeds], "seeds"
    if count >= MINIMAL_TASKS:
        # the spread over tasks holds the sampling error already: tasks differ in their questions
        between = float(np.var(effects, ddof=1)) / count
        wider = between >= sum(variance for variance, _ in sampling)
        return ([(between, count - 1)] if wider else sampling), "tasks"
    return sampling, None


def _error(parts: list[tuple[float, int]]) -> tuple[float, float]:
    """Standard error and degrees of freedom (Welch and Satterthwaite) of a sum of independent parts."""
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0, 1.0
    return sqrt(variance), variance**2 / sum(part**2 / freedom for part, freedom in parts)


def depth(value: float, low: float, high: float) -> float:
    """How far `value` lies inside the range (low, high): distance to the nearest bound, negative outside."""
    return min(value - low, high - value)


def verdict(measured: Estimate | None, low: float, high: float, paper: float | None = None) -> Verdict:
    """RULE applied to the claim that an effect lies in the range (low, high); `paper` prints that effect."""
    if measured is None:
        return Verdict(NOT_TESTABLE, "not run in this profile")
    if measured.trial is None:
        return Verdict(NOT_TESTABLE, "too few fine-tunings to know their spread")
    if depth(measured.low, low, high) > 0 and depth(measured.high, low, high) > 0:
        return Verdict(SHOWN, "the interval lies within the claimed range")
    if measured.high <= low or measured.low >= high:
        return Verdict(NOT_SHOWN, "the interval lies wholly outside the claimed range")
    printed = depth(paper, low, high) if paper is not None else 0.0
    if 0 < printed < measured.detectable:
        reason = f"detectable {measured.detectable:.2g} exceeds the paper's {printed:.2g}"
        return Verdict(NOT_TESTABLE, f"too few seeds or questions: {reason}")
    return Verdict(NOT_SHOWN, "the interval reaches out of the claimed range")
