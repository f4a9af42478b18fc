"""Quantizers against brute force, their own float model, and autoawq."""

import copy
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small_models import WORDS, tiny_llama, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qtale_lib.adaptive import RouterConfig, add_routers, record_routes, set_threshold
from qtale_lib.errors import UserError
from qtale_lib.quantization import apply_search, fake_quantize, quantize, save_search
from qtale_lib.quantization.apply import decoder_linears, fold_into_producers
from qtale_lib.quantization.awq import folded_linears, search_clip, search_scale
from qtale_lib.quantization.statistics import READERS, InputStatistics, enter, run_layer, tokenize

TOKENIZER = word_tokenizer()
needs_autoawq = pytest.mark.skipif(find_spec("awq") is None, reason="autoawq is not installed")
LINEARS = [name for readers in READERS.values() for name in readers]


def make_texts(count=12, seed=0, longest=14):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(3, longest))) for _ in range(count)]


def make_model(layers=4, seed=0):
    return tiny_llama(len(TOKENIZER), layers, seed)


def make_routed(layers=5, seed=0):
    """A routed model whose random routers let some tokens through and stop others."""
    model = add_routers(make_model(layers, seed), RouterConfig(hidden=8))
    torch.manual_seed(seed)
    for layer in model.model.layers[2:]:
        for parameter in layer.router.parameters():
            torch.nn.init.normal_(parameter)
    return model


def bypass_always(layer):
    """Set a router's last layer by hand: bypass, whatever the token."""
    last = list(layer.router.modules())[-1]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([-9.0, 9.0]))


def logits(model, seed=5):
    ids = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def linear_calls(model, row):
    """(inputs, outputs) [tokens, ...] of each decoder linear, by full name, for one row of tokens."""
    calls = {}
    hooks = [
        linear.register_forward_hook(
            lambda _, args, out, name=name: calls.update({name: (args[0][0], out[0])})
        )
        for name, linear in decoder_linears(model).items()
    ]
    with torch.no_grad():
        model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return calls


# --- the grid


def brute_force(weight, bits, group):
    """Nearest of the 2^bits values of each group, found by looking at all of them."""
    result = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            low, high = min(part.min(), 0), max(part.max(), 0)
            step = (high - low) / (2**bits - 1) or 1
            zero = round(-low / step)
            values = (np.arange(2**bits) - zero) * step
            result[row, start : start + group] = [values[np.abs(values - w).argmin()] for w in part]
    return result


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    group=st.integers(1, 9),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_rounding_finds_the_nearest_value_of_the_grid(bits, rows, groups, group, shift, seed):
    weight = np.random.default_rng(seed).normal(shift, 1, (rows, groups * group))
    rounded = fake_quantize(torch.tensor(weight), bits, group)
    expected = brute_force(weight, bits, group)
    step = np.ptp(np.append(weight, 0)) / (2**bits - 1)
    # a weight midway between two values may go to either: then both are equally near
    assert np.allclose(np.abs(rounded.numpy() - weight), np.abs(expected - weight), atol=1e-9)
    assert np.abs(rounded.numpy() - expected).max() <= step + 1e-9
    if groups == 1:
        assert torch.equal(fake_quantize(torch.tensor(weight), bits, -1), rounded)


def test_zeros_stay_zeros():
    weight = torch.randn(3, 8)
    weight[:, ::3] = 0
    weight[1] = 0
    assert (fake_quantize(weight, 2, 4)[weight == 0] == 0).all()


@settings(max_examples=8, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.sampled_from([1, 2, 8, 16, -1]),
    method=st.sampled_from(["rtn", "awq", "gptq"]),
)
def test_weights_lie_on_a_grid_in_each_group(bits, group_size, method):
    model = quantize(make_model(2), TOKENIZER, make_texts(4), method, bits, group_size)
    for linear in decoder_linears(model).values():
        width = linear.in_features if group_size == -1 else group_size
        for group in linear.weight.detach().double().reshape(-1, width)[:50]:
            values = group.unique()
            assert len(values) <= 2**bits
            if len(values) > 2:
                steps = values.diff() / values.diff().min()
                # neighbours are whole multiples of the step apart, of which the least gap may hold several
                assert any(
                    torch.allclose(steps * k, (steps * k).round(), atol=2e-3) for k in range(1, 2**bits)
                )


