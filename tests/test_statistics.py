"""Effects and verdicts on synthetic data whose answers are known, the false-positive rate included."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
import pytest
from scipy import stats

from qtale_lib.statistics import (
    NOT_SHOWN,
    NOT_TESTABLE,
    SHOWN,
    Run,
    bootstrap_variance,
    estimate,
    verdict,
)

TASKS = ("a", "b", "c", "d", "e", "f", "g")


def trials(rng, mean=0.0, tasks=TASKS, seeds=1, questions=80, trial_sd=1.5, question_sd=20.0) -> list[Run]:
    """Runs of a made-up contrast: a fine-tuning's own deviation, and questions that all seeds share."""
    runs = []
    for task in tasks:
        shared = rng.normal(0, question_sd, questions)
        for seed in range(seeds):
            values = mean + rng.normal(0, trial_sd) + shared + rng.normal(0, question_sd / 2, questions)
            runs.append(Run(task, seed, float(values.mean()), values, np.arange(questions) // 2))
    return runs


def test_one_seed_over_tasks_is_the_t_interval_over_tasks():
    runs = [Run(task, 0, effect) for task, effect in zip("abcd", (1.0, 2.0, 4.0, 3.0), strict=True)]
    measured = estimate(runs)
    low, high = stats.t.interval(0.95, 3, loc=2.5, scale=stats.sem([1.0, 2.0, 4.0, 3.0]))
    assert (measured.low, measured.high) == pytest.approx((low, high))
    assert (measured.tasks, measured.seeds, measured.trial) == (4, 1, "tasks")


def test_one_task_over_seeds_is_the_t_interval_over_seeds():
    measured = estimate([Run("a", seed, effect) for seed, effect in enumerate((1.0, 2.0, 4.0))])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (measured.low, measured.high, measured.trial) == (pytest.approx(low), pytest.approx(high), "seeds")


def test_tasks_weigh_alike_whatever_their_questions():
    few, many = np.full(10, 4.0), np.full(1000, 0.0)
    runs = [Run("a", 0, 4.0, few, np.arange(10)), Run("b", 0, 0.0, many, np.arange(1000))]
    assert estimate(runs).effect == 2.0


def test_bootstrap_variance_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0, 3, 400)
    assert sqrt(bootstrap_variance(values, np.arange(400))) == pytest.approx(3 / 20, rel=0.15)


def test_questions_that_share_a_fact_do_not_count_as_independent():
    values = np.repeat(np.random.default_rng(0).normal(0, 3, 100), 4)
    apart, together = np.arange(400), np.arange(400) // 4
    assert bootstrap_variance(values, together) == pytest.approx(
        4 * bootstrap_variance(values, apart), rel=0.3
    )


@pytest.mark.parametrize(
    ("tasks", "seeds"), [(TASKS, 1), (TASKS[:3], 1), (TASKS, 2), (TASKS, 3), (TASKS[:1], 4)]
)
def test_a_null_effect_is_seldom_shown(tasks, seeds):
    rng, repeats = np.random.default_rng(1), 400
    measured = [estimate(trials(rng, tasks=tasks, seeds=seeds)) for _ in range(repeats)]
    shown = sum(verdict(m, 0, inf, paper=1.0).word == SHOWN for m in measured)
    assert shown / repeats <= 0.05  # 2.5 % is meant
    assert np.mean([m.low <= 0 <= m.high for m in measured]) >= 0.93


def test_a_large_effect_is_shown_and_its_opposite_is_not():
    measured = estimate(trials(np.random.default_rng(2), mean=10.0))
    assert verdict(measured, 0, inf, paper=1.0).word == SHOWN
    assert verdict(measured, -inf, 0, paper=-1.0).word == NOT_SHOWN


def test_detectable_effect_is_found_with_the_stated_power():
    rng, repeats = np.random.default_rng(3), 300
    size = np.mean([estimate(trials(rng)).detectable for _ in range(repeats)])
    found = [verdict(estimate(trials(rng, mean=size)), 0, inf).word == SHOWN for _ in range(repeats)]
    assert 0.70 <= np.mean(found) <= 0.93


def test_a_single_number_has_no_interval():
    measured = estimate([Run("a", 0, 3.0)])
    assert measured.effect == 3.0 and np.isnan([measured.low, measured.high, measured.detectable]).all()
    assert verdict(measured, 0, inf).word == NOT_TESTABLE


def test_one_fine_tuning_is_never_evidence_about_a_method():
    runs = trials(np.random.default_rng(4), mean=30.0, tasks=("a",))
    decided = verdict(estimate(runs), 0, inf, paper=1.0)
    assert decided.word == NOT_TESTABLE and "fine-tunings" in decided.reason


def test_too_small_an_effect_to_detect_is_not_testable_and_a_detectable_one_is_not_shown():
    measured = estimate([Run(t, 0, e) for t, e in zip(TASKS, (-3, 3, -2, 2, -1, 1, 0.1), strict=True)])
    assert verdict(measured, 0, inf, paper=0.5).word == NOT_TESTABLE
    assert verdict(measured, 0, inf, paper=50.0).word == NOT_SHOWN
    assert verdict(measured, 0, inf, paper=None).word == NOT_SHOWN


def test_a_range_with_two_ends():
    measured = estimate([Run(t, 0, e) for t, e in zip("abcd", (1.0, 1.1, 0.9, 1.0), strict=True)])
    assert verdict(measured, -2, 2).word == SHOWN
    assert verdict(measured, -2, 1).word == NOT_SHOWN


def test_identical_answers_are_no_gain():
    same = np.zeros(50)
    measured = estimate([Run(task, 0, 0.0, same, np.arange(50)) for task in TASKS])
    assert (measured.low, measured.high) == (0.0, 0.0)
    assert verdict(measured, 0, inf, paper=1.0).word == NOT_SHOWN


def test_nothing_run_is_said():
    assert estimate([]) is None
    assert verdict(None, 0, inf).reason == "not run in this profile"
