"""θ without a grid: the quantile of the routers' scores at which a wished execution ratio is met.

A layer executes where its logit gap is at least log(θ / (1 − θ)) (Eq. 9), so the share s of the gaps that are
to execute gives θ at once: the gaps' (1 − s) quantile. One θ for all routed layers, or one for each, so that
all execute the same share. The paper searches θ by score (Sec. 3.4, calibration.py); here no score is seen.

    >>> found = aim(model, tokenizer, load_task("arc_easy", "calibration"), "ratio 0.6")
    >>> set_threshold(model, found.theta)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qtale_lib import efficiency
from qtale_lib.adaptive import record_routes, reserved_tokens, routing_state, set_threshold
from qtale_lib.data.encoding import fit_all, pad_right, response_pairs
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.evaluation import BATCH_SIZE
from qtale_lib.routing import BYPASS, EXECUTE

PASSES = 4  # a layer's gaps change with what the layers before it ran: θ is found anew at the θ found before
LARGEST = math.nextafter(1.0, 0.0)  # as σ of a gap of 37


@dataclass(frozen=True)
class Aimed:
    """A rule's θ, or those of the routed layers; the ratio aimed at, and the one that its texts then had."""

    theta: float | list[float]
    ratio: float
    execution_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)


# Closed forms.


def theta_at(gap: float) -> float:
    """The θ up to which a logit gap executes: σ(gap), below 1; the inverse of routing.threshold_shift."""
    return min(1 / (1 + math.exp(-gap)) if gap > -700 else 0.0, LARGEST)


def theta_for_share(gaps: np.ndarray, share: float) -> float:
    """The θ at which `share` of the gaps [any shape] execute: at least so many, and, but for equal gaps, no
    more than one gap further. 0, at which all execute, for a share of 1.

    Raises:
        UserError: if there are no gaps.
    """
    if not gaps.size:
        raise UserError("No token is routed: θ cannot be found from the routers' scores.")
    ordered = np.sort(gaps, axis=None)[::-1]
    count = math.ceil(share * gaps.size - 1e-9)
    if count >= gaps.size:
        return 0.0
    if count <= 0:
        return theta_at(float(ordered[0]) + 1.0)
    return theta_at(float(ordered[count - 1] + ordered[count]) / 2)


def share_for_ratio(ratio: float, layers: int, routed: int, reserved: float) -> float:
    """The share of routed decisions to execute, within [0, 1], for an execution ratio over all (token, layer)
    pairs. reserved: share of the tokens that all layers run.

    Raises:
        UserError: if more than `ratio` runs always.
    """
    floor = (layers - routed + routed * reserved) / layers
    if ratio < floor:
        raise UserError(
            f"An execution ratio of {ratio:g} cannot be met: {floor:.3g} of all layers always run."
        )
    return min((ratio - floor) / (1 - floor), 1.0) if floor < 1 else 1.0


def ratio_for_budget(budget: float, config: Any, routers: Any) -> float:
    """The execution ratio, at most 1, whose layers and routers cost `budget`, a share of Full's layers' FLOPs
    (efficiency.flops_per_token).
    """
    flops = efficiency.flops_per_token(config, 1.0, routers)
    return min(budget - flops["routers"] / flops["layers"], 1.0)


# On a model.


def aim(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    rule: str,
    *,
    style: str = "compact",
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    overlong: str = "drop",
) -> Aimed:
    """θ by a rule of jobs.AIMED: "ratio 0.6", "flops 0.7", or either "… by layer".

    Scores are those of the examples' prompts and responses. The model is left at the θ found.

    Raises:
        UserError: for a model without routers, where no example fits, and for a cost that cannot be met.
    """
    kind, wished, *by_layer = rule.split(maxsplit=2)
    state, config = routing_state(model), model.config
    ratio = float(wished)
    if kind == "flops":
        ratio = ratio_for_budget(ratio, config, state.config)
    pairs = response_pairs(examples, tokenizer, style)
    limit = max_length or config.max_position_embeddings
    fitted, _ = fit_all(pairs, tokenizer, limit, overlong)
    rows = [[*prompt, *response] for prompt, response in filter(None, fitted)]
    if not rows:
        raise UserError(f"None of the {len(examples)} texts fits {limit} tokens; raise max_length.")
    set_threshold(model, 0.5)
    for _ in range(PASSES):
        gaps, reserved, _ = _gaps(model, rows, batch_size)
        share = share_for_ratio(ratio, state.n_layers, len(state.routed_layers), reserved)
        per_layer = [theta_for_share(layer, share) for layer in gaps] if by_layer else None
        set_threshold(model, per_layer or theta_for_share(gaps, share))
    return Aimed(state.theta, ratio, _gaps(model, rows, batch_size)[2])


@torch.no_grad()
def _gaps(
    model: nn.Module, rows: Sequence[Sequence[int]], batch_size: int
) -> tuple[np.ndarray, float, float]:
    """Logit gaps [routed layers, routed tokens]; share of tokens that always run; R over all tokens."""
    state, kept = routing_state(model), reserved_tokens(model)
    device = model.get_input_embeddings().weight.device
    gaps, executed, tokens, training = [], 0, 0, model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            valid = pad_right([[True] * len(row) for row in batch], False).to(device)
            with record_routes(model) as routes:
                model(pad_right(batch, 0).to(device), attention_mask=valid.long(), use_cache=False)
            logits = routes.logits[state.routed_layers].float()
            routed = valid & (valid.cumsum(1) > kept)
            gaps.append((logits[..., EXECUTE] - logits[..., BYPASS])[:, routed].cpu())
            executed += int(routes.executed[:, valid].sum())
            tokens += int(valid.sum())
    finally:
        model.train(training)
    found = torch.cat(gaps, dim=1).double().numpy()
    return found, 1 - found.shape[1] / tokens, executed / (tokens * state.n_layers)
