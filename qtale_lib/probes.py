"""What the routers do as training goes on (Figures 2, 3, 5, 6, 7): one probe per epoch.

A probe is one pass over the first training rows in evaluation mode with arg max decisions (θ = 0.5).
Ratios are over every non-padding token, as R_avg is; logits, gaps and flips over the tokens that a router
decides on: without the reserved first ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from qtale_lib.adaptive import record_routes, routing_state, set_threshold
from qtale_lib.data.encoding import collate
from qtale_lib.losses import counted_tokens
from qtale_lib.routing import BYPASS, EXECUTE, flip_probability, gumbel
from qtale_lib.trainer import causal_of

ARG_MAX = 0.5
EDGES = np.linspace(-16.0, 16.0, 129)  # logits beyond the ends count in the end bins

Rows = Sequence[Mapping[str, Sequence[int]]]


@torch.no_grad()
def probe_routes(model: nn.Module, rows: Rows, batch_size: int, seed: int, epoch: float) -> dict[str, Any]:
    """One probe. Lists [L] over all decoder layers; on always-run layers the ratio is 1 and the rest None.

    flip: share of decisions that fresh Gumbel noise (Eq. 5), drawn from `seed`, turns over;
    flip_expected: its closed form, mean σ(−|Δ|);
    gap, abs_gap: mean of Δ = execute − bypass logit, and of |Δ|;
    histogram: counts of both logits per EDGES bin;
    execution_ratio, loss_ratio: over all layers, and all tokens or those that the rate loss sees;
    tokens: all non-padding ones.
    """
    theta, training = routing_state(model).theta, model.training
    set_threshold(model, ARG_MAX)
    model.eval()
    try:
        executed, counted, logits = _observe(model, rows, batch_size)
    finally:
        set_threshold(model, theta)
        model.train(training)
    generator = torch.Generator().manual_seed(seed)
    layers = [_layer_statistics(layer, generator) for layer in logits]
    ratio = executed.double().mean(1)
    return {
        "epoch": epoch,
        "ratio": ratio.tolist(),
        **{name: [layer and layer[name] for layer in layers] for name in _Statistics},
        "histogram": _histograms(logits),
        "execution_ratio": ratio.mean().item(),
        "loss_ratio": executed[:, counted].double().mean().item(),
        "tokens": executed.shape[1],
    }


def _observe(model: nn.Module, rows: Rows, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """executed bool [L, N], counted bool [N] over non-padding tokens; logits [L, n, 2] where decided on."""
    reserved = routing_state(model).config.always_run_tokens
    executed, counted, logits = [], [], []
    causal = causal_of(model)
    for batch in _batches(rows, batch_size, next(causal.parameters()).device):
        with record_routes(model) as routes:
            causal(**batch, use_cache=False, logits_to_keep=1)  # whole, as a sharded model must be called
        valid = routes.valid
        decided = valid & (valid.cumsum(-1) > reserved)
        executed.append(routes.executed[:, valid].cpu())
        counted.append(counted_tokens(valid, reserved)[valid].cpu())
        logits.append(routes.logits[:, decided].float().cpu())
    return torch.cat(executed, 1), torch.cat(counted), torch.cat(logits, 1)


def _batches(rows: Rows, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size])
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


_Statistics = ("flip", "flip_expected", "gap", "abs_gap")


def _layer_statistics(logits: Tensor, generator: torch.Generator) -> dict[str, float] | None:
    """Statistics of one layer's logits [n, 2]; None for a layer without a router."""
    if logits.isnan().any():
        return None
    gap = logits[:, EXECUTE] - logits[:, BYPASS]
    noisy = logits + gumbel(logits.shape, generator, logits.device, logits.dtype)
    flipped = (noisy[:, EXECUTE] >= noisy[:, BYPASS]) != (gap >= 0)
    return {
        "flip": flipped.double().mean().item(),
        "flip_expected": flip_probability(logits).double().mean().item(),
        "gap": gap.double().mean().item(),
        "abs_gap": gap.abs().double().mean().item(),
    }


def _histograms(logits: Tensor) -> dict[str, Any]:
    return {
        "edges": EDGES.tolist(),
        "execute": [_counts(layer[:, EXECUTE]) for layer in logits],
        "bypass": [_counts(layer[:, BYPASS]) for layer in logits],
    }


def _counts(values: Tensor) -> list[int] | None:
    if values.isnan().any():
        return None
    inside = values.clamp(EDGES[0], EDGES[-1]).numpy()
    return np.histogram(inside, EDGES)[0].tolist()


class ProbeCallback(TrainerCallback):
    """Probes before training and after every epoch, into Trainer's log history: a resumed run keeps them."""

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Epoch 0, or the epoch a checkpoint ends on: the checkpoint is written before that epoch's probe."""
        if (state.epoch or 0) % 1 == 0:
            self._probe(state, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Epochs 1 … E; where max_steps ends a run within an epoch, the probe has its fractional epoch."""
        self._probe(state, model)

    def _probe(self, state: Any, model: nn.Module) -> None:
        started = time.monotonic()
        epoch = round(state.epoch or 0, 3)
        epoch = int(epoch) if epoch == int(epoch) else epoch
        probe = probe_routes(model, self.rows, self.batch_size, self.seed, epoch)
        state.log_history.append({"probe": probe})
        self.seconds += time.monotonic() - started
