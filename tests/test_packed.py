"""Packed weights: bits in and out, layers against dequantised ones, models against fake-quantized ones."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import both, make_model, run
from torch import nn

from qtale_lib.errors import UserError
from qtale_lib.quantization import int4_kernels, packed_linear, quantize
from qtale_lib.quantization.bitpack import pack_codes, packed_width, unpack_codes
from qtale_lib.quantization.kernel_timing import switch_over
from qtale_lib.quantization.packed import pack, packed_bytes, packed_linears
from qtale_lib.quantization.packed_linear import PackedLinear

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
KERNEL_TOLERANCE = 1e-2  # of the largest output: bfloat16 holds 8 bits, and the kernel rounds steps to it
has_kernel = pytest.mark.skipif(int4_kernels._cpu_row_order() is None, reason="no int4 kernel on this CPU")


def make_layer(bits, out, groups, group, seed=0, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, groups * group), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, generator=generator)
    steps = torch.rand(out, groups, generator=generator) / 2**bits
    offset = torch.randn(out, generator=generator).to(dtype) if bias else None
    return PackedLinear.from_codes(codes, steps, zeros, bits, offset, dtype), codes, zeros, steps


def values(codes, zeros, steps, dtype):
    group = codes.shape[1] // steps.shape[1]
    whole = [t.float().repeat_interleave(group, 1) for t in (zeros, steps)]
    return ((codes.float() - whole[0]) * whole[1]).to(dtype)


# --- bits


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), count=st.integers(1, 50), seed=st.integers(0, 9999))
def test_codes_come_back_from_as_few_bytes_as_hold_them(bits, rows, count, seed):
    codes = torch.randint(
        0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, count), codes)
    assert packed.shape == (rows, bits, packed_width(count))
    if count % 8 == 0:
        assert packed.numel() * 8 == codes.numel() * bits  # no bit is wasted


def test_three_bit_bytes_are_these():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    word = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    assert pack_codes(codes, 3).flatten().tolist() == list(word.to_bytes(3, "little"))


# --- one layer


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    out=st.integers(1, 70),
    groups=st.integers(1, 4),
    group=st.sampled_from([1, 3, 8, 20, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9999),
)
def test_a_layer_holds_its_codes_and_dequantises_exactly(bits, out, groups, group, dtype, seed):
    layer, codes, zeros, steps = make_layer(bits, out, groups, group, seed, dtype)
    assert torch.equal(layer.unpacked(), codes)
    assert torch.equal(layer.zero_points(), zeros)
    assert torch.equal(layer.dequantize(), values(codes, zeros, steps, dtype))
    assert torch.equal(layer.dequantize(torch.float32), values(codes, zeros, steps, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (2, 3), (100,)])
def test_a_layer_multiplies_as_a_linear_with_its_weights(bits, dtype, shape):
    layer, *_ = make_layer(bits, 131, 3, 32, dtype=dtype)
    inputs = torch.randn(*shape, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = nn.functional.linear(inputs, layer.dequantize(dtype), layer.bias)
    output = layer(inputs)
    assert output.shape == expected.shape and output.dtype == dtype
    if expected.numel():
        tolerance = 1e-6 if dtype == torch.float32 else KERNEL_TOLERANCE
        assert (output - expected).abs().max() <= tolerance * expected.abs().max()


def test_rows_dequantised_in_chunks_are_rows_dequantised_at_once(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        layer, *_ = make_layer(4, 200, 2, 64, dtype=dtype)
        inputs = torch.randn(150, 128).to(dtype)
        whole = layer(inputs)
        monkeypatch.setattr(packed_linear, "CHUNK", 128 * 64)
        assert torch.allclose(layer(inputs), whole, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)
        monkeypatch.undo()


@has_kernel
@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 200),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 128, 256]),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 9999),
)
def test_the_cpu_kernel_agrees_with_dequantised_weights(out, groups, group, tokens, seed):
    layer, codes, *_ = make_layer(4, out, groups, group, seed, torch.bfloat16, bias=False)
    assert layer.kernel is not None and layer.codes is None
    inputs = torch.randn(tokens, groups * group, generator=torch.Generator().manual_seed(seed)).bfloat16()
    exact = inputs.double() @ layer.dequantize(torch.float32).double().T
    scale = (inputs.double().abs() @ layer.dequantize(torch.float32).double().abs().T).max()
    assert (layer._by_kernel(inputs).double() - exact).abs().max() <= KERNEL_TOLERANCE * scale
    assert torch.equal(layer.unpacked(), codes)


@has_kernel
def test_the_kernel_runs_for_few_bfloat16_tokens_only(monkeypatch):
    layer, *_ = make_layer(4, 64, 1, 32, dtype=torch.bfloat16)
    calls = []
    monkeypatch.setattr(
        PackedLinear,
        "_by_kernel",
        lambda self, rows: calls.append(len(rows)) or rows.new_zeros(len(rows), 64),
    )
    limit = layer.kernel.tokens
    for count in (1, limit, limit + 1):
        layer(torch.randn(count, 32).bfloat16())
    layer(torch.randn(1, 32))  # float32
    layer(torch.randn(1, 32).bfloat16().requires_grad_())
    assert calls == [1, limit]


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(3, 32, torch.bfloat16), (4, 48, torch.bfloat16), (4, 32, torch.float32)]
)
def test_other_settings_have_no_kernel(bits, group, dtype):
    assert make_layer(bits, 64, 2, group, dtype=dtype)[0].kernel is None


def test_without_a_kernel_weights_are_dequantised(monkeypatch):
    monkeypatch.setattr(int4_kernels, "_cpu_row_order", lambda: None)
    layer, codes, zeros, steps = make_layer(4, 64, 1, 32, dtype=torch.bfloat16, bias=False)
    assert layer.kernel is None
    inputs = torch.randn(2, 32).bfloat16()
    assert torch.equal(layer(inputs), inputs @ values(codes, zeros, steps, torch.bfloat16).T)


def test_a_layout_that_no_block_explains_is_no_kernel(monkeypatch):
    shuffled = int4_kernels._convert_on_cpu
    monkeypatch.setattr(int4_kernels, "_convert_on_cpu", lambda codes: shuffled(codes.flip(1).cumsum(1) % 16))
    assert int4_kernels._cpu_row_order.__wrapped__() is None


def test_tiles_in_any_order_are_found_and_undone(monkeypatch):
    """The CUDA kernel's layout, played by tiles of 8 × 128 in a random order."""
    order = torch.randperm(8 * 128, generator=torch.Generator().manual_seed(0))

    def convert(codes, tiles):
        by_tile = codes.view(len(codes) // 8, 8, -1, 128).transpose(1, 2).reshape(-1, 8 * 128)[:, order]
        return (by_tile[:, ::2] | by_tile[:, 1::2] << 4).view(torch.int32)

    monkeypatch.setattr(int4_kernels, "_convert_on_cuda", convert)
    found = int4_kernels._tile_order.__wrapped__(256, torch.device("cpu"))
    assert torch.equal(found, order)
    codes = int4_kernels._random_codes(24, 256)
    assert torch.equal(int4_kernels._untile(convert(codes, 8), found, 256), codes)


def test_gradients_reach_the_inputs():
    layer, *_ = make_layer(4, 20, 2, 32, dtype=torch.bfloat16)
    inputs = torch.randn(3, 64).bfloat16().requires_grad_()
    layer(inputs).sum().backward()
    assert torch.allclose(inputs.grad, layer.dequantize().sum(0).expand(3, 64), atol=2e-2)


def test_conversions_keep_steps_and_codes_and_follow_the_kernel():
    layer, codes, zeros, steps = make_layer(4, 70, 2, 32)
    assert layer.kernel is None
    layer.to(torch.bfloat16)
    assert (layer.kernel is not None) == (int4_kernels._cpu_row_order() is not None)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.unpacked(), codes)
    state = layer.state_dict()
    assert torch.equal(unpack_codes(state["codes"], 64), codes) and torch.equal(state["steps"], steps)
    layer.float()
    assert layer.kernel is None and torch.equal(
        layer.dequantize(), values(codes, zeros, steps, torch.float32)
    )
    assert torch.equal(copy.deepcopy(layer).dequantize(), layer.dequantize())