# --- settings that cannot be


def test_a_group_that_does_not_divide_is_named_with_those_that_do():
    with pytest.raises(UserError) as error:
        quantize(make_model(), method="rtn", group_size=32)
    message = str(error.value)
    assert "model.layers.0.mlp.down_proj" in message and " 48 " in message
    assert "1, 2, 4, 8, 16, or -1" in message


@pytest.mark.parametrize(
    ("settings_", "word"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": 16}, "bits"),
        ({"group_size": 0}, "group size"),
        ({"method": "gptq"}, "method"),
        ({"backend": "other"}, "backend"),
        ({"lm_head_bits": 7}, "lm_head_bits"),
        ({}, "texts"),
    ],
)
def test_impossible_settings_are_refused_in_a_sentence(settings_, word):
    with pytest.raises(UserError, match=word):
        quantize(make_model(), **{"group_size": 16, **settings_})


def test_unmerged_lora_is_refused_merged_is_not():
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge_and_unload"):
        quantize(model, TOKENIZER, make_texts(), group_size=16)
    quantize(model.merge_and_unload(), TOKENIZER, make_texts(), group_size=16)


def test_other_families_and_quantized_models_are_refused():
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(UserError, match="gpt2"):
        quantize(other, method="rtn")
    model = quantize(make_model(), method="rtn", group_size=16)
    with pytest.raises(UserError, match="already quantized"):
        quantize(model, method="rtn", group_size=16)


def test_texts_kept_and_dropped_are_counted():
    texts = ["w1 w2 w3", "", "w4 " * 30, "w5"]
    rows, record = tokenize(word_tokenizer(bos=False), texts, max_length=10)
    assert list(map(len, rows)) == [3, 1]
    counts = (record.texts, record.kept, record.dropped_empty, record.dropped_long, record.tokens)
    assert counts == (4, 2, 1, 1, 4)
    _, other = tokenize(word_tokenizer(bos=False), ["w1 w2", "w3 w5"], max_length=10)
    assert other.token_ids_sha256 != record.token_ids_sha256
    with pytest.raises(UserError, match="calibration texts"):
        tokenize(TOKENIZER, ["w4 " * 30], max_length=10)


@pytest.mark.parametrize("texts", ["one text", ["w1", 2], b"w1", 3])
def test_what_is_no_list_of_texts_is_refused_before_any_work(texts):
    model = tiny_llama(len(TOKENIZER))
    with pytest.raises(UserError, match=r"^texts \(\w+\) must be a list of texts; "):
        quantize(model, TOKENIZER, texts, bits=4, group_size=16)
    assert not hasattr(model, "quantization")


# --- folding


def family_model(config_class, **changes):
    torch.manual_seed(1)
    config = config_class(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        **changes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def fold_only(model, scales):
    """The float model with AWQ's scales in its weights and nothing rounded."""
    for i, layer in enumerate(model.model.layers):
        own = {producer: scales[f"model.layers.{i}.{producer}"] for producer in READERS}
        for linear in list(folded_linears(layer, own)):
            layer.get_submodule(linear.name).weight.data = linear.weight
        fold_into_producers(layer, own)
    return model


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (MistralConfig, {}),
        (Qwen2Config, {}),
        (Qwen3Config, {}),
    ],
)
def test_folding_scales_leaves_the_float_model_as_it_was(config_class, changes):
    model = family_model(config_class, **changes)
    before = logits(model)
    report = quantize(copy.deepcopy(model), TOKENIZER, make_texts(), bits=3, group_size=16).quantization
    for producer in READERS:
        assert any(
            not torch.allclose(report.scales[f"model.layers.{i}.{producer}"], torch.ones(1)) for i in range(3)
        )
    assert torch.allclose(logits(fold_only(model, report.scales)), before, atol=1e-5, rtol=1e-4)


