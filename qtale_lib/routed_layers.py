"""Decoder layers that run where their router says so, and what they share during a forward pass.

QTALE Sec. 3.1 and 3.4, after D-LLM. Each routed layer is an instance of a subclass of its own class, so the
base model keeps its parameter names. In dense execution every layer is computed for every token, then the
decisions say what counts; in training they are Gumbel samples, in evaluation the rule of θ. Evaluation can
also skip (skipping.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qtale_lib.errors import UserError
from qtale_lib.gated_attention import gated
from qtale_lib.kv_cache import store_executed, track_evictions
from qtale_lib.routing import EXECUTE, Router, decide, gumbel, gumbel_softmax, keyed_gumbel
from qtale_lib.skipping import Step, run_executed

if TYPE_CHECKING:
    from qtale_lib.adaptive import Routes


@dataclass(frozen=True)
class RouterConfig:
    """Shape and start of the routers.

    hidden: router width; None is d/8 (512 at d 4096, as D-LLM).
    always_run_layers, always_run_tokens: how many first layers, and first tokens of a sequence, always run.
    tau: Gumbel-Softmax temperature in training.
    bypass_bias, execute_bias: start of the last bias.
    max_pull: how much stronger than the strongest kept key an evicted key may count in the gradient of its
        own gate, in training; 1e6 is what the 1e-6 in D-LLM's renormalisation allows. That gradient is the
        slope at eviction, e^score over the sum of the kept keys'; where attention is sharp it is thousands of
        times what keeping the key can change, and then routers hear nothing of the rate loss: the embedded
        model's execution ratio stayed near 0.9. With 1, the most that a kept key can weigh, it meets its
        target; its profile says so.
    """

    hidden: int | None = None
    always_run_layers: int = 2
    always_run_tokens: int = 2
    tau: float = 1.0
    bypass_bias: float = 0.1
    execute_bias: float = 2.0
    max_pull: float = 1e6

    def __post_init__(self):
        for name, least in (("hidden", 1), ("always_run_layers", 0), ("always_run_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"RouterConfig.{name} is {value}: it must be at least {least}.")
        if self.tau <= 0:
            raise UserError(f"RouterConfig.tau is {self.tau}: it must be above 0.")
        if self.max_pull < 1:
            raise UserError(f"RouterConfig.max_pull is {self.max_pull}: it must be at least 1.")


class RoutingState:
    """What a routed model remembers between forward passes; it lives on the inner decoder as `.routing`."""

    def __init__(self, config: RouterConfig, n_layers: int):
        self.config, self.n_layers = config, n_layers
        self.routed_layers = list(range(config.always_run_layers, n_layers))
        self.theta: float | list[float] = 0.5  # of all routed layers, or of each
        self.execution = "auto"
        self.generator: torch.Generator | None = None
        self.keys: Sequence[Sequence[int]] | None = None
        self.recorder: Routes | None = None

    def theta_of(self, layer: int) -> float:
        """The θ by which a layer decides."""
        if isinstance(self.theta, list):
            return self.theta[layer - self.config.always_run_layers]
        return self.theta

    def noise_like(self, logits: Tensor) -> Tensor:
        """Gumbel noise for all routed layers, from one draw: [B, T, 2] -> [routed layers, B, T, 2]."""
        if self.keys is not None:
            drawn = keyed_gumbel(self.keys, logits.shape[1], len(self.routed_layers))
            return drawn.to(logits.device, logits.dtype)
        shape = (len(self.routed_layers), *logits.shape)
        return gumbel(shape, self.generator, logits.device, logits.dtype)


class ForwardPass:
    """What the layers of one forward pass share; it travels to them as the keyword `routing`.

    valid: bool [B, T], False on padding.
    reserved: bool [B, T], True on the first tokens of each sequence, and on padding left of them.
    past: number of cached tokens before these.
    skips: layers compute executed tokens only; positions: int64 [T], their places, padding counted.
    """

    def __init__(
        self, state: RoutingState, seen: Tensor, past: int, cache: DynamicCache | None, skips: bool = False
    ):
        self.state, self.past, self.cache, self.skips = state, past, cache, skips
        self.valid = seen[:, past:]
        self.reserved = seen.cumsum(1)[:, past:] <= state.config.always_run_tokens
        self.positions = torch.arange(past, seen.shape[1], device=seen.device) if skips else None
        self.noise: Tensor | None = None
        self.logits, self.gates, self.soft, self.executed = {}, {}, {}, {}
        self._masks = {}

    def sample(self, layer: int, logits: Tensor) -> Tensor:
        """Training: the straight-through execute gate of Eq. 5, 6, exactly 0 or 1. [B, T, 2] -> [B, T]."""
        if self.noise is None:
            self.noise = self.state.noise_like(logits)
        noise = self.noise[layer - self.state.config.always_run_layers]
        hard, soft = gumbel_softmax(logits, noise, self.state.config.tau)
        gate = hard[..., EXECUTE].masked_fill(self.reserved, 1.0)
        if self.state.recorder is not None:
            self.logits[layer], self.gates[layer], self.soft[layer] = logits.detach(), gate, soft
            self.executed[layer] = (gate.detach() > 0) & self.valid
        return gate

    def decide(self, layer: int, logits: Tensor) -> Tensor:
        """Evaluation: the rule of θ (Eq. 9). [B, T, 2] -> bool [B, T]."""
        executed = decide(logits, self.state.theta_of(layer)) | self.reserved
        if self.state.recorder is not None:
            self.logits[layer], self.executed[layer] = logits.detach(), executed & self.valid
        return executed

    def kept_keys(self, layer: int, executed: Tensor) -> Tensor:
        """Which keys this layer's queries may see, cached ones first. bool [B, T] -> bool [B, K]."""
        return executed if self.cache is None else self.cache.layers[layer].extend(executed)

    def additive_mask(self, mask: Tensor | None, like: Tensor) -> Tensor:
        """The attention mask a layer was given, in additive form [B or 1, 1, T, K]; None is causal."""
        if id(mask) not in self._masks:
            self._masks[id(mask)] = (mask, self._build_mask(mask, like))
        return self._masks[id(mask)][1]

    def _build_mask(self, mask: Tensor | None, like: Tensor) -> Tensor:
        if mask is None:
            length = like.shape[1]
            mask = torch.ones(length, self.past + length, dtype=torch.bool, device=like.device)
            mask = mask.tril(self.past)[None, None]
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, torch.finfo(like.dtype).min)


