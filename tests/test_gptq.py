"""GPTQ against the exact optimum on small layers, and MagR's steps against a general solver.

No maintained implementation of GPTQ stands beside it: theirs come with kernels and frameworks of their own.
In its place are the definition, column by column, in both orders (`by_definition`), and all codes of small
grids.
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from qtale_lib.errors import UserError
from qtale_lib.quantization.awq import output_error
from qtale_lib.quantization.gptq import BLOCK, DAMPING, gptq
from qtale_lib.quantization.magr import magr, project_l1, shrink_ranges
from qtale_lib.quantization.rtn import dequantize_groups, fake_quantize, quantize_groups

seeds = st.integers(0, 10_000)


def layer(out: int, width: int, seed: int, rank: int | None = None, shared: float = 1.0):
    """Weights [out, in] and a moment [in, in] of inputs that vary together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    inputs = torch.randn(4 * width, rank or width, generator=generator)
    mixed = inputs @ torch.randn(rank or width, width, generator=generator)
    inputs = shared * mixed + torch.randn(4 * width, width, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def error(rounded: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return output_error(rounded - weight, moment)


def by_definition(weight, moment, bits, group, act_order=False):
    """Column by column, each time with the best answer of the columns left, from a solved system."""
    width = weight.shape[1]
    if act_order:
        return in_act_order(weight, moment, bits, group)
    damped = (moment + torch.diag(DAMPING * moment.diagonal().mean() * torch.ones(width))).double()
    left, rounded = weight.double().clone(), torch.zeros_like(weight).double()
    for column in range(width):
        if column % group == 0:
            _, step, zero = quantize_groups(left[:, column : column + group], bits, -1)
            step, zero = step[:, 0, 0], zero[:, 0, 0]
        code = ((left[:, column] / step).round() + zero).clamp(0, 2**bits - 1)
        rounded[:, column] = (code - zero) * step
        gone = rounded[:, column] - left[:, column]
        rest = slice(column + 1, width)
        if column + 1 < width:
            answer = torch.linalg.solve(damped[rest, rest], damped[rest, column])
            left[:, rest] -= gone[:, None] * answer
    return rounded


def in_act_order(weight, moment, bits, group):
    """The same by falling power of the inputs; every group's grid is that of the weights as they were."""
    damped = (moment + torch.diag(DAMPING * moment.diagonal().mean() * torch.ones(len(moment)))).double()
    left, rounded = weight.double().clone(), torch.zeros_like(weight).double()
    _, steps, zeros = quantize_groups(left, bits, group)
    waiting = sorted(range(len(moment)), key=lambda column: -moment[column, column].item())
    while waiting:
        column = waiting.pop(0)
        step, zero = steps[:, column // group, 0], zeros[:, column // group, 0]
        code = ((left[:, column] / step).round() + zero).clamp(0, 2**bits - 1)
        rounded[:, column] = (code - zero) * step
        if waiting:
            answer = torch.linalg.solve(damped[waiting][:, waiting], damped[waiting, column])
            left[:, waiting] -= (rounded[:, column] - left[:, column])[:, None] * answer
    return rounded


@settings(max_examples=20, deadline=None)
@given(
    seeds,
    st.sampled_from([(12, 4), (12, 12), (30, 6), (30, -1)]),
    st.sampled_from([2, 3, 4]),
    st.booleans(),
)
def test_it_is_rounding_with_the_best_answer_to_each_columns_error(seed, shape, bits, act_order):
    width, group = shape
    weight, moment = layer(5, width, seed)
    found = dequantize_groups(*gptq(weight.double(), moment.double(), bits, group, act_order))
    expected = by_definition(weight, moment, bits, width if group == -1 else group, act_order)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group", [64, 96, -1])
def test_groups_may_lie_across_blocks(group):
    weight, moment = layer(3, 192, 0)
    assert BLOCK < 192
    for act_order in (False, True):
        found = dequantize_groups(*gptq(weight.double(), moment.double(), 3, group, act_order))
        expected = by_definition(weight, moment, 3, 192 if group == -1 else group, act_order)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_powerful_inputs_first_lowers_the_error():
    errors = {True: 0.0, False: 0.0}
    for seed in range(10):
        weight, moment = layer(16, 32, seed)
        power = torch.logspace(0, 2, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(seed))]
        moment = moment * power.outer(power)
        for act_order in errors:
            rounded = dequantize_groups(*gptq(weight, moment, 3, -1, act_order))
            errors[act_order] += error(rounded, weight, moment).sum().item()
    assert errors[True] < 0.8 * errors[False]


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_it_stands_between_the_exact_optimum_and_rounding_to_nearest(seed):
    """All 4^5 codes on the grid of the first step, row by row."""
    weight, moment = layer(4, 5, seed)
    codes, step, zero = gptq(weight, moment, 2, -1)
    grid = torch.tensor(list(product(range(4), repeat=5)), dtype=torch.float32)  # [1024, 5]
    points = (grid[None] - zero[:, :, 0, None]) * step[:, :, 0, None]
    every = torch.stack([error(points[row], weight[row], moment) for row in range(4)])  # [4, 1024]
    found = error(dequantize_groups(codes, step, zero), weight, moment)
    assert (found >= every.min(1).values * (1 - 1e-4) - 1e-6).all()


def test_it_finds_most_of_what_the_exact_optimum_gains():
    gains, best = [], []
    for seed in range(60):
        weight, moment = layer(4, 5, seed)
        codes, step, zero = gptq(weight, moment, 2, -1)
        grid = torch.tensor(list(product(range(4), repeat=5)), dtype=torch.float32)
        points = (grid[None] - zero[:, :, 0, None]) * step[:, :, 0, None]
        exact = torch.stack([error(points[row], weight[row], moment).min() for row in range(4)]).sum()
        nearest = error(fake_quantize(weight, 2, -1), weight, moment).sum()
        gains.append(float(nearest - error(dequantize_groups(codes, step, zero), weight, moment).sum()))
        best.append(float(nearest - exact))
    assert sum(gains) > 0.5 * sum(best) > 0


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([2, 3, 4]), st.sampled_from([4, -1]))
def test_where_inputs_do_not_vary_together_it_is_rounding_to_nearest(seed, bits, group):
    weight, _ = layer(5, 8, seed)
    moment = torch.diag(torch.rand(8, generator=torch.Generator().manual_seed(seed)) + 0.1)
    for mine, nearest in zip(
        gptq(weight, moment, bits, group), quantize_groups(weight, bits, group), strict=True
    ):
        torch.testing.assert_close(mine, nearest)


def test_a_column_without_input_is_rounded_to_nearest_and_disturbs_no_other():
    weight, moment = layer(5, 8, 0)
    moment[3] = moment[:, 3] = 0
    found = dequantize_groups(*gptq(weight, moment, 8, -1))
    torch.testing.assert_close(found[:, 3], weight[:, 3], atol=0.05, rtol=0)


def test_a_multiple_of_the_moment_changes_nothing():
    weight, moment = layer(5, 8, 1)
    assert torch.equal(gptq(weight, moment, 3, 4)[0], gptq(weight, 1000 * moment, 3, 4)[0])


@pytest.mark.parametrize("bad", [torch.full((4, 4), torch.nan), torch.zeros(4, 4), -torch.eye(4)])
def test_moments_of_no_inputs_are_refused(bad):
    with pytest.raises(UserError, match="second moments of real inputs"):
        gptq(torch.randn(2, 4), bad, 4, -1)


def test_a_moment_with_a_negative_direction_is_refused():
    moment = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(UserError, match="negative direction"):
        gptq(torch.randn(2, 2), moment, 4, -1)


# MagR.


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(0.01, 5))
def test_the_l1_projection_is_the_nearest_point_of_the_ball(seed, radius):
    vector = torch.randn(6, generator=torch.Generator().manual_seed(seed)).double()
    found = project_l1(vector, radius)
    assert found.abs().sum() <= radius + 1e-9
    if vector.abs().sum() <= radius:
        torch.testing.assert_close(found, vector)
        return
    # the difference lies in the ball's normal cone at the point found: equal and largest where it is not zero
    away = vector - found
    largest = away.abs().max()
    on = found.abs() > 1e-9
    torch.testing.assert_close(away[on], largest * found[on].sign())
    assert found.abs().sum() == pytest.approx(radius)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0.05, 3))