def test_folding_scales_changes_no_route():
    model = make_routed()
    report = quantize(copy.deepcopy(model), TOKENIZER, make_texts(), bits=3, group_size=16).quantization
    with record_routes(model) as routes:
        logits(model)
    with record_routes(fold_only(model, report.scales)) as folded:
        logits(model)
    assert 0.2 < routes.executed.float().mean() < 0.95
    assert torch.equal(routes.executed, folded.executed)
    assert torch.allclose(routes.logits[2:], folded.logits[2:], atol=1e-4)


# --- searches


def rows_of_inputs(tokens=60, width=12, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    inputs = torch.randn(tokens, width, dtype=dtype) * torch.rand(width) * 4  # channels of unlike size
    moment = inputs.T @ inputs / tokens
    return inputs, InputStatistics(moment, inputs.abs().mean(0), tokens, tokens)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([4, 12]))
def test_scale_search_finds_the_least_measured_output_error(seed, bits, group):
    # in float64: in less, the same scale reached by another order of operations may round a weight elsewhere
    inputs, statistics = rows_of_inputs(seed=seed, dtype=torch.float64)
    weight = torch.randn(8, 12, dtype=torch.float64)

    def measured(scale):
        rounded = fake_quantize(weight * scale, bits, group)
        return ((inputs / scale) @ rounded.T - inputs @ weight.T).pow(2).sum().item()

    largest = weight.abs().unflatten(1, (-1, group)).amax(-1).repeat_interleave(group, dim=1)
    relative = (weight.abs() / largest).mean(0)
    grid = [torch.ones(12, dtype=torch.float64)]
    for step in range(20):
        scale = statistics.mean_abs ** (step / 20) / relative ** (1 - step / 20)
        grid.append(scale / (scale.max() * scale.min()).sqrt())
    _, found = search_scale([weight], statistics, bits, group)
    assert measured(found) <= min(map(measured, grid)) * (1 + 1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([2, 3]), group=st.sampled_from([3, 6, 12]))
def test_clip_search_finds_the_least_measured_output_error_of_each_group(seed, bits, group):
    inputs, statistics = rows_of_inputs(seed=seed)
    weight = torch.randn(5, 12) ** 3  # heavy tails
    clips = search_clip(weight, statistics.moment, bits, group)
    for row in range(5):
        for index in range(12 // group):
            part = slice(index * group, (index + 1) * group)
            own, seen = weight[row : row + 1, part], inputs[:, part]

            def measured(limit, own=own, seen=seen):
                rounded = fake_quantize(own.clamp(-limit, limit), bits, -1)
                return (seen @ (rounded - own).T).pow(2).mean().item()

            limits = [own.abs().max().item() * (1 - step / 20) for step in range(10)]
            assert measured(clips[row, index].item()) <= min(map(measured, limits)) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("method", ["awq", "rtn", "gptq", "magr_gptq"])
def test_reported_errors_are_those_that_the_float_inputs_see(method):
    model, texts = make_model(), make_texts()
    seen = {name: [] for name in decoder_linears(model)}
    for text in texts:
        for name, call in linear_calls(model, TOKENIZER(text)["input_ids"]).items():
            seen[name].append(call)
    float_model = copy.deepcopy(model)
    report = quantize(model, TOKENIZER, texts, method, bits=3, group_size=16).quantization
    produced = {name: producer for producer, names in READERS.items() for name in names}
    for row in report.linears:
        _, _, i, name = row["name"].split(".", 3)
        inputs, outputs = (torch.cat(parts) for parts in zip(*seen[row["name"]], strict=True))
        scale = report.scales.get(f"model.layers.{i}.{produced[name]}", torch.ones(1))
        answers = (inputs / scale) @ decoder_linears(model)[row["name"]].weight.T
        if (own := report.scales.get(row["name"])) is not None:
            copies = 2 if name == "self_attn.v_proj" else 1  # two query heads share a value head
            answers = answers * own.view(-1, copies, 8)[:, 0].flatten()
        assert row["error"] == pytest.approx((answers - outputs).pow(2).mean().item(), rel=1e-3)
        plain = fake_quantize(decoder_linears(float_model)[row["name"]].weight, 3, 16)
        assert row["error_rtn"] == pytest.approx((inputs @ plain.T - outputs).pow(2).mean().item(), rel=1e-3)
        assert row["power"] == pytest.approx(outputs.pow(2).mean().item(), rel=1e-3)
        assert row["tokens"] == len(inputs)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 100), bits=st.sampled_from([2, 3, 4]))