class RoutedLayer:
    """Mixin over a decoder layer class: the layer runs where its router says so.

    The router reads the raw residual stream, before the layer's norm.
    """

    router: Router

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, routing: ForwardPass, **kwargs
    ) -> Tensor:
        """Hidden states [B, T, d] -> [B, T, d]."""
        layer = self.self_attn.layer_idx
        logits = self.router(hidden_states)
        if routing.skips:
            return self._skip(hidden_states, logits, routing, kwargs["position_embeddings"])
        mask = routing.additive_mask(attention_mask, hidden_states)
        if self.training:
            kwargs["max_pull"] = routing.state.config.max_pull
            run = functools.partial(self._run_gated, attention_mask=mask, **kwargs)
            if self.gradient_checkpointing:  # the gate enters from outside: the second run sees the same
                run = functools.partial(self._gradient_checkpointing_func, run)
            return run(hidden_states, routing.sample(layer, logits))
        executed = routing.decide(layer, logits)
        kept = routing.kept_keys(layer, executed)
        mask = mask.masked_fill(~kept[:, None, None], torch.finfo(mask.dtype).min)
        output = super().forward(hidden_states, attention_mask=mask, **kwargs)
        return torch.where(executed[..., None], output, hidden_states)

    def _skip(
        self,
        hidden_states: Tensor,
        logits: Tensor,
        routing: ForwardPass,
        embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        layer = self.self_attn.layer_idx
        executed = routing.decide(layer, logits) & routing.valid
        store = None if routing.cache is None else routing.cache.layers[layer]
        step = Step(super().forward, self.self_attn, routing.positions, embeddings, store, routing.past)
        return run_executed(step, hidden_states, executed)

    def _run_gated(self, hidden_states: Tensor, gate: Tensor, **kwargs) -> Tensor:
        """b · layer(x) + (1 - b) · x with keys gated by b; both ends of lerp are exact."""
        with gated(self.self_attn):
            output = super().forward(hidden_states, keep=gate, **kwargs)
        return torch.lerp(hidden_states, output, gate[..., None].to(output.dtype))


@functools.cache
def routed_class(layer_class: type) -> type:
    """The subclass of a decoder layer class that runs as `RoutedLayer` says."""
    routed = type(f"Routed{layer_class.__name__}", (RoutedLayer, layer_class), {})
    # transformers wraps each new layer class for gradient checkpointing; RoutedLayer does its own
    del routed.forward
    return routed


def start_pass(decoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the decoder: work out what its layers must know of this pass."""
    if decoder.config._attn_implementation not in ("eager", "sdpa"):
        raise UserError(
            "A routed model needs attn_implementation eager or sdpa: set it when loading the base."
        )
    if args:
        kwargs = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
    cache = _no_cache(kwargs) if decoder.training else _tracked_cache(decoder, kwargs)
    past = cache.get_seq_length() if cache is not None else 0
    seen = _seen_tokens(kwargs, past)
    routing = ForwardPass(decoder.routing, seen, past, cache, _skips(decoder, kwargs))
    if routing.skips and cache is not None:
        for layer in cache.layers[: decoder.routing.config.always_run_layers]:
            layer.extend(routing.valid)  # for cache_size: their keys are hidden by transformers' mask
    if decoder.routing.recorder is not None:
        decoder.routing.recorder.add(routing)
    return (), kwargs | {"routing": routing}


def _no_cache(kwargs: dict) -> None:
    if kwargs.get("past_key_values") is not None:
        raise NotImplementedError("a routed model in training takes no cache: call model.eval() first")
    kwargs["use_cache"] = False


def _tracked_cache(decoder: PreTrainedModel, kwargs: dict) -> DynamicCache | None:
    cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
        cache = kwargs["past_key_values"] = DynamicCache()
    state = decoder.routing
    if cache is not None and state.execution == "skip":
        store_executed(cache, state.n_layers, state.config.always_run_layers)
    elif cache is not None:
        track_evictions(cache, state.n_layers)
    return cache


def _skips(decoder: PreTrainedModel, kwargs: dict) -> bool:
    """Whether this pass skips: training never does.

    Raises:
        UserError: if attention weights are asked for, which skipping has for some tokens only.
    """
    skips = decoder.routing.execution == "skip" and not decoder.training
    asked = kwargs.get("output_attentions")
    if skips and (decoder.config.output_attentions if asked is None else asked):
        raise UserError('Attention weights need every token: call set_execution(model, "dense") first.')
    return skips


def _seen_tokens(kwargs: dict, past: int) -> Tensor:
    """Non-padding mask of the cached tokens and these, bool [B, past + T]."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.ones(tokens.shape[0], past + tokens.shape[1], dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.shape != (tokens.shape[0], past + tokens.shape[1]):
        raise UserError("A routed model needs a 2-D attention mask over all tokens so far, or none at all.")
    return mask.bool()