def test_the_proximal_step_is_what_a_general_solver_finds(seed, weight):
    vector = torch.randn(5, generator=torch.Generator().manual_seed(seed)).double()

    def objective(values):  # the last number bounds all others
        return 0.5 * np.sum((values[:-1] - vector.numpy()) ** 2) + weight * values[-1]

    bounds = [{"type": "ineq", "fun": lambda v, s=s: v[-1] - s * v[:-1]} for s in (1, -1)]
    start = np.append(vector.numpy(), vector.abs().max().item())
    solved = minimize(objective, start, constraints=bounds, options={"ftol": 1e-12, "maxiter": 500})
    torch.testing.assert_close(shrink_ranges(vector, weight), torch.tensor(solved.x[:-1]), atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([4, -1]))
def test_more_steps_lower_the_objective_and_ranges_shrink(seed, group):
    weight, moment = layer(4, 8, seed)
    width, alpha = 8 if group == -1 else group, 0.05

    def objective(moved):
        ranges = moved.unflatten(1, (-1, width)).abs().amax(-1).sum()
        scaled = moment / moment.diagonal().mean()
        return (
            0.5 * output_error(moved - weight, scaled).sum() + alpha * weight.square().mean().sqrt() * ranges
        )

    course = [objective(magr(weight, moment, group, alpha, steps)) for steps in (0, 1, 5, 50, 400)]
    assert all(later <= sooner + 1e-4 for sooner, later in pairwise(course))
    before, after = (
        w.unflatten(1, (-1, width)).abs().amax(-1).sum(-1) for w in (weight, magr(weight, moment, group))
    )
    assert (after <= before + 1e-5).all()


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.01, 100))
def test_the_scale_of_a_layer_plays_no_part(seed, scale):
    weight, moment = layer(4, 8, seed)
    found = magr(scale * weight, 7 * moment, 4) / scale
    torch.testing.assert_close(found, magr(weight, moment, 4), rtol=1e-4, atol=1e-4)


def test_inputs_of_low_rank_let_ranges_shrink_at_next_to_no_error():
    weight, moment = layer(16, 64, 0, rank=8, shared=10.0)
    moved = magr(weight, moment, -1)
    assert moved.abs().amax(1).mean() < 0.8 * weight.abs().amax(1).mean()
    power = output_error(weight, moment)
    assert (error(moved, weight, moment) / power).max() < 0.02
    rounded, direct = (
        error(dequantize_groups(*gptq(start, moment, 3, -1)), weight, moment).sum()
        for start in (moved, weight)
    )
    assert rounded < direct
