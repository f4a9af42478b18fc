"""The route losses against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_lib.losses import counted_tokens, entropy_loss, lambda1_at, rate_loss, total_loss
from qtale_lib.routing import gumbel, gumbel_softmax

LENGTHS = st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=4)


def padded(lengths) -> torch.Tensor:
    """Validity of sequences of (length, whether padded on the left), 8 wide."""
    return torch.tensor(
        [[0] * (8 - n) + [1] * n if left else [1] * n + [0] * (8 - n) for n, left in lengths]
    ).bool()


def counted_by_hand(valid, reserved):
    for b in range(valid.shape[0]):
        tokens = [t for t in range(valid.shape[1]) if valid[b, t]]
        yield from ((b, t) for t in tokens[reserved:-1])


@given(LENGTHS, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_counted_tokens_leave_out_padding_first_and_last(lengths, reserved):
    valid = padded(lengths)
    found = {tuple(pair) for pair in counted_tokens(valid, reserved).nonzero().tolist()}
    assert found == set(counted_by_hand(valid, reserved))
    scored = {tuple(pair) for pair in counted_tokens(valid, reserved, whole=False).nonzero().tolist()}
    assert scored == {
        at for at in map(tuple, valid.nonzero().tolist()) if valid[at[0], : at[1]].sum() >= reserved
    }


@given(LENGTHS, st.integers(0, 1000), st.floats(0.1, 0.9))
@settings(max_examples=50, deadline=None)
def test_rate_losses_are_the_code_and_the_paper(lengths, seed, target):
    valid = padded(lengths)
    gates = (torch.rand(5, *valid.shape, generator=torch.Generator().manual_seed(seed)) < 0.4).double()
    gates[:2] = 1
    rates = [sum(gates[layer, b, t].item() for layer in range(5)) / 5 for b, t in counted_by_hand(valid, 2)]
    per_token = sum(abs(rate - target) for rate in rates) / len(rates) if rates else 0.0
    mean = abs(sum(rates) / len(rates) - target) if rates else 0.0
    counted = counted_tokens(valid, 2)
    assert rate_loss(gates, counted, target).item() == pytest.approx(per_token, abs=1e-7)
    assert rate_loss(gates, counted, target, "mean").item() == pytest.approx(mean, abs=1e-7)


def test_the_two_rate_losses_differ_where_tokens_do():
    gates = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, -1)[:, None]  # two tokens run all layers, two none
    counted = torch.ones(1, 4, dtype=torch.bool)
    assert rate_loss(gates, counted, 0.5, "mean") == 0
    assert rate_loss(gates, counted, 0.5, "per_token") == 0.5
    with pytest.raises(ValueError, match="neither"):
        rate_loss(gates, counted, 0.5, "median")


def test_always_run_layers_count_as_executed():
    gates = torch.zeros(4, 1, 6)
    gates[:2] = 1
    assert rate_loss(gates, counted_tokens(torch.ones(1, 6).bool(), 2), 0.5) == 0


def test_entropy_is_equation_7():
    logits, noise = torch.randn(3, 2, 6, 2).double(), gumbel((3, 2, 6, 2), dtype=torch.float64)
    _, soft = gumbel_softmax(logits, noise)
    valid = padded([(6, True), (4, False)])[:, :6]
    total, n = 0.0, 0
    for b, t in counted_by_hand(valid, 2):
        for layer in range(3):
            total -= sum(p * math.log(p) for p in soft[layer, b, t].tolist())
            n += 1
    assert n > 0
    assert entropy_loss(soft, counted_tokens(valid, 2)).item() == pytest.approx(total / n)


def test_entropy_is_at_most_log_2_and_finite_where_a_sample_is_certain():
    counted = torch.ones(1, 1, dtype=torch.bool)
    assert entropy_loss(torch.full((1, 1, 1, 2), 0.5), counted).item() == pytest.approx(math.log(2))
    logits = torch.tensor([500.0, -500.0]).view(1, 1, 1, 2).requires_grad_()
    _, soft = gumbel_softmax(logits, torch.zeros(1, 1, 1, 2))
    loss = entropy_loss(soft, counted)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()


def test_no_counted_token_gives_zero_with_a_gradient():
    gates = torch.ones(3, 1, 3, requires_grad=True)
    counted = counted_tokens(torch.ones(1, 3).bool(), 2)
    assert not counted.any()
    for kind in ("mean", "per_token"):
        loss = rate_loss(gates, counted, 0.5, kind)
        assert loss.item() == 0
        loss.backward()
    assert torch.isfinite(gates.grad).all()


def test_ramp_and_total():
    assert [lambda1_at(p, 5.0) for p in (0, 1 / 3, 1)] == pytest.approx([0, 2.5, 5])
    terms = torch.tensor([2.0, 0.3, 0.6])
    assert total_loss(*terms, lambda1=5, lambda2=2).item() == pytest.approx(2 + 5 * 0.3 - 2 * 0.6)
