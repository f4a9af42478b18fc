"""The two-phase search on curves with known answers, and on a routed model."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TOKENIZER, questions, responses, routed_llama, tiny_llama

from qtale_lib import search_threshold
from qtale_lib.adaptive import set_threshold
from qtale_lib.errors import UserError
from qtale_lib.evaluation import evaluate_choices, perplexity

COARSE = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]


def thetas(curve) -> list[float]:
    return [point.theta for point in curve]


def test_the_fine_sweep_surrounds_the_coarse_peak():
    asked = []

    def peak(theta):
        asked.append(theta)
        return 1 - abs(theta - 0.23), 1 - theta

    search = search_threshold(peak, tolerance=0.0)
    assert (search.theta, search.score, search.execution_ratio) == pytest.approx((0.23, 1.0, 0.77))
    assert thetas(search.coarse) == COARSE
    assert thetas(search.fine) == [0.21, 0.22, 0.23, 0.24, 0.25, 0.26, 0.27, 0.28, 0.29]
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 18  # 0.25 is in both curves, evaluated once


def test_ties_go_to_the_cheaper_model():
    search = search_threshold(lambda theta: (0.8, 1 - theta))
    assert search.theta == 0.5 and thetas(search.fine) == [0.46, 0.47, 0.48, 0.49, 0.5]
    step = search_threshold(lambda theta: (0.8 if theta <= 0.32 else 0.7, 1 - theta), tolerance=0.0)
    assert step.theta == 0.32


@pytest.mark.parametrize(("tolerance", "theta"), [(0.0, 0.01), (0.1, 0.15), (0.25, 0.3), (1.0, 0.5)])
def test_tolerance_trades_score_for_a_larger_theta(tolerance, theta):
    falling = search_threshold(lambda theta: (1 - theta, 1 - theta), tolerance=tolerance)
    assert falling.theta == pytest.approx(theta)


def test_perplexity_is_to_be_low_and_its_tolerance_is_a_fraction():
    def ppl(theta):
        return 10 * (1 + max(theta - 0.2, 0)), 1.0

    assert search_threshold(ppl, tolerance=0.0, higher_is_better=False).theta == 0.2
    assert search_threshold(ppl, tolerance=0.08, higher_is_better=False).theta == 0.28


def test_steps_that_do_not_divide_stay_in_the_range():
    search = search_threshold(lambda theta: (theta, 1.0), coarse_step=0.3, fine_step=0.2)
    assert thetas(search.coarse) == [0.2, 0.5] and thetas(search.fine) == [0.3, 0.5]


@given(
    values=st.lists(st.integers(0, 6), min_size=51, max_size=51),
    tolerance=st.sampled_from([0.0, 1.0, 2.0]),
    higher=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_no_larger_theta_seen_would_do(values, tolerance, higher):
    def objective(theta):
        return 1.0 + values[round(theta * 100)], 1 - theta

    search = search_threshold(objective, tolerance=tolerance, higher_is_better=higher)
    seen = {point.theta: point.score for point in (*search.coarse, *search.fine)}
    good = {
        theta
        for theta, score in seen.items()
        if (
            score >= max(seen.values()) - tolerance
            if higher
            else score <= min(seen.values()) * (1 + tolerance)
        )
    }
    assert search.theta == max(good) and search.score == seen[search.theta]
    assert all(0 < theta <= 0.5 for theta in seen)


def test_impossible_steps_and_damaged_models_are_refused():
    with pytest.raises(UserError, match=r"steps 0.01 and 0.05 are not 0 < fine <= coarse <= 0.5"):
        search_threshold(lambda theta: (1.0, 1.0), coarse_step=0.01, fine_step=0.05)
    with pytest.raises(UserError, match=r"score at θ = 0\.05 is not a number"):
        search_threshold(lambda theta: (float("nan"), 1.0))


def test_the_search_result_is_json():
    search = search_threshold(lambda theta: (1 - theta, 1 - theta))
    loaded = json.loads(json.dumps(search.as_dict()))
    assert loaded["coarse"][0] == {"theta": 0.05, "score": 0.95, "execution_ratio": 0.95}
    assert loaded["theta"] == search.theta and loaded["tolerance"] == 0.005


def test_a_model_is_searched_by_its_accuracy_and_left_at_the_result():
    model, rows = routed_llama(), questions(10)
    search = search_threshold(model, TOKENIZER, rows, coarse_step=0.25, fine_step=0.2, batch_size=8)
    left = evaluate_choices(model, TOKENIZER, rows, "arc_easy")
    assert (left["acc"], left["execution_ratio"]) == (search.score, search.execution_ratio)
    for point in (*search.coarse, *search.fine):
        set_threshold(model, point.theta)
        result = evaluate_choices(model, TOKENIZER, rows, "arc_easy")
        assert (result["acc"], result["execution_ratio"]) == (point.score, point.execution_ratio)
    ratios = [point.execution_ratio for point in search.coarse]
    assert ratios[0] > ratios[1]


def test_a_model_is_searched_by_perplexity_where_there_are_no_choices():
    model, rows = routed_llama(), responses(6)
    search = search_threshold(model, TOKENIZER, rows, coarse_step=0.25, fine_step=0.25)
    assert not search.higher_is_better
    assert perplexity(model, TOKENIZER, rows)["ppl"] == search.score
    lowest = min(point.score for point in (*search.coarse, *search.fine))
    assert lowest <= search.score <= lowest * 1.005


def test_a_model_without_routers_has_no_threshold():
    with pytest.raises(UserError, match="no routers"):
        search_threshold(tiny_llama(len(TOKENIZER)), TOKENIZER, questions(2))
