"""Small random models of every family, routed or not, quantized and packed."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qtale_lib.adaptive import RouterConfig, add_routers, record_routes, set_threshold
from qtale_lib.quantization import quantize
from qtale_lib.quantization.packed import pack

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make_model(family="llama", dtype=torch.float32, routed=False, tied=False, seed=0, **sizes):
    """Weights large enough that predictions differ; all biases and norms random, as trained ones are."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 70,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    config = CONFIGS[family](**shape | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return route(model) if routed else model


def route(model):
    """Routers that pass and block in about equal parts, at θ = 0.4."""
    add_routers(model, RouterConfig(hidden=8, bypass_bias=0.0, execute_bias=0.0)).eval()
    for layer in model.model.layers[2:]:
        torch.nn.init.normal_(layer.router.score.weight, std=2.0)
    set_threshold(model, 0.4)
    return model


def both(bits=4, group_size=32, lm_head_bits=16, method="rtn", **kwargs):
    """(the fake-quantized model, the same packed)."""
    fake = quantize(
        make_model(**kwargs), method=method, bits=bits, group_size=group_size, lm_head_bits=lm_head_bits
    )
    return fake, pack(copy.deepcopy(fake))


def run(model, batch=2, length=20, seed=3):
    """(logits, executed or None) for fixed random tokens."""
    ids = torch.randint(0, 70, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        if not hasattr(model.model, "routing"):
            return model(ids, use_cache=False).logits, None
        with record_routes(model) as routes:
            logits = model(ids, use_cache=False).logits
        return logits, routes.executed
