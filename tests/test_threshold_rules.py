"""θ without a grid: closed forms against their definition, and on a routed model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import TOKENIZER, questions, routed_llama

from qtale_lib import threshold_rules
from qtale_lib.adaptive import routing_state, set_threshold
from qtale_lib.efficiency import LLAMA32_1B, flops_per_token
from qtale_lib.errors import UserError
from qtale_lib.evaluation import evaluate_choices
from qtale_lib.routed_layers import RouterConfig
from qtale_lib.routing import threshold_shift

gaps = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40, unique=True)
shares = st.floats(0, 1)


@given(st.floats(-600, 25))
def test_theta_is_where_a_gap_just_executes(gap):
    theta = threshold_rules.theta_at(gap)
    assert 0 < theta < 1 and threshold_shift(theta) == pytest.approx(gap, rel=1e-6, abs=1e-3)


@given(gaps, shares)
def test_the_share_that_is_asked_for_executes(values, share):
    found = np.array(values)
    theta = threshold_rules.theta_for_share(found, share)
    executed = np.mean(found >= threshold_shift(theta))
    apart = np.diff(np.sort(found)).min(initial=1.0)
    if apart > 1e-2:  # nearer gaps than θ tells apart may all execute
        assert share - 1e-9 <= executed < share + 1 / len(values) + 1e-9


@given(shares, st.integers(1, 32), st.integers(0, 32), shares)
def test_the_share_of_the_routed_gives_the_ratio_of_all(share, layers, always, reserved):
    routed = max(layers - always, 1)
    ratio = (layers - routed + routed * (reserved + (1 - reserved) * share)) / layers
    found = threshold_rules.share_for_ratio(ratio + 1e-12, layers, routed, reserved)
    again = (layers - routed + routed * (reserved + (1 - reserved) * found)) / layers
    assert again == pytest.approx(ratio, abs=1e-9)


@given(st.floats(0.3, 1.0))
def test_a_budget_is_spent_on_layers_and_routers(budget):
    ratio = threshold_rules.ratio_for_budget(budget, LLAMA32_1B, RouterConfig())
    full = flops_per_token(LLAMA32_1B)["layers"]
    spent = flops_per_token(LLAMA32_1B, ratio, RouterConfig())
    assert (spent["layers"] + spent["routers"]) / full == pytest.approx(budget)


def test_what_cannot_be_met_is_refused():
    with pytest.raises(UserError, match=r"cannot be met: 0\.5 of all layers always run"):
        threshold_rules.share_for_ratio(0.4, 4, 2, 0.0)
    with pytest.raises(UserError, match="No token is routed"):
        threshold_rules.theta_for_share(np.empty((2, 0)), 0.5)


@pytest.mark.parametrize("rule", ["ratio 0.7", "ratio 0.8 by layer", "flops 0.9"])
def test_a_model_runs_what_is_aimed_at(rule):
    model = routed_llama()
    found = threshold_rules.aim(model, TOKENIZER, questions(24), rule, batch_size=7)
    assert found.execution_ratio == pytest.approx(found.ratio, abs=0.04)
    assert found.theta == routing_state(model).theta
    routed = len(routing_state(model).routed_layers)
    assert isinstance(found.theta, list) == rule.endswith("layer")
    assert len(np.atleast_1d(found.theta)) == (routed if rule.endswith("layer") else 1)
    if rule.startswith("ratio"):
        assert found.ratio == float(rule.split()[1])


def test_equal_thetas_by_layer_are_one_theta():
    model, rows = routed_llama(), questions(8)
    routed = len(routing_state(model).routed_layers)
    set_threshold(model, 0.3)
    one = evaluate_choices(model, TOKENIZER, rows, "arc_easy")
    set_threshold(model, [0.3] * routed)
    several = evaluate_choices(model, TOKENIZER, rows, "arc_easy")
    assert one["execution_ratio"] == several["execution_ratio"] and one["correct"] == several["correct"]
    with pytest.raises(UserError, match="layers with routers"):
        set_threshold(model, [0.3] * (routed + 1))
    with pytest.raises(UserError, match="must be a number"):
        set_threshold(model, [0.3, "x"])