def test_awq_never_loses_to_rounding_by_its_own_objective(seed, bits):
    report = quantize(
        make_model(2, seed), TOKENIZER, make_texts(8, seed), bits=bits, group_size=-1
    ).quantization
    for i in range(2):
        for readers in READERS.values():
            names = {f"model.layers.{i}.{name}" for name in readers}
            rows = [row for row in report.linears if row["name"] in names]
            widths = {name: linear.out_features for name, linear in decoder_linears(make_model(2)).items()}
            awq, rtn = (sum(row[key] * widths[row["name"]] for row in rows) for key in ("error", "error_rtn"))
            assert awq <= rtn * (1 + 1e-4)


# --- routed models


def test_statistics_are_those_of_executed_tokens_alone():
    model, texts = make_routed(), make_texts()
    set_threshold(model, 0.4)
    rows, _ = tokenize(TOKENIZER, texts, 64)
    expected = {i: {name: [] for name in LINEARS} for i in range(5)}
    ran, every = 0, 0
    for row in rows:  # one text at a time: no padding at all
        with record_routes(model) as routes:
            inputs = {name: x for name, (x, _) in linear_calls(model, row).items()}
        for full_name, x in inputs.items():
            _, _, i, name = full_name.split(".", 3)
            expected[int(i)][name] += [x[t] for t in range(len(row)) if routes.executed[int(i), 0, t]]
        ran, every = ran + routes.executed[2:].sum().item(), every + routes.executed[2:].numel()
    assert 0.2 < ran / every < 0.9
    batches = enter(model, rows)
    for i in range(5):
        found, outputs = run_layer(model, i, batches)
        for batch, output in zip(batches, outputs, strict=True):
            batch.hidden = output
        for producer, readers in READERS.items():
            for name in readers:
                x = torch.stack(expected[i][name])
                statistics = found[producer]
                assert statistics.tokens == len(x)
                assert torch.allclose(statistics.moment, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
                assert torch.allclose(statistics.mean_abs, x.abs().mean(0), rtol=1e-3, atol=1e-5)


def test_a_layer_that_no_decision_executes_is_judged_on_all_tokens_and_named():
    model, texts = make_routed(), make_texts()
    bypass_always(model.model.layers[3])
    rows, _ = tokenize(TOKENIZER, texts, 64)
    report = quantize(model, TOKENIZER, texts, bits=3, group_size=16).quantization
    assert report.unchosen_layers == [3] and report.threshold == 0.5
    tokens = {row["name"]: row["tokens"] for row in report.linears}
    assert tokens["model.layers.3.mlp.up_proj"] == sum(map(len, rows))
    assert tokens["model.layers.2.mlp.up_proj"] < sum(map(len, rows))


def test_routers_norms_embeddings_and_head_keep_their_bits():
    model = make_routed()
    before = copy.deepcopy(model.state_dict())
    quantize(model, TOKENIZER, make_texts(), bits=3, group_size=16)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    folded = ("input_layernorm", "post_attention_layernorm")
    allowed = {name + ".weight" for name in decoder_linears(model)}
    allowed |= {f"model.layers.{i}.{norm}.weight" for i in range(5) for norm in folded}
    assert changed == allowed
    model = make_routed()
    quantize(model, method="rtn", bits=3, group_size=16)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name + ".weight" for name in decoder_linears(model)}


