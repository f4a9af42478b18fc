"""What the benchmark compares: one random model as plain, with routers, and with layers removed.

All of them are made of the same tensors, so that a comparison costs no second set of weights. Routes are
forced by a hook on each router that puts logits drawn beforehand in place of its own, after it has computed
them: a pass costs what it would cost with routers that decide so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from qtale_lib.adaptive import RouterConfig, add_routers, routing_state, set_execution
from qtale_lib.kv_cache import ExecutedLayer, cache_size
from qtale_lib.quantization import quantize
from qtale_lib.quantization.packed import pack, packed_linears
from qtale_lib.routing import BYPASS, EXECUTE

ROUTERS = RouterConfig()
FORMATS = ("bf16", "int4", "int4-head")
HEAD_BITS = {"int4": 16, "int4-head": 4}
GROUP = 128  # or less, where that does not divide


@dataclass(frozen=True)
class BenchShape:
    """A model's shape, and what is measured of it unless said otherwise.

    config: keywords of `LlamaConfig`; device: "cpu" or "cuda".
    prefill, decode: tokens of a prompt, and rows of a batch; context: tokens before the first decoded one.
    trained: tokens of a training row.
    """

    config: Callable[[], dict[str, Any]]
    device: str
    prefill: tuple[int, ...] = (32, 512, 2048)
    decode: tuple[int, ...] = (1, 4, 16)
    context: int = 32
    repeats: int = 7
    trained: int = 128


def _llama(**sizes: int) -> Callable[[], dict[str, Any]]:
    names = {"heads": "num_attention_heads", "key_value_heads": "num_key_value_heads"}
    names |= {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size"}
    config = {names.get(name, name): value for name, value in sizes.items()}
    return lambda: {"max_position_embeddings": 4096, "tie_word_embeddings": False, **config}


# the embedded base but for its width: no int4 kernel takes rows of 48 weights
TINY = {"vocab_size": 838, "hidden": 64, "intermediate": 128, "layers": 10, "heads": 4, "key_value_heads": 2}
TINYLLAMA = {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "key_value_heads": 4}
LLAMA31_8B = {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "key_value_heads": 8}
# in order of size
SHAPES = {
    "tiny": BenchShape(_llama(**TINY), "cpu", (16, 64), (1, 4), context=16, repeats=3, trained=32),
    "tinyllama-1.1b": BenchShape(_llama(vocab_size=32000, **TINYLLAMA), "cpu"),
    "llama-3.1-8b": BenchShape(_llama(vocab_size=128256, **LLAMA31_8B), "cuda", repeats=15, trained=1024),
}


def random_model(config: dict[str, Any], device: str, seed: int = 0) -> PreTrainedModel:
    """A Llama of that shape with random bfloat16 weights, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        shape = LlamaConfig(**config)
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, trust_remote_code=False).eval()


def packed_copy(model: PreTrainedModel, head_bits: int = 16) -> PreTrainedModel:
    """The model rounded to nearest and packed in 4 bits; which quantizer chose the codes changes no time.

    head_bits: of lm_head, 16 or 4.
    """
    group, copied = group_size(model.config), copy.deepcopy(model)
    return pack(quantize(copied, method="rtn", bits=4, group_size=group, lm_head_bits=head_bits))