# --- whole models


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 32), (2, -1), (8, 16)])
def test_a_packed_float32_model_is_the_fake_quantized_one(family, routed, bits, group):
    fake, packed = both(bits, group, family=family, routed=routed)
    (expected, routes), (logits, others) = run(fake), run(packed)
    assert torch.equal(logits, expected)
    if routed:
        assert torch.equal(routes, others)
        assert 0.2 < routes[2:].float().mean() < 0.95
    assert len(packed_linears(packed)) == 7 * 4 and type(packed.lm_head) is nn.Linear


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_weights_are_the_same_bits_in_16_bit_types(bits, dtype):
    fake, packed = both(bits, lm_head_bits=bits, dtype=dtype)
    for name, layer in packed_linears(packed).items():
        assert torch.equal(layer.dequantize(), fake.get_submodule(name).weight), name
    assert "lm_head" in packed_linears(packed)


@has_kernel
def test_a_packed_bfloat16_model_is_the_fake_quantized_one_to_a_tolerance():
    fake, packed = both(4, dtype=torch.bfloat16)
    (few, _), (many, _) = run(packed, 1, 12), run(packed, 4, 30)
    expected_few, expected_many = run(fake, 1, 12)[0], run(fake, 4, 30)[0]
    assert torch.equal(many, expected_many)
    assert (few - expected_few).abs().max() <= 0.05 * expected_few.abs().max()