def test_head_is_rounded_on_request_and_untied():
    model = family_model(LlamaConfig, tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    quantize(model, method="rtn", bits=4, group_size=16, lm_head_bits=3)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.weight, fake_quantize(embedding, 3, 16))


# --- kept searches


@pytest.mark.parametrize("method", ["awq", "rtn", "gptq", "magr_gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_search_gives_the_same_model_bit_for_bit(tmp_path, method, dtype):
    model = make_routed().to(dtype)
    twin, other = copy.deepcopy(model), make_routed(seed=1).to(dtype)
    quantize(model, TOKENIZER, make_texts(), method, bits=3, group_size=16, lm_head_bits=4)
    save_search(model.quantization, tmp_path)
    apply_search(twin, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name
    assert twin.quantization.as_dict() == model.quantization.as_dict()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match="another model"):
        apply_search(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(UserError, match="no quantization search"):
        apply_search(make_model(), tmp_path / "nothing")


def test_quantization_is_deterministic_and_ignores_the_order_and_mode_of_training():
    model = make_routed()
    twin = copy.deepcopy(model).train()
    quantize(model, TOKENIZER, make_texts(), bits=3, group_size=16)
    quantize(twin, TOKENIZER, make_texts(), bits=3, group_size=16)
    assert twin.training
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


# --- autoawq


def plant_outliers(model, share=0.03, gain=8):
    """Norm gain × 8 on 3 % of the channels, the columns that follow / 8: outliers, the same function."""
    generator = torch.Generator().manual_seed(0)
    followers = {"input_layernorm": READERS["input_layernorm"]}
    followers["post_attention_layernorm"] = READERS["post_attention_layernorm"]
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, names in followers.items():
                gains = layer.get_submodule(norm).weight
                chosen = torch.randperm(len(gains), generator=generator)[: round(share * len(gains))]
                gains[chosen] *= gain
                for name in names:
                    layer.get_submodule(name).weight[:, chosen] /= gain
    return model


class NumberTokenizer:
    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


def outlier_case(kv_heads=4, seed=0):
    """A random Llama with planted outliers; 12 texts of 32 tokens: of one length, as autoawq joins texts."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.08,
    )
    model = plant_outliers(LlamaForCausalLM(config).eval())
    rows = torch.randint(0, 200, (12, 32), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    return model, rows, [" ".join(map(str, row)) for row in rows]


def layer_output_error(model, float_model):
    """Mean square error of a decoder layer's output, given the float model's input to it; summed over layers.

    On fresh tokens, not those of calibration.
    """
    calls, errors = {}, []
    for i, layer in enumerate(float_model.model.layers):
        keep = partial(lambda i, _, args, kwargs: calls.update({i: (args, kwargs)}), i)
        calls[f"hook {i}"] = layer.register_forward_pre_hook(keep, with_kwargs=True)
    logits(float_model, seed=77)
    for i, layer in enumerate(float_model.model.layers):
        calls[f"hook {i}"].remove()
        args, kwargs = calls[i]
        with torch.no_grad():
            errors.append(
                (model.model.layers[i](*args, **kwargs) - layer(*args, **kwargs)).pow(2).mean().item()
            )
    return sum(errors)


def quantize_as_autoawq_does(model, rows, bits, group_size):
    """autoawq from search to rounding, by its own code alone (but for its quantizer's CPU fault)."""
    from qtale_lib.quantization.autoawq_backend import RecordingQuantizer, RoutedAWQ

    model.config.use_cache = False
    wrapped = RoutedAWQ(model, "llama", False, model.config, None, None)
    wrapped.quantize(
        None,
        {"zero_point": True, "q_group_size": group_size, "w_bit": bits, "version": "GEMM"},
        calib_data=rows,
        export_compatible=True,
        max_calib_seq_len=len(rows[0]),
        quantizer_cls=RecordingQuantizer,
    )
    for linear in decoder_linears(model).values():
        linear.weight.data = wrapped.quantizer.pseudo_quantize_tensor(linear.weight.data)[0]
    return model


@needs_autoawq
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_awq_is_as_good_as_autoawq_and_better_than_rounding(bits, kv_heads):
    model, rows, texts = outlier_case(kv_heads)
    errors = {}
    for method in ("awq", "rtn"):
        ours = quantize(copy.deepcopy(model), NumberTokenizer(), texts, method, bits, 128)
        errors[method] = layer_output_error(ours, model)
    theirs = quantize_as_autoawq_does(copy.deepcopy(model), rows, bits, 128)
    errors["autoawq"] = layer_output_error(theirs, model)
    assert errors["awq"] <= 1.05 * errors["autoawq"]
    assert errors["awq"] < 0.75 * errors["rtn"]
    assert errors["autoawq"] < errors["rtn"]


@needs_autoawq
def test_autoawq_backend_does_what_autoawq_does_and_keeps_its_search(tmp_path):
    model, rows, texts = outlier_case()
    twin = copy.deepcopy(model)
    theirs = quantize_as_autoawq_does(copy.deepcopy(model), rows, 4, 128)
    quantize(model, NumberTokenizer(), texts, bits=4, group_size=128, backend="autoawq")
    ours, reference = decoder_linears(model), decoder_linears(theirs)
    for name, linear in ours.items():  # a rounding tie may fall to either side
        assert torch.isclose(linear.weight, reference[name].weight, rtol=1e-4).float().mean() > 0.999, name
    assert model.quantization.calibration["blocks"] == 12
    save_search(model.quantization, tmp_path)
    apply_search(twin, tmp_path)
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in model.state_dict().items())


@needs_autoawq
def test_autoawq_backend_keeps_the_function_on_a_cpu():
    """Its search writes into the weights that it means to restore, unless it is handed copies of them."""
    model, _, texts = outlier_case()
    before = logits(model)
    after = logits(quantize(model, NumberTokenizer(), texts, bits=8, backend="autoawq"))
    assert (after - before).pow(2).mean() < 0.01 * before.pow(2).mean()


@needs_autoawq
def test_autoawq_backend_on_a_routed_model():
    model, _, texts = outlier_case()
    add_routers(model, RouterConfig(hidden=8, always_run_layers=1))
    torch.nn.init.normal_(list(model.model.layers[1].router.modules())[-1].weight)
    routers = {name: t.clone() for name, t in model.state_dict().items() if ".router." in name}
    before = logits(model)
    quantize(model, NumberTokenizer(), texts, bits=8, backend="autoawq")
    assert set(model.quantization.clips) >= {"model.layers.2.mlp.up_proj", "model.layers.0.self_attn.v_proj"}
    assert not any("router" in name for name in model.quantization.clips)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in routers.items())
    assert (logits(model) - before).pow(2).mean() < 0.05 * before.pow(2).mean()


def test_autoawq_backend_says_when_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "qtale_lib.quantization.autoawq_backend", None)
    with pytest.raises(UserError, match="pip install autoawq"):
        quantize(make_model(), TOKENIZER, make_texts(), group_size=16, backend="autoawq")


@needs_autoawq
def test_autoawq_backend_says_which_shapes_it_cannot_take():
    with pytest.raises(UserError, match="multiples of 64"):
        quantize(make_model(), TOKENIZER, make_texts(), group_size=16, backend="autoawq")
    with pytest.raises(UserError, match="group size -1"):
        quantize(make_model(), TOKENIZER, make_texts(), group_size=-1, backend="autoawq")