def group_size(config: LlamaConfig) -> int:
    """GROUP, or the largest part of it that divides the widths of a shape."""
    return math.gcd(GROUP, config.hidden_size, config.intermediate_size)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the very same tensors: a change of its structure leaves the first one alone."""
    kernels = [packed.kernel for packed in packed_linears(model).values() if packed.kernel is not None]
    shared = [*model.parameters(), *model.buffers(), *kernels]
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def evenly(kept: int, layers: int) -> list[int]:
    """`kept` of so many layers, evenly spaced."""
    return [index * layers // kept for index in range(kept)]


def without_layers(model: PreTrainedModel, kept: int) -> PreTrainedModel:
    """A twin with the first layers, which always run, and `kept` of those that would be routed."""
    pruned, first = twin(model), ROUTERS.always_run_layers
    layers = pruned.model.layers
    places = [*range(first), *(first + index for index in evenly(kept, len(layers) - first))]
    pruned.model.layers = nn.ModuleList([layers[place] for place in places])
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index  # its place in the cache
    pruned.config.num_hidden_layers = len(places)
    return pruned


def routed_layers(config: LlamaConfig | dict[str, Any]) -> int:
    """How many layers of a shape get routers."""
    layers = config["num_hidden_layers"] if isinstance(config, dict) else config.num_hidden_layers
    return layers - ROUTERS.always_run_layers


def kept_layers(ratio: float, layers: int) -> int:
    """How many of the routed layers a token executes: whole ones, at least one."""
    return max(1, round(ratio * layers))


class ForcedRoutes:
    """Makes the routers of a model decide as told before each pass."""

    def __init__(self, model: PreTrainedModel):
        self.logits: tuple[Tensor, ...] = ()
        for place, layer in enumerate(routing_state(model).routed_layers):

            def replace(router: nn.Module, args: Any, logits: Tensor, place: int = place) -> Tensor:
                return self.logits[place]

            model.model.layers[layer].router.register_forward_hook(replace)

    def tell(self, executed: Tensor) -> None:
        """executed: bool [routed layers, B, T], the decisions of the next pass."""
        logits = torch.zeros(*executed.shape, 2, device=executed.device)
        logits[..., EXECUTE], logits[..., BYPASS] = executed.float(), (~executed).float()
        self.logits = logits.unbind()


def draw_routes(
    kind: str, kept: int, layers: int, batch: int, tokens: int, reserved: int, generator: torch.Generator
) -> Tensor:
    """Decisions of the routed layers, bool [layers, B, T].

    Args:
        kind: "open" executes everything. "layerwise" opens `kept` whole layers, evenly spaced, and closes
            the others: the extreme to which D-LLM's trained routers tend. "random" executes exactly kept · T
            of a row's (layer, token) pairs, drawn at random: of a single token, exactly `kept` layers.
        reserved: first tokens, which execute every layer in any case and are counted in.
    """
    executed = torch.ones(layers, batch, tokens, dtype=torch.bool)
    if kind == "layerwise":
        closed = [layer for layer in range(layers) if layer not in evenly(kept, layers)]
        executed[closed, :, reserved:] = False
    elif kind == "random":
        free = layers * (tokens - reserved)
        order = torch.rand(batch, free, generator=generator).argsort(1)
        drawn = (order < kept * tokens - layers * reserved).view(batch, layers, -1)
        executed[:, :, reserved:] = drawn.transpose(0, 1)  # [B, layers, T] -> [layers, B, T]
    return executed


class Family:
    """One random model in one format: plain, routed and skipping, and with fewer layers, by layers kept."""

    def __init__(self, plain: PreTrainedModel, kept: list[int]):
        self.plain, self.layers = plain, routed_layers(plain.config)
        self.routed = add_routers(twin(plain), ROUTERS).eval()
        set_execution(self.routed, "skip")
        self.forced = ForcedRoutes(self.routed)
        self.ideal = {count: without_layers(plain, count) for count in kept if count < self.layers}

    def routers(self) -> list[nn.Module]:
        """The routers of the routed model, in order."""
        return [self.routed.model.layers[layer].router for layer in routing_state(self.routed).routed_layers]


def kv_bytes(cache: DynamicCache) -> tuple[int, int]:
    """(allocated, filled) bytes of a cache: apart by spare slots, and by rows filled up to the longest."""
    if any(isinstance(layer, ExecutedLayer) for layer in cache.layers):
        size = cache_size(cache)
        return size.slot_bytes, size.token_bytes
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return size, size


def weight_bytes(model: PreTrainedModel, kept: int) -> int:
    """Bytes of the weights that one decoded token reads: its layers, the routers, the head.

    kept: how many of the layers it executes besides those that always run. The embedding's row is left out.
    """
    layers = list(model.model.layers)
    routers = sum(_bytes(layer.router) for layer in layers if hasattr(layer, "router"))
    bare = _bytes(layers[0])  # as large as the others, and it has no router
    return (
        (ROUTERS.always_run_layers + kept) * bare + routers + _bytes(model.model.norm) + _bytes(model.lm_head)
    )


def _bytes(module: nn.Module) -> int:
    """Bytes that computing a module reads; a kernel reads its own copy of codes, steps and zeros."""
    arranged = [packed for packed in packed_linears(module).values() if packed.kernel is not None]
    held = sum(packed.kernel.packed.nbytes + packed.kernel.pairs.nbytes for packed in arranged)
    replaced = sum(packed.steps.nbytes + packed.zeros.nbytes for packed in arranged)
    return held - replaced + sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def median_and_quartiles(seconds: list[float]) -> dict[str, float]:
    """{seconds (their median), low, high, count}."""
    low, median, high = (float(value) for value in np.percentile(seconds, (25, 50, 75)))
    return {"seconds": median, "low": low, "high": high, "count": len(seconds)}
