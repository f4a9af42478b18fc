"""Execution decisions of a token at a layer: router, Gumbel-Softmax, threshold rule and their closed forms.

QTALE Sec. 3.1-3.4 (Eq. 2, 5, 6, 9), after D-LLM. Plain tensors; nothing here knows a model.
"""

import math

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError

EXECUTE, BYPASS = 0, 1  # the paper's order; D-LLM's code has them the other way round
EULER_GAMMA = 0.5772156649015329
GUMBEL_MODE, GUMBEL_MEAN, GUMBEL_VARIANCE = 0.0, EULER_GAMMA, math.pi**2 / 6


class Router(nn.Module):
    """Two-layer network that scores executing against bypassing a layer (D-LLM; QTALE Sec. 3.1).

    Args:
        d: width of the hidden state entering the layer.
        hidden: width between the two linear maps.
        execute_bias, bypass_bias: start of the last bias, in favour of executing.
    """

    def __init__(self, d: int, hidden: int, execute_bias: float = 2.0, bypass_bias: float = 0.1):
        super().__init__()
        self.reduce = nn.Linear(d, hidden, dtype=torch.float32)
        self.norm = nn.RMSNorm(hidden, eps=1e-5, dtype=torch.float32)
        self.score = nn.Linear(hidden, 2, dtype=torch.float32)
        with torch.no_grad():
            self.score.bias[EXECUTE], self.score.bias[BYPASS] = execute_bias, bypass_bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [..., d] of any float type -> logits [..., 2] in the router's own (float32)."""
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self._scores(hidden_states)
        return self._scores(
            hidden_states
        )  # entering autocast costs a decoded token as much as a small product

    def _scores(self, hidden_states: Tensor) -> Tensor:
        reduced = self.norm(self.reduce(hidden_states.to(self.reduce.weight.dtype)))
        return self.score(nn.functional.silu(reduced))

    def _apply(self, fn, recurse=True):
        """Move with the model but lose no precision: `model.to(torch.bfloat16)` leaves routers in float32."""

        def at_least_as_precise(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lost = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if lost else moved

        return super()._apply(at_least_as_precise, recurse)


def gumbel(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws of Gumbel(0, 1) = -log(-log u) (Eq. 5), on `device`.

    A generator draws on its own device first, so that a CPU seed gives the same noise on every machine.
    """
    source = generator.device if generator is not None else device
    exponential = torch.empty(shape, device=source, dtype=dtype).exponential_(generator=generator)
    return exponential.clamp_min_(torch.finfo(dtype).tiny).log_().neg_().to(device)


def gumbel_softmax(logits: Tensor, noise: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Straight-through Gumbel-Softmax of two-way logits (Eq. 5, 6).

    Args:
        logits, noise: [..., 2].
        tau: temperature.
    Returns:
        (hard, soft), both [..., 2]: `soft` is the paper's b-tilde; `hard` is its one-hot arg max, exactly 0
        or 1, whose gradient is that of `soft`.
    """
    soft = torch.softmax((logits + noise) / tau, dim=-1)
    values = soft.detach()
    hard = torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - values), soft


def threshold_shift(theta: float) -> float:
    """log(theta / (1 - theta)): the logit gap from which a token executes (Eq. 9); -inf at theta = 0.

    Raises:
        UserError: if theta is outside [0, 1).
    """
    if not 0 <= theta < 1:
        raise UserError(f"The threshold θ is {theta}: it must be at least 0 (every layer runs) and below 1.")
    return math.log(theta / (1 - theta)) if theta > 0 else -math.inf


def decide(logits: Tensor, theta: float = 0.5) -> Tensor:
    """True where a token executes: softmax(logits)[EXECUTE] >= theta (Eq. 9; arg max at 0.5, Eq. 2).

    Decided on the logit gap, which does not saturate; at theta = 0 all execute. [..., 2] -> bool [...].
    """
    by_choice = logits.unbind(-1)
    return (by_choice[EXECUTE] - by_choice[BYPASS]) >= threshold_shift(theta)


def flip_probability(logits: Tensor) -> Tensor:
    """Probability that Gumbel noise turns the arg max decision: sigmoid(-|gap|). [..., 2] -> [...]."""
    return torch.sigmoid(-(logits[..., EXECUTE] - logits[..., BYPASS]).abs())


def gumbel_pdf(x: Tensor) -> Tensor:
    """Density of Gumbel(0, 1): exp(-(x + exp(-x)))."""
    return torch.exp(-(x + torch.exp(-x)))


def gumbel_cdf(x: Tensor) -> Tensor:
    """P(π <= x) for Gumbel(0, 1): exp(-exp(-x))."""
    return torch.exp(-torch.exp(-x))


def gumbel_within(bound: float) -> float:
    """P(|π| <= bound) for Gumbel(0, 1); 0.6262 at bound 1 (Fig. 4)."""
    return math.exp(-math.exp(-bound)) - math.exp(-math.exp(bound))


def logistic_pdf(x: Tensor) -> Tensor:
    """Density of Logistic(0, 1), the difference of two Gumbel(0, 1) draws."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def logistic_cdf(x: Tensor) -> Tensor:
    """P(π₁ - π₀ <= x) for two Gumbel(0, 1) draws: sigmoid(x)."""
    return torch.sigmoid(x)
