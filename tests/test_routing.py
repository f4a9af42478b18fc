"""Routers, Gumbel decisions and the threshold rule against scipy, explicit formulas and draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from qtale_lib import routing
from qtale_lib.errors import UserError
from qtale_lib.routing import (
    BYPASS,
    EXECUTE,
    Router,
    decide,
    flip_probability,
    gumbel,
    gumbel_softmax,
    keyed_gumbel,
)

DRAWS = 200_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_router_is_linear_norm_silu_linear():
    router = Router(6, 4)
    x = torch.randn(3, 5, 6)
    inner = x @ router.reduce.weight.T + router.reduce.bias
    inner = inner / torch.sqrt((inner**2).mean(-1, keepdim=True) + 1e-5) * router.norm.weight
    expected = (inner / (1 + torch.exp(-inner))) @ router.score.weight.T + router.score.bias
    torch.testing.assert_close(router(x), expected)
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {
        "reduce.weight": (4, 6),
        "reduce.bias": (4,),
        "norm.weight": (4,),
        "score.weight": (2, 4),
        "score.bias": (2,),
    }


def test_router_starts_in_favour_of_executing():
    bias = Router(6, 4).score.bias
    assert bias[0].item() == bias[EXECUTE].item() == 2.0  # the paper's order: execute first
    assert bias[1].item() == bias[BYPASS].item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_keeps_float32_when_the_model_is_narrowed(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Router(8, 4))
    before = model[1].score.weight.detach().clone()
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert {p.dtype for p in model[1].parameters()} == {torch.float32}
    assert torch.equal(model[1].score.weight, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[1](torch.randn(2, 8, dtype=dtype)).dtype == torch.float32
    assert {p.dtype for p in model.double()[1].parameters()} == {torch.float64}


def test_a_router_without_storage_gets_some():
    router = Router(8, 4).to("meta").to_empty(device="cpu")
    assert {(p.dtype, p.device.type) for p in router.parameters()} == {(torch.float32, "cpu")}


def test_gumbel_draws_follow_the_closed_forms():
    draws = gumbel((DRAWS,), seeded()).double().numpy()
    assert stats.kstest(draws, stats.gumbel_r.cdf).pvalue > 0.01
    assert draws.mean() == pytest.approx(routing.GUMBEL_MEAN, abs=4 * draws.std() / math.sqrt(DRAWS))
    assert draws.var() == pytest.approx(routing.GUMBEL_VARIANCE, rel=0.02)
    within = routing.gumbel_within(1.0)
    assert np.mean(np.abs(draws) <= 1) == pytest.approx(within, abs=4 * math.sqrt(within / DRAWS))
    counts, edges = np.histogram(draws, bins=np.arange(-2.25, 4, 0.5))
    top = counts.argmax()
    assert edges[top] < routing.GUMBEL_MODE < edges[top + 1]


def test_difference_of_draws_is_logistic():
    first, second = gumbel((2, DRAWS), seeded(1)).double().numpy()
    assert stats.kstest(first - second, stats.logistic.cdf).pvalue > 0.01


def test_closed_forms_against_scipy():
    x = torch.linspace(-4, 8, 50, dtype=torch.float64)
    pairs = [
        (routing.gumbel_pdf, stats.gumbel_r.pdf),
        (routing.gumbel_cdf, stats.gumbel_r.cdf),
        (routing.logistic_pdf, stats.logistic.pdf),
        (routing.logistic_cdf, stats.logistic.cdf),
    ]
    for ours, scipys in pairs:
        np.testing.assert_allclose(ours(x).numpy(), scipys(x.numpy()), rtol=1e-12, atol=1e-15)
    assert routing.gumbel_within(1.0) == pytest.approx(
        integrate.quad(stats.gumbel_r.pdf, -1, 1)[0], rel=1e-10
    )
    assert stats.gumbel_r.mean() == pytest.approx(routing.GUMBEL_MEAN)
    assert stats.gumbel_r.var() == pytest.approx(routing.GUMBEL_VARIANCE)


def test_noise_comes_from_the_generator_alone():
    first = gumbel((5, 2), seeded(3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, gumbel((5, 2), seeded(3)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, gumbel((5, 2), seeded(4)))


def test_a_generator_draws_on_its_own_device_wherever_the_noise_goes():
    here, elsewhere = seeded(), seeded()
    gumbel((5, 2), here)
    assert gumbel((5, 2), elsewhere, "meta").device.type == "meta"
    assert torch.equal(here.get_state(), elsewhere.get_state())
    assert gumbel((5, 2), device="meta").device.type == "meta"
    assert gumbel((5, 2)).device.type == "cpu"


@given(st.integers(0, 2**31), st.floats(0.3, 3.0))
@settings(max_examples=25, deadline=None)
def test_gumbel_softmax_is_equations_5_and_6(seed, tau):
    logits, noise = 4 * torch.randn(7, 2, generator=seeded(seed)), gumbel((7, 2), seeded(seed + 1))
    hard, soft = gumbel_softmax(logits, noise, tau)
    for row in range(7):
        powers = [math.exp((logits[row, i].item() + noise[row, i].item()) / tau) for i in (0, 1)]
        assert soft[row].tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-4, abs=1e-6)
        assert hard[row].tolist() == ([1.0, 0.0] if powers[0] >= powers[1] else [0.0, 1.0])
    # Eq. 5 prints log of the probabilities where logits do: the decisions are the same
    assert torch.equal(gumbel_softmax(logits, noise)[1], gumbel_softmax(logits, noise, 1.0)[1])
    same, _ = gumbel_softmax(torch.log_softmax(logits, -1), noise, tau)
    assert torch.equal(hard, same)


def test_straight_through_gradient_is_that_of_the_soft_sample():
    logits = (3 * torch.randn(6, 2, generator=seeded(), dtype=torch.float64)).requires_grad_()
    noise, weights = gumbel((6, 2), seeded(1), dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    hard, soft = gumbel_softmax(logits, noise, 0.7)
    (through,) = torch.autograd.grad((hard * weights).sum(), logits, retain_graph=True)
    (of_soft,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(through, of_soft, rtol=0, atol=0)
    assert through.abs().max() > 1e-3


def test_measured_flips_are_sigmoid_of_minus_the_gap():
    gaps = torch.tensor([-6.0, -3.0, -1.0, -0.2, 0.0, 0.5, 2.0, 4.0])
    logits = torch.stack([gaps + 1.3, torch.full_like(gaps, 1.3)], -1)
    hard, _ = gumbel_softmax(logits, gumbel((DRAWS, 8, 2), seeded(7)))
    flipped = (hard[..., EXECUTE] > 0) != decide(logits)
    expected = 1 / (1 + np.exp(np.abs(gaps.double().numpy())))
    np.testing.assert_allclose(flip_probability(logits), expected, rtol=1e-5)
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    np.testing.assert_array_less(np.abs(flipped.double().mean(0).numpy() - expected), 4 * error)


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(1e-6, 1 - 1e-6))
@settings(max_examples=200, deadline=None)
def test_threshold_is_the_rule_of_equation_9_and_a_logit_shift(execute, bypass, theta):
    logits = torch.tensor([execute, bypass], dtype=torch.float64)
    probability = math.exp(execute) / (math.exp(execute) + math.exp(bypass))
    if abs(probability - theta) < 1e-9:
        return
    assert decide(logits, theta).item() == (probability >= theta)
    shifted = logits - torch.tensor([math.log(theta / (1 - theta)), 0.0], dtype=torch.float64)
    assert decide(logits, theta).item() == (shifted.argmax().item() == EXECUTE)


def test_threshold_limits():
    hopeless = torch.tensor([[-500.0, 500.0], [0.0, 1e30]])
    assert decide(hopeless, 0.0).all()
    assert not decide(hopeless, 1e-30).any()
    assert decide(torch.zeros(1, 2), 0.5).all()  # a tie executes, as arg max does with execute first
    assert routing.threshold_shift(0.5) == 0.0
    for bad in (-0.1, 1.0, 1.5, math.nan):
        with pytest.raises(UserError, match="θ"):
            decide(hopeless, bad)


def test_keyed_noise_is_gumbel_and_of_its_key_token_and_layer_alone():
    keys = [(0, 7, 3), (0, 7, 4), (0, 8, 3), (1, 7, 3)]
    noise = keyed_gumbel(keys, 500, 9)  # [9, 4, 500, 2]
    assert noise.dtype == torch.float32 and noise.shape == (9, 4, 500, 2)
    assert stats.kstest(noise.flatten().double().numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    assert noise.unique().numel() > 0.99 * noise.numel()  # no key, token, layer or choice repeats another
    assert torch.equal(keyed_gumbel(keys[::-1], 20, 9), noise[:, [3, 2, 1, 0], :20])
