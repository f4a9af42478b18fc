"""Bytes and floating-point operations per token, from a model's shape alone (QTALE Sec. 4, Table 3).

FLOPs are twice the multiply-accumulates of the linear layers that a token runs. Attention scores, norms and
activations are left out, as in Table 3: they depend on the context or weigh little. Nothing here needs torch
or weights; a `config` is a Hugging Face config of a Llama, Mistral, Qwen2 or Qwen3 model, or a `Shape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_lib.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from qtale_lib.adaptive import RouterConfig

GIB = 2**30
GIGA = 10**9
STEP_BITS = 16  # a group's step; its zero point takes as many bits as its codes, as AWQ packs them


@dataclass(frozen=True)
class Shape:
    """The numbers of a Hugging Face config that bytes and FLOPs follow from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    model_type: str = "llama"
    tie_word_embeddings: bool = False
    head_dim: int | None = None  # hidden_size / num_attention_heads


LLAMA2_7B = Shape(4096, 11008, 32, 32, 32, 32000)
LLAMA31_8B = Shape(4096, 14336, 32, 32, 8, 128256)
LLAMA32_3B = Shape(3072, 8192, 28, 24, 8, 128256, tie_word_embeddings=True)
LLAMA32_1B = Shape(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True)
SMOLLM2_135M = Shape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True)
# of the bases in profiles/, to estimate with before there is a config.json
ON_THE_HUB = {
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
    "meta-llama/Llama-3.2-1B": LLAMA32_1B,
    "meta-llama/Llama-3.2-3B": LLAMA32_3B,
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Llama-3.1-8B": LLAMA31_8B,
}


def layer_linears(config: PreTrainedConfig | Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of one decoder layer; k and v are narrower under grouped-query attention."""
    d, ffn = config.hidden_size, config.intermediate_size
    head = _head_dim(config)
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "o_proj": (d, q),
        "gate_proj": (ffn, d),
        "up_proj": (ffn, d),
        "down_proj": (d, ffn),
    }


def layer_macs(config: PreTrainedConfig | Shape) -> int:
    """Multiply-accumulates of one decoder layer's linears for one token."""
    return sum(out * width for out, width in layer_linears(config).values())


def flops_per_token(
    config: PreTrainedConfig | Shape, execution_ratio: float = 1.0, routers: RouterConfig | None = None
) -> dict[str, float]:
    """FLOPs of one token: "layers" (what Table 3 counts), "routers", "lm_head" and "total".

    Args:
        execution_ratio: R_avg, executed over all (token, layer) pairs.
        routers: shape of the routers, which run for every token; None for a model without.
    """
    parts = {
        "layers": 2 * config.num_hidden_layers * layer_macs(config) * execution_ratio,
        "routers": 2 * routed_layers(config, routers) * _router_macs(config, routers),
        "lm_head": 2 * config.vocab_size * config.hidden_size,
    }
    return {**parts, "total": sum(parts.values())}


def model_bytes(
    config: PreTrainedConfig | Shape,
    bits: int = 16,
    group_size: int = 128,
    lm_head_bits: int = 16,
    routers: RouterConfig | None = None,
) -> dict[str, float]:
    """Bytes of a model as it would be packed: by part, and "total".

    Parts: "codes" and "groups" (steps in 16 bits, zero points in `bits`) of decoder linears, "norms" (with
    biases), "embedding", "lm_head" (nothing if tied and in 16 bits) and "routers" (float32, as they run).

    Raises:
        UserError: if `group_size` (-1 is a whole row) does not divide a layer's width.
    """
    d, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    linears = [shape for shape in layer_linears(config).values() for _ in range(layers)]
    head = _linear_bits(vocabulary, d, lm_head_bits, group_size)
    tied = config.tie_word_embeddings and lm_head_bits == 16
    parts = {
        "codes": sum(out * width * bits for out, width in linears),
        "groups": sum(_group_bits(out, width, bits, group_size) for out, width in linears),
        "norms": 16 * (layers * _layer_vector_weights(config) + d),
        "embedding": 16 * vocabulary * d,
        "lm_head": 0 if tied else head,
        "routers": 32 * routed_layers(config, routers) * router_weights(config, routers),
    }
    parts = {name: count / 8 for name, count in parts.items()}
    return {**parts, "total": sum(parts.values())}


def file_bytes(directory: str | Path) -> int:
    """Real bytes of a saved model's safetensors files.

    Raises:
        UserError: if there is none.
    """
    files = list(Path(directory).glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} holds no safetensors file: save the model there first.")
    return sum(file.stat().st_size for file in files)


def _head_dim(config: PreTrainedConfig | Shape) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer_vector_weights(config: PreTrainedConfig | Shape) -> int:
    """Norm weights and biases of one decoder layer; q and k norms in Qwen3, q, k, v biases in Qwen2."""
    linears = layer_linears(config)
    biased = {"qwen2": ("q_proj", "k_proj", "v_proj")}.get(config.model_type, ())
    if getattr(config, "attention_bias", False):
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    if getattr(config, "mlp_bias", False):
        biased = (*biased, "gate_proj", "up_proj", "down_proj")
    head_norms = 2 * _head_dim(config) if config.model_type == "qwen3" else 0
    return 2 * config.hidden_size + head_norms + sum(linears[name][0] for name in biased)


def _linear_bits(out: int, width: int, bits: int, group_size: int) -> int:
    return out * width * bits + _group_bits(out, width, bits, group_size)


def _group_bits(out: int, width: int, bits: int, group_size: int) -> int:
    """Bits of the steps and zero points of a quantized linear; none in 16 bits."""
    group = width if group_size == -1 else group_size
    if bits == 16:
        return 0
    if width % group:
        raise UserError(
            f"group size {group} does not divide a layer of {width} input columns: choose another."
        )
    return out * (width // group) * (STEP_BITS + bits)


def routed_layers(config: PreTrainedConfig | Shape, routers: RouterConfig | None) -> int:
    """How many layers have a router; none without `routers`."""
    return 0 if routers is None else config.num_hidden_layers - routers.always_run_layers


def router_hidden(config: PreTrainedConfig | Shape, routers: RouterConfig) -> int:
    """Width between a router's two linear maps."""
    return routers.hidden or max(1, config.hidden_size // 8)


def _router_macs(config: PreTrainedConfig | Shape, routers: RouterConfig | None) -> int:
    """Linear(d -> h) and Linear(h -> 2)."""
    return 0 if routers is None else router_hidden(config, routers) * (config.hidden_size + 2)


def router_weights(config: PreTrainedConfig | Shape, routers: RouterConfig | None) -> int:
    """Weights of one router: both linears with their biases, and the norm between them."""
    return 0 if routers is None else _router_macs(config, routers) + 2 * router_hidden(config, routers) + 2
