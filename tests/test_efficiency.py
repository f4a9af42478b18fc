"""Bytes and FLOPs against real modules, counted operations, saved files and the paper's Table 3."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qtale_lib.adaptive import RouterConfig, add_routers
from qtale_lib.efficiency import (
    LLAMA2_7B,
    LLAMA31_8B,
    file_bytes,
    flops_per_token,
    layer_linears,
    model_bytes,
)
from qtale_lib.errors import UserError

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = [
    LlamaConfig(**SMALL),
    LlamaConfig(**SMALL | {"attention_bias": True, "mlp_bias": True}),
    LlamaConfig(**SMALL | {"tie_word_embeddings": True}),
    MistralConfig(**SMALL),
    Qwen2Config(**SMALL),
    Qwen3Config(**SMALL | {"head_dim": 16}),
]
CONFIG_NAMES = ["llama", "llama with biases", "llama tied", "mistral", "qwen2", "qwen3"]
REAL = {
    "7B": (LLAMA2_7B, {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}),
    "8B": (LLAMA31_8B, {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}),
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", REAL)
def test_reference_shapes_are_those_of_real_modules(name):
    shape, public = REAL[name]
    model = on_meta(LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **public))
    linears = model.model.layers[0].named_modules()
    linears = {n.split(".")[-1]: m for n, m in linears if isinstance(m, torch.nn.Linear)}
    assert layer_linears(shape) == {n: tuple(m.weight.shape) for n, m in linears.items()}
    assert model_bytes(shape)["total"] == 2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
def test_bytes_in_16_bits_are_two_for_each_parameter_but_the_routers(config):
    model = on_meta(config)
    parts = model_bytes(config)
    assert parts["total"] == 2 * sum(p.numel() for p in model.parameters())
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["groups"] == parts["routers"] == 0
    routers = RouterConfig(hidden=6, always_run_layers=1)
    add_routers(model, routers)
    of_routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    assert of_routers and model_bytes(config, routers=routers)["routers"] == 4 * of_routers  # float32
    assert model_bytes(config, routers=routers)["total"] == parts["total"] + 4 * of_routers


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_NAMES)
@pytest.mark.parametrize("hidden", [None, 6])
def test_flops_are_those_of_the_matrix_products_that_run(config, hidden):
    routers = RouterConfig(hidden=hidden, always_run_layers=1)
    model = add_routers(AutoModelForCausalLM.from_config(config), routers).eval()
    tokens = 5
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None], use_cache=False)
    products = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in products.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert flops_per_token(config, 1.0, routers)["total"] == counted / tokens


def test_execution_ratio_scales_the_layers_alone():
    routers = RouterConfig()
    whole, half = flops_per_token(LLAMA2_7B, 1.0, routers), flops_per_token(LLAMA2_7B, 0.5, routers)
    assert half["layers"] == whole["layers"] / 2
    assert (half["routers"], half["lm_head"]) == (whole["routers"], whole["lm_head"])
    assert whole["routers"] == 2 * 30 * (4096 * 512 + 512 * 2)
    assert flops_per_token(LLAMA2_7B)["routers"] == 0


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 4, 16]),
    head_bits=st.sampled_from([16, 4]),
)
def test_quantized_bytes_count_every_code_step_and_zero_point(bits, group_size, head_bits):
    config = CONFIGS[0]
    model = on_meta(config)

    def packed(linear, width):  # bits, one weight and one group at a time
        group = linear.in_features if group_size == -1 else group_size
        codes = sum(width for _ in range(linear.in_features))
        groups = sum(16 + width for _ in range(0, linear.in_features, group))
        return linear.out_features * (codes + groups)

    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    head = packed(model.lm_head, head_bits) if head_bits < 16 else 16 * model.lm_head.weight.numel()
    rest = sum(p.numel() for n, p in model.named_parameters() if "norm" in n or "embed" in n)
    total = sum(packed(linear, bits) for linear in linears) + head + 16 * rest
    assert model_bytes(config, bits, group_size, head_bits)["total"] == total / 8


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="32"):
        model_bytes(CONFIGS[0], 4, 32)


def test_file_bytes_are_those_on_disk(tmp_path):
    with pytest.raises(UserError, match="safetensors"):
        file_bytes(tmp_path)
    AutoModelForCausalLM.from_config(CONFIGS[0]).to(torch.bfloat16).save_pretrained(tmp_path)
    header = file_bytes(tmp_path) - model_bytes(CONFIGS[0])["total"]
    assert 0 < header < 10_000


def test_counting_needs_no_torch():
    code = "import sys, qtale_lib.paper_arithmetic as p; p.checks(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
