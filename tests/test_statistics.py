"""Effects and verdicts on synthetic data whose answers are known, the false-positive rate included."""

from __future__ import annotations

from math import inf, isnan, nan, sqrt

import numpy as np
import pytest
from scipy import stats

from qtale_lib.measurements import sharing
from qtale_lib.statistics import (
    LEVEL,
    NOT_RUN,
    NOT_SHOWN,
    NOT_TESTABLE,
    SHOWN,
    Case,
    Judgement,
    Run,
    assumed_effect,
    clustered_variance,
    effective_clusters,
    estimate,
    holm,
    judge,
    p_value,
    power_at,
    seeds_needed,
)

TASKS = ("a", "b", "c", "d", "e", "f", "g")


def trials(rng, mean=0.0, tasks=TASKS, seeds=1, questions=80, trial_sd=1.5, question_sd=20.0) -> list[Run]:
    """Runs of a made-up contrast: a fine-tuning's own deviation, and questions that all seeds share."""
    runs = []
    for task in tasks:
        shared = rng.normal(0, question_sd, questions)
        for seed in range(seeds):
            values = mean + rng.normal(0, trial_sd) + shared + rng.normal(0, question_sd / 2, questions)
            runs.append(Run(task, seed, float(values.mean()), values, by_label(np.arange(questions) // 2)))
    return runs


def by_label(*labels):
    """Which questions share one of their labels; one [questions] for each fact of a question."""
    columns = [[f"{place}:{label}" for label in column] for place, column in enumerate(labels)]
    return sharing(tuple(zip(*columns, strict=True)))


def alone(measured, low=0.0, high=inf, paper=None, smallest=1.0) -> Judgement:
    """The judgement of a claim that is a family of its own."""
    (judged,) = judge([Case(measured, low, high, assumed_effect(low, high, paper, smallest))])
    return judged


def word(measured, *arguments, **options) -> str:
    return alone(measured, *arguments, **options).verdict.word


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
    runs = [Run("a", 0, 4.0, few, by_label(range(10))), Run("b", 0, 0.0, many, by_label(range(1000)))]
    assert estimate(runs).effect == 2.0


def test_variance_of_independent_questions_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(0, 3, 400)
    assert clustered_variance(values, by_label(range(400))) == pytest.approx(stats.sem(values) ** 2)


def test_questions_that_share_a_fact_do_not_count_as_independent():
    facts = np.random.default_rng(0).normal(0, 3, 100)
    variance = clustered_variance(np.repeat(facts, 4), by_label(np.arange(400) // 4))
    assert variance == pytest.approx(stats.sem(facts) ** 2)


def test_with_one_fact_a_question_the_variance_is_that_of_a_bootstrap_over_facts():
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 120, 500)
    values = rng.normal(0, 20, 500) + rng.normal(0, 10, 120)[labels]
    sums, sizes = np.bincount(labels, weights=values), np.bincount(labels)
    draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=4000)
    resampled = np.var((draws @ sums) / (draws @ sizes), ddof=1)
    assert clustered_variance(values, by_label(labels)) == pytest.approx(resampled, rel=0.06)


@pytest.mark.parametrize("fact_sd", [0.0, 4.0, 20.0])
def test_questions_of_two_facts_each_shared_with_others_count_as_such(fact_sd):
    """As the second hops of ARC-challenge; a label for each pair of facts sees next to nothing of it."""
    rng, repeats, questions = np.random.default_rng(12), 200, 600
    first, second = rng.integers(0, 250, questions), rng.integers(0, 60, questions)
    crossed, pairs = by_label(first, second), by_label(first * 60 + second)
    sizes = np.concatenate([np.bincount(first), np.bincount(second)])
    truth = (10.0**2 * questions + fact_sd**2 * (sizes**2).sum()) / questions**2
    found, by_pairs = [], []
    for _ in range(repeats):
        values = rng.normal(0, 10, questions)
        values += rng.normal(0, fact_sd, 250)[first] + rng.normal(0, fact_sd, 60)[second]
        found.append(clustered_variance(values, crossed))
        by_pairs.append(clustered_variance(values, pairs))
    assert np.mean(found) == pytest.approx(truth, rel=0.05)
    assert fact_sd == 0 or np.mean(by_pairs) < 0.6 * truth


def test_a_pigeonhole_bootstrap_overstates_the_variance_of_questions_of_two_facts():
    """Which is why there is a formula (docs/statistics.md): its own part counts twice or more."""
    rng, questions, found, resampled = np.random.default_rng(13), 600, [], []
    first, second = rng.integers(0, 250, questions), rng.integers(0, 60, questions)
    crossed = by_label(first, second)
    for _ in range(20):
        values = rng.normal(0, 10, questions)
        found.append(clustered_variance(values, crossed))
        draws = [rng.multinomial(n, np.full(n, 1 / n), size=400) for n in (250, 60)]
        weights = draws[0][:, first] * draws[1][:, second]
        resampled.append(np.var(weights @ values / weights.sum(axis=1), ddof=1))
    truth = 10.0**2 / questions
    assert np.mean(found) == pytest.approx(truth, rel=0.1)
    assert np.mean(resampled) > 2 * truth


def test_equal_clusters_count_by_their_number_and_unequal_ones_for_fewer():
    assert effective_clusters(by_label(np.arange(60) // 3)) == 20
    assert effective_clusters(by_label([0, 0, 0, 1, 2])) == pytest.approx(25 / 11)


def test_one_cluster_says_nothing_and_no_variance_is_negative():
    assert clustered_variance(np.arange(5.0), by_label([0] * 5)) == 0
    crossed, values = by_label("abbcde", "xxyzuv"), np.array([1.0, -2.0, 1.0, 0.0, 0.0, 0.0])
    assert values @ (crossed @ values) == -2
    assert clustered_variance(values, crossed) > 0


@pytest.mark.parametrize(
    ("tasks", "seeds"), [(TASKS, 1), (TASKS[:3], 1), (TASKS, 2), (TASKS, 3), (TASKS[:1], 4)]
)
def test_a_null_effect_is_seldom_shown(tasks, seeds):
    rng, repeats = np.random.default_rng(1), 400
    measured = [estimate(trials(rng, tasks=tasks, seeds=seeds)) for _ in range(repeats)]
    shown = sum(word(m, paper=1.0) == SHOWN for m in measured)
    assert shown / repeats <= 0.05  # 2.5 % is meant
    assert np.mean([m.low <= 0 <= m.high for m in measured]) >= 0.93


@pytest.mark.parametrize(
    ("tasks", "seeds", "trial_sd", "question_sd"),
    [(TASKS, 5, 1.5, 8.0), (TASKS[:4], 3, 1.5, 8.0), (TASKS[:1], 5, 2.0, 0.0), (TASKS[:4], 1, 1.5, 8.0)],
)
def test_the_interval_covers_a_true_effect_95_times_in_100(tasks, seeds, trial_sd, question_sd):
    """Within twice the standard error of 500 repeats, and 2 points more where both errors are counted."""
    rng, repeats = np.random.default_rng(5), 500
    settings = {"mean": 3.0, "tasks": tasks, "seeds": seeds, "trial_sd": trial_sd}
    measured = [estimate(trials(rng, question_sd=question_sd, **settings)) for _ in range(repeats)]
    assert 0.93 <= np.mean([m.low <= 3.0 <= m.high for m in measured]) <= 0.99


def test_a_large_effect_is_shown_and_its_opposite_is_not():
    measured = estimate(trials(np.random.default_rng(2), mean=10.0))
    assert word(measured, paper=1.0) == SHOWN
    assert word(measured, -inf, 0.0, paper=-1.0) == NOT_SHOWN


def test_p_is_that_of_a_t_test_and_agrees_with_the_interval():
    effects = (1.0, 2.0, 4.0, 3.0)
    measured = estimate([Run(task, 0, effect) for task, effect in zip("abcd", effects, strict=True)])
    assert p_value(measured, 0, inf) == pytest.approx(stats.ttest_1samp(effects, 0).pvalue)
    assert p_value(measured, measured.low, inf) == pytest.approx(LEVEL)
    assert p_value(measured, -inf, measured.high) == pytest.approx(LEVEL)
    assert p_value(measured, measured.low, measured.high + 1) == pytest.approx(LEVEL)
    assert p_value(measured, 5, inf) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, nan, 0.03, 0.005]) == pytest.approx([0.03, 0.06, nan, 0.06, 0.02], nan_ok=True)
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_family_of_null_effects_seldom_has_a_single_claim_shown():
    """Uncorrected, at least one of ten is in 1 − 0.975¹⁰ = 22 % of the families."""
    rng, repeats = np.random.default_rng(6), 200
    raw = corrected = 0
    for _ in range(repeats):
        cases = [
            Case(estimate([Run("a", s, e) for s, e in enumerate(rng.normal(size=4))]), 0.0, inf, 1.0)
            for _ in range(10)
        ]
        judged = judge(cases)
        raw += any(j.p < LEVEL for j in judged)
        corrected += any(j.verdict.word == SHOWN for j in judged)
    assert raw / repeats > 0.15 and corrected / repeats < 0.05


def test_what_only_the_uncorrected_interval_shows_is_not_shown():
    measured = estimate([Run("a", s, e) for s, e in enumerate((1.0, 1.6, 0.5, 1.2))])
    assert word(measured) == SHOWN
    unclear, clear, _ = judge([Case(measured, 0.0, inf, assumed) for assumed in (0.5, 9.0, 9.0)])
    assert unclear.p < LEVEL < unclear.corrected == pytest.approx(3 * unclear.p)
    assert unclear.verdict.word == NOT_TESTABLE and unclear.power < 0.8
    assert clear.verdict.word == NOT_SHOWN and clear.power > 0.8
    assert "correction" in clear.verdict.reason


@pytest.mark.parametrize(
    ("effect", "low", "high", "seeds"),
    [(1.0, 0.0, inf, 3), (1.0, 0.0, inf, 8), (-1.5, -inf, 0.0, 5), (0.2, -1.5, 1.5, 10), (0.0, 0.0, inf, 5)],
)
def test_power_is_the_rate_at_which_the_claim_is_shown(effect, low, high, seeds):
    """Against draws of the runs; for two ends the formula is a lower bound, close where it is high."""
    rng, repeats = np.random.default_rng(7), 1500
    draws = rng.normal(effect, 1.0, (repeats, seeds))
    measured = [estimate([Run("a", s, e) for s, e in enumerate(row)]) for row in draws]
    found = np.mean([p_value(m, low, high) < LEVEL for m in measured])
    expected = power_at(effect, low, high, 1 / sqrt(seeds), seeds - 1, LEVEL)
    assert found == pytest.approx(expected, abs=0.035)


def test_the_whole_chains_power_is_its_rate_of_shown():
    """Tasks, seeds, questions on shared facts; spreads estimated from each run, as in use."""
    rng, repeats, settings = np.random.default_rng(8), 250, {"mean": 1.6, "tasks": TASKS[:3], "seeds": 4}
    judged = [alone(estimate(trials(rng, question_sd=6.0, **settings)), smallest=1.6) for _ in range(repeats)]
    found = np.mean([j.verdict.word == SHOWN for j in judged])
    assert found == pytest.approx(np.median([j.power for j in judged]), abs=0.1)


def test_the_seeds_named_give_the_power_and_fewer_do_not():
    pilot = estimate([Run("a", s, e) for s, e in enumerate((-0.7, 1.3, -0.7, 1.3, 0.3))])
    case = Case(pilot, 0.0, inf, 0.7)  # spread over seeds: 1.0
    seeds = int(seeds_needed(case))
    rng, rates = np.random.default_rng(9), []
    for count in (seeds, seeds - 3):
        rows = rng.normal(0.7, 1.0, (2000, count))
        p = stats.ttest_1samp(rows, 0, axis=1, alternative="greater").pvalue
        rates.append(np.mean(p < LEVEL / 2))
    assert rates[0] == pytest.approx(0.80, abs=0.03) and rates[1] < rates[0] - 0.03
    assert seeds_needed(case, LEVEL / 10) > seeds


def test_seeds_cannot_make_up_for_too_few_questions():
    rng = np.random.default_rng(10)
    few = estimate(trials(rng, tasks=("a",), seeds=4, questions=40, trial_sd=0.1))
    many = estimate(trials(rng, tasks=("a",), seeds=4, question_sd=0.1, trial_sd=2.0))
    assert seeds_needed(Case(few, 0.0, inf, 1.0)) == inf
    assert 20 < seeds_needed(Case(many, 0.0, inf, 1.0)) < 200  # (2.8 x 2.0 / 1.0)² = 31, spread as drawn


def test_a_single_number_has_no_interval():
    measured = estimate([Run("a", 0, 3.0)])
    assert measured.effect == 3.0 and np.isnan([measured.low, measured.high]).all()
    judged = alone(measured)
    assert judged.verdict.word == NOT_TESTABLE and judged.power == 0
    assert np.isnan([judged.p, judged.corrected, judged.seeds_needed]).all()


def test_one_fine_tuning_is_never_evidence_about_a_method():
    runs = trials(np.random.default_rng(4), mean=30.0, tasks=("a",))
    decided = alone(estimate(runs), paper=1.0).verdict
    assert decided.word == NOT_TESTABLE and "fine-tunings" in decided.reason


def test_too_small_an_effect_to_detect_is_not_testable_and_a_detectable_one_is_not_shown():
    measured = estimate([Run(t, 0, e) for t, e in zip(TASKS, (-3, 3, -2, 2, -1, 1, 0.1), strict=True)])
    assert word(measured, paper=0.5) == NOT_TESTABLE and alone(measured, paper=0.5).power < 0.8
    assert word(measured, paper=50.0) == NOT_SHOWN and alone(measured, paper=50.0).power > 0.8
    assert word(measured, smallest=0.5) == NOT_TESTABLE  # where the paper prints none, or one out of range
    assert word(measured, smallest=50.0) == word(measured, paper=-1.0, smallest=50.0) == NOT_SHOWN


def test_a_range_with_two_ends():
    measured = estimate([Run(t, 0, e) for t, e in zip("abcd", (1.0, 1.1, 0.9, 1.0), strict=True)])
    assert word(measured, -2, 2) == SHOWN
    assert word(measured, -2, 1) == NOT_SHOWN


def test_identical_answers_are_no_gain():
    same = np.zeros(50)
    measured = estimate([Run(task, 0, 0.0, same, by_label(range(50))) for task in TASKS])
    assert (measured.low, measured.high) == (0.0, 0.0)
    assert word(measured, paper=1.0) == NOT_SHOWN


def test_nothing_run_is_said():
    assert estimate([]) is None
    assert alone(None).verdict.word == NOT_RUN and isnan(alone(None).power)


@pytest.mark.parametrize(
    ("low", "high", "paper", "assumed"),
    [
        (0.0, inf, 2.0, 2.0),
        (0.0, inf, 0.05, 1.0),  # so near to the end that no run could tell
        (0.0, inf, None, 1.0),
        (-inf, 0.0, -0.2, -1.0),
        (-1.0, inf, -0.99, 0.0),
        (-5.0, 5.0, 4.5, 0.0),
        (-5.0, 5.0, 3.0, 3.0),
        (40.0, 56.0, 100 * 0.55, 100 * 0.55),
    ],
)
def test_power_is_taken_at_the_papers_effect_unless_that_lies_at_the_bound(low, high, paper, assumed):
    assert assumed_effect(low, high, paper, smallest=1.0) == assumed