@pytest.mark.parametrize("method", ["awq", "gptq", "magr_gptq"])
def test_a_search_is_packed_as_well(method):
    from small_models import TOKENIZER, WORDS, tiny_llama

    texts = [" ".join(WORDS[i : i + 8]) for i in range(0, 32, 4)]
    fake = quantize(tiny_llama(len(TOKENIZER)), TOKENIZER, texts, method, bits=3, group_size=16)
    packed = pack(copy.deepcopy(fake))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, fake(ids).logits)


def test_a_tied_head_in_few_bits_leaves_the_embedding_alone():
    fake, packed = both(4, lm_head_bits=4, tied=True)
    assert torch.equal(run(packed)[0], run(fake)[0])
    assert packed.model.embed_tokens.weight.dtype == torch.float32


def test_greedy_text_is_the_same():
    fake, packed = both(3, routed=True)
    ids = torch.arange(6)[None]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(ids, **options), fake.generate(ids, **options))


def test_half_steps_move_weights_by_their_rounding_only():
    fake, _ = both(4)
    packed = pack(copy.deepcopy(fake), step_dtype=torch.float16)
    for name, layer in packed_linears(packed).items():
        weight = fake.get_submodule(name).weight
        assert ((layer.dequantize() - weight).abs() <= 2**-11 * weight.abs() + 1e-8).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_are_those_of_the_formula(bits):
    from qtale_lib.efficiency import model_bytes

    model = quantize(make_model(dtype=torch.bfloat16), method="rtn", bits=bits, group_size=32)
    formula = model_bytes(model.config, bits, 32)
    exact, half = (pack(copy.deepcopy(model), dtype) for dtype in (torch.float32, torch.float16))
    assert packed_bytes(half) == formula["total"]
    groups = sum(layer.steps.numel() for layer in packed_linears(half).values())
    assert packed_bytes(exact) == formula["total"] + 2 * groups


def test_what_cannot_be_packed_is_refused():
    model = make_model()
    with pytest.raises(UserError, match="call quantize"):
        pack(model)
    quantize(model, method="rtn", group_size=32)
    with pytest.raises(UserError, match="float16"):
        pack(model, step_dtype=torch.bfloat16)
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        pack(changed)
    pack(model)
    with pytest.raises(UserError, match="already"):
        pack(model)
    with pytest.raises(UserError, match="already quantized"):
        quantize(model, method="rtn")


def test_the_switch_over_can_be_measured():
    rows = switch_over(64, 64, 32, tokens=(1, 2))
    assert [row["tokens"] for row in rows] == [1, 2]
    assert all(row[way] > 0 for row in rows for way in ("kernel", "dequantised", "float"))
