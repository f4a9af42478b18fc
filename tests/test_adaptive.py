"""Routed models against a plain per-token loop, finite differences and the base model itself."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from plain_decoder import PlainDecoder
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from qtale_lib import routed_layers
from qtale_lib.adaptive import (
    RouterConfig,
    add_routers,
    record_routes,
    set_execution,
    set_noise,
    set_threshold,
)
from qtale_lib.errors import UserError
from qtale_lib.losses import counted_tokens, rate_loss
from qtale_lib.routing import EXECUTE, gumbel

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
LENGTH = 11


def make_base(family="llama", attention="sdpa", layers=5, seed=0, **changes):
    config_class, model_class, extra = FAMILIES[family]
    shape = {
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "initializer_range": 0.25,  # logits that a wrong mask would move
    }
    torch.manual_seed(seed)
    config = config_class(**{**shape, **extra, **changes}, attn_implementation=attention)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_routed(family="llama", attention="sdpa", *, double=True, router=None, **changes):
    """A model whose random routers send about half of the tokens past each routed layer."""
    model = add_routers(make_base(family, attention, **changes), router)
    for module in model.modules():
        if isinstance(module, routed_layers.Router):
            torch.nn.init.normal_(module.score.weight, std=1.5)
            torch.nn.init.zeros_(module.score.bias)
    return model.double() if double else model


def tokens(batch=3, length=LENGTH, seed=0):
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(model, ids, **kwargs):
    """Logits and a recorder's routes of one forward pass without gradients."""
    with torch.no_grad(), record_routes(model) as routes:
        logits = model(ids, **kwargs).logits
    return logits, routes


def mixed(routes):
    """Decisions that a test can tell apart: every routed layer both runs and is bypassed."""
    ratio = routes.executed[routes.routed_layers].double().mean((1, 2))
    return bool(((ratio > 0.2) & (ratio < 0.99)).all())


def undecided(routes):
    """A gap so near to arg max's threshold that float32 rounding may turn it."""
    return bool(
        ((routes.logits[routes.routed_layers].diff(dim=-1).abs() < 1e-4).any(-1) & routes.valid).any()
    )


# --- evaluation against the plain loop ----------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_evaluation_is_the_per_token_loop(family, attention):
    model, ids, theta = make_routed(family, attention), tokens(), 0.55
    set_threshold(model, theta)
    logits, routes = run(model, ids)
    assert mixed(routes)
    plain = PlainDecoder(model)
    for b in range(len(ids)):
        expected, executed = plain.by_token(
            ids[b], lambda _, t, z: t < 2 or torch.softmax(z, -1)[EXECUTE] >= theta
        )
        assert torch.equal(routes.executed[:, b], executed)
        torch.testing.assert_close(logits[b], expected, rtol=1e-5, atol=1e-5)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    head_dim=st.sampled_from([2, 4]),
    layers=st.integers(2, 4),
    always=st.tuples(st.integers(0, 1), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_small_shape_is_the_per_token_loop(family, heads, head_dim, layers, always, seed):
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": head_dim}
    shape["hidden_size"] = heads[0] * head_dim
    router = RouterConfig(hidden=3, always_run_layers=always[0], always_run_tokens=always[1])
    model, ids = make_routed(family, layers=layers, seed=seed, router=router, **shape), tokens(1, 7, seed)
    logits, routes = run(model, ids)
    expected, executed = PlainDecoder(model).by_token(ids[0], lambda _, t, z: t < always[1] or z[0] >= z[1])
    assert torch.equal(routes.executed[:, 0], executed)
    torch.testing.assert_close(logits[0], expected, rtol=1e-5, atol=1e-5)


def test_routers_read_the_raw_residual_stream():
    model, ids = make_routed(), tokens()
    with torch.no_grad(), record_routes(model) as routes:
        states = model(ids, output_hidden_states=True).hidden_states
        expected = model.model.layers[3].router(states[3])
    torch.testing.assert_close(routes.logits[3], expected, rtol=0, atol=1e-12)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward_is_the_per_token_loop_on_the_same_decisions(family, double):
    model, ids = make_routed(family, double=double).train(), tokens()
    logits, routes = run(model, ids)
    assert mixed(routes)
    plain = PlainDecoder(model)
    for b in range(len(ids)):
        expected, _ = plain.by_token(ids[b], lambda layer, t, _, b=b: routes.executed[layer, b, t])
        torch.testing.assert_close(logits[b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward_is_evaluation_on_the_same_decisions(family, padding_side, monkeypatch):
    model, ids = make_routed(family, double=False), tokens()
    mask = padding_mask([11, 7, 3], padding_side)
    monkeypatch.setattr(routed_layers, "gumbel", lambda shape, *_: torch.zeros(shape))  # arg max decisions
    evaluated, in_evaluation = run(model.eval(), ids, attention_mask=mask)
    trained, in_training = run(model.train(), ids, attention_mask=mask)
    assert torch.equal(in_training.executed, in_evaluation.executed)
    torch.testing.assert_close(trained[mask.bool()], evaluated[mask.bool()], rtol=1e-5, atol=1e-5)
    assert torch.equal(in_training.gates.bool() & mask.bool(), in_evaluation.executed)


def test_training_decisions_are_the_gumbel_rule_on_the_recorded_logits():
    model, ids = make_routed().train(), tokens()
    set_noise(model, torch.Generator().manual_seed(5))
    _, routes = run(model, ids)
    noise = gumbel((3, *ids.shape, 2), torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy = routes.logits[2:] + noise
    executes = noisy[..., 0] > noisy[..., 1]
    executes[..., :2] = True
    assert torch.equal(routes.executed[2:], executes)
    torch.testing.assert_close(routes.soft, torch.softmax(noisy, -1), rtol=1e-12, atol=1e-12)
    assert not torch.equal(
        executes[..., 2:], routes.logits[2:, :, 2:].argmax(-1) == EXECUTE
    )  # noise flipped some


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_straight_through_gradient_against_finite_differences(family):
    """dL/dlogits = dL/db, b a free input at the hard decision, times db-tilde/dlogits (Eq. 6, same noise)."""
    config = RouterConfig(tau=1.3)  # D-LLM's bound is out of reach here: the true slope
    model, ids = make_routed(family, router=config).train(), tokens(2, 7)
    readout = torch.randn(2, 7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = {}
    for index in (2, 3, 4):  # cut what earlier gates do to later routers: b is to be free in each layer
        router = model.model.layers[index].router
        router.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
        router.register_forward_hook(lambda _, __, out, i=index: out.retain_grad() or seen.update({i: out}))
    set_noise(model, torch.Generator().manual_seed(2))
    with record_routes(model) as routes:
        (model(ids).logits * readout).sum().backward()
    assert mixed(routes)
    noise = gumbel((3, 2, 7, 2), torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = gate_slopes(PlainDecoder(model), ids, routes.gates.detach(), readout)
    for slot, index in enumerate((2, 3, 4)):
        expected = slope[index, ..., None] * soft_slopes(seen[index].detach(), noise[slot], 1.3)
        expected[:, :2] = 0  # reserved tokens have no decision
        torch.testing.assert_close(seen[index].grad, expected, rtol=1e-4, atol=1e-6)
        bypassed = ~routes.executed[index]
        assert expected[bypassed].abs().max() > 1e-3  # the gradient reaches gates of bypassed tokens too


def gate_slopes(plain, ids, gates, readout, step=1e-6):
    """∂L/∂b by central differences over every gate, [L, B, T]."""
    slope = torch.zeros_like(gates)
    for at in gates.nonzero().tolist() + (gates == 0).nonzero().tolist():
        sides = []
        for sign in (1, -1):
            moved = gates.clone()
            moved[tuple(at)] += sign * step
            sides.append((plain.by_gates(ids, moved) * readout).sum())
        slope[tuple(at)] = (sides[0] - sides[1]) / (2 * step)
    return slope


def soft_slopes(logits, noise, tau, step=1e-6):
    """∂b̃/∂logits of the execute entry of Eq. 6 by central differences, [..., 2]."""

    def soft(z):
        powers = torch.exp((z + noise) / tau)
        return powers[..., EXECUTE] / powers.sum(-1)

    moves = step * torch.eye(2, dtype=logits.dtype)
    return torch.stack([(soft(logits + m) - soft(logits - m)) / (2 * step) for m in moves], -1)


def test_hidden_state_gradients_of_gated_attention():
    """The hand-written backward against finite differences of its own forward, hard gates fixed."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 6, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    keep = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 1]], dtype=torch.float64)
    hidden = ~torch.ones(6, 6, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float64).min)

    def attend(query, key, value):
        from qtale_lib.gated_attention import gated_attention

        return gated_attention(torch.nn.Module(), query, key, value, mask, 0.5, keep=keep, max_pull=1.0)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value))


@pytest.mark.parametrize("max_pull", [1.0, 2.0**20])
def test_far_stronger_evicted_keys_leave_finite_gradients(max_pull):
    from qtale_lib.gated_attention import gated_attention

    query = torch.full((1, 1, 3, 2), 100.0, requires_grad=True)
    key = torch.tensor([[-100.0, -100], [-100, -100], [100, 100]]).view(1, 1, 3, 2).requires_grad_()
    value, keep = torch.randn(1, 1, 3, 2), torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)
    mask = torch.zeros(1, 1, 3, 3)
    out, _ = gated_attention(torch.nn.Module(), query, key, value, mask, 1.0, keep=keep, max_pull=max_pull)
    torch.testing.assert_close(out[0, :, 0], value[0, 0, :2].mean(0).expand(3, -1))
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (query, key, keep))


def test_the_pull_of_an_evicted_key_is_bounded_by_what_keeping_it_can_change():
    """One query, one kept key, one evicted key e^s stronger: the slope is min(e^s, max_pull) · (v₁ − v₀)."""
    from qtale_lib.gated_attention import gated_attention

    value = torch.tensor([[0.0], [1.0]]).view(1, 1, 2, 1)
    mask = torch.zeros(1, 1, 2, 2)
    for stronger in (-2.0, 1.0, 5.0):
        for max_pull in (1.0, 10.0, 2.0**20):
            keep = torch.tensor([[1.0, 0.0]], requires_grad=True)
            key = torch.tensor([[0.0], [stronger]]).view(1, 1, 2, 1)
            out, _ = gated_attention(
                torch.nn.Module(), torch.ones(1, 1, 2, 1), key, value, mask, 1.0, keep=keep, max_pull=max_pull
            )
            out[0, 0].sum().backward()
            assert keep.grad[0, 1].item() == pytest.approx(min(math.exp(stronger), max_pull), rel=1e-5)


def test_rate_loss_brings_the_execution_rate_down():
    model, ids = make_routed(double=False).train(), tokens(4)
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    optimizer, losses = torch.optim.Adam(routers, lr=0.03), []
    torch.manual_seed(0)
    for _ in range(40):
        with record_routes(model) as routes:
            model(ids)
        losses.append(
            rate_loss(routes.gates, counted_tokens(routes.valid, 2), 2 / 5)
        )  # only always-run layers
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < 0.2 < losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_equal_gradients(reentrant):
    ids, grads = tokens(), []
    for checkpointing in (False, True):
        model = make_routed(double=False)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.3))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or ".router." in name)
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(11)
        with record_routes(model.train()) as routes:
            loss = model(ids, labels=ids).loss
        (loss + routes.gates.mean() + routes.soft[..., 0].mean()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert mixed(routes)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_checkpointed_layers_really_run_twice():
    model, calls = make_routed(double=False).train(), []
    model.model.layers[3].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(tokens()).logits.sum().backward()
    assert len(calls) == 2


def test_bfloat16_model_trains_with_float32_routers():
    model = make_routed(double=False).to(torch.bfloat16).train()
    with record_routes(model) as routes:
        logits = model(tokens()).logits
    (logits.float().pow(2).mean() + routes.soft[..., 0].mean()).backward()
    assert logits.dtype == torch.bfloat16
    assert routes.gates.dtype == routes.soft.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- all gates open: the base model -------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_gates_open_is_the_base_model(family, padding_side):
    ids, mask = tokens(), padding_mask([11, 7, 3], padding_side) if padding_side else None
    for attention in ("eager", "sdpa"):
        model = make_base(family, attention)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
        add_routers(model)
        set_threshold(model, 0.0)
        logits, routes = run(model, ids, attention_mask=mask)
        assert torch.equal(routes.executed, routes.valid.expand_as(routes.executed))
        if attention == "eager":
            assert torch.equal(logits, expected)
        kept = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(logits[kept], expected[kept], rtol=1e-5, atol=1e-5)
        for layer in routes.routed_layers:
            torch.nn.init.constant_(model.model.layers[layer].router.score.bias, -1e4)
            with torch.no_grad():
                model.model.layers[layer].router.score.bias[EXECUTE] = 1e4
        trained, _ = run(model.train(), ids, attention_mask=mask)
        torch.testing.assert_close(trained[kept], expected[kept], rtol=1e-5, atol=1e-5)


# --- reserved tokens, padding, batches ----------------------------------------------------------------------


def padding_mask(lengths, side, width=LENGTH):
    rows = [[0] * (width - n) + [1] * n if side == "left" else [1] * n + [0] * (width - n) for n in lengths]
    return torch.tensor(rows)


def test_reserved_tokens_and_first_layers_always_run():
    model = make_routed()
    for layer in (2, 3, 4):
        torch.nn.init.zeros_(model.model.layers[layer].router.score.weight)
        with torch.no_grad():
            model.model.layers[layer].router.score.bias[EXECUTE] = -50.0
    for train in (False, True):
        for side in ("left", "right"):
            mask = padding_mask([11, 7, 1], side)
            _, routes = run(model.train(train), tokens(), attention_mask=mask)
            assert torch.equal(routes.valid, mask.bool())
            assert torch.equal(routes.executed[0], mask.bool()) and torch.equal(
                routes.executed[1], mask.bool()
            )
            index = mask.cumsum(1) * mask
            assert torch.equal(routes.executed[2], (index == 1) | (index == 2))
            assert routes.logits[:2].isnan().all() and not routes.logits[2:].isnan().any()


@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    family=st.sampled_from(sorted(FAMILIES)),
    attention=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 20),
)
@settings(max_examples=25, deadline=None)
def test_a_padded_batch_is_single_runs_routes_included(lengths, side, family, attention, seed):
    model, ids = make_routed(family, attention, double=False, seed=seed), tokens(len(lengths), seed=seed)
    mask = padding_mask(lengths, side)
    logits, routes = run(model, ids, attention_mask=mask)
    assume(not undecided(routes))
    for b in range(len(lengths)):
        real = mask[b].bool()
        alone, alone_routes = run(model, ids[b : b + 1, real])
        assert torch.equal(routes.executed[:, b, real], alone_routes.executed[:, 0])
        torch.testing.assert_close(logits[b, real], alone[0], rtol=1e-5, atol=1e-5)
    assert not routes.executed[:, ~routes.valid].any()


def test_padding_content_changes_nothing_in_training():
    model, mask = make_routed().train(), padding_mask([11, 6, 4], "left")
    outcomes = []
    for filler in (0, 39):
        set_noise(model, torch.Generator().manual_seed(0))
        model.zero_grad()
        with record_routes(model) as routes:
            logits = model(tokens().masked_fill(mask == 0, filler), attention_mask=mask).logits[mask.bool()]
        logits.pow(2).mean().backward()
        outcomes.append(
            [logits, routes.executed, *(p.grad for n, p in model.named_parameters() if "layers" in n)]
        )
    for first, second in zip(*outcomes, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


# --- cached generation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_are_the_full_pass(family, attention):
    model, ids = make_routed(family, attention, double=False), tokens(seed=3)
    mask = padding_mask([11, 9, 8], "left")
    full, full_routes = run(model, ids, attention_mask=mask, use_cache=False)
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad(), record_routes(model) as routes:
        for stop in (4, 5, 8, 9, 10, 11):
            seen = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
            parts.append(model(ids[:, start:stop], **seen).logits)
            start = stop
    assert mixed(routes)
    real = mask.bool()
    assert torch.equal(routes.executed[:, real], full_routes.executed[:, real])
    torch.testing.assert_close(torch.cat(parts, 1)[real], full[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}]
)
def test_generation_with_a_cache_is_generation_without(family, how):
    model, ids, mask = make_routed(family), tokens(2, 5), padding_mask([5, 3], "left", 5)
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        extra = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "use_cache": use_cache, **how}
        outcomes.append(model.generate(ids, attention_mask=mask, **extra))
    assert outcomes[0].shape == (2, 13)
    assert torch.equal(*outcomes)


def test_routes_of_a_generation_are_those_of_its_text():
    model, ids = make_routed(), tokens(2, 5)
    with record_routes(model) as routes:
        extra = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **extra)
    _, full = run(model, text[:, :-1])  # the last token was never fed
    assert torch.equal(routes.executed, full.executed)
    torch.testing.assert_close(routes.logits, full.logits, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_cache_without_routes_and_fixed_caches_are_refused():
    model, ids = make_base(), tokens()
    with torch.no_grad():
        filled = model(ids, use_cache=True).past_key_values
    add_routers(model)
    with pytest.raises(NotImplementedError, match="without routes"):
        model(ids, past_key_values=filled)
    with pytest.raises(NotImplementedError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(NotImplementedError, match="training"):
        model.train()(ids, past_key_values=DynamicCache())


# --- the API ------------------------------------------------------------------------------------------------


def test_added_and_trainable_parameters_are_exactly_these():
    base = make_base(layers=3)
    names = {name for name, _ in base.named_parameters()}
    model = add_routers(base)
    router = {
        "model.layers.2.router.reduce.weight",
        "model.layers.2.router.reduce.bias",
        "model.layers.2.router.norm.weight",
        "model.layers.2.router.score.weight",
        "model.layers.2.router.score.bias",
    }
    assert {name for name, _ in model.named_parameters()} == names | router
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.requires_grad_(True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    attention = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default.weight"
    lora = {attention.format(layer, proj, ab) for layer in range(3) for proj in "qkv" for ab in "AB"}
    assert trainable == lora | {f"base_model.model.{name}" for name in router}


def test_router_width_defaults_to_an_eighth_and_is_a_setting():
    assert make_routed().model.layers[2].router.reduce.out_features == 3
    model = add_routers(make_base(), RouterConfig(hidden=7, execute_bias=1.5, bypass_bias=0.25))
    assert model.model.layers[4].router.score.weight.shape == (2, 7)
    assert model.model.layers[4].router.score.bias.tolist() == [1.5, 0.25]


def test_base_weights_and_class_stay():
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = add_routers(base)
    assert model is base and type(model) is LlamaForCausalLM
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before
    )
    assert isinstance(model.model.layers[2], type(model.model.layers[0]))


def test_peft_around_a_routed_model_is_transparent():
    model, ids = make_routed(), tokens()
    set_threshold(model, 0.6)
    expected, expected_routes = run(model, ids)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    logits, routes = run(wrapped, ids)
    assert torch.equal(logits, expected) and torch.equal(routes.executed, expected_routes.executed)
    set_threshold(wrapped, 0.0)
    assert run(wrapped, ids)[1].executed.all()


def test_a_deep_copy_is_independent():
    model, ids = make_routed(), tokens()
    twin = copy.deepcopy(model)
    set_threshold(twin, 0.0)
    _, routes = run(model, ids)
    _, twins = run(twin, ids)
    assert twins.executed.all() and not routes.executed.all()


def test_always_run_layers_ones_in_the_record_of_training():
    _, routes = run(make_routed().train(), tokens())
    assert (routes.gates[:2] == 1).all()
    assert routes.gates.shape == (5, 3, LENGTH) and routes.soft.shape == (3, 3, LENGTH, 2)
    assert routes.routed_layers == [2, 3, 4]
    assert set(routes.gates.unique().tolist()) == {0.0, 1.0}
    _, evaluated = run(make_routed(), tokens())
    with pytest.raises(UserError, match="training mode"):
        evaluated.gates  # noqa: B018


def test_the_decoder_alone_takes_arguments_by_position():
    model, ids, mask = make_routed(), tokens(), padding_mask([11, 7, 3], "right")
    with torch.no_grad(), record_routes(model) as routes:
        by_position = model.model(ids, mask).last_hidden_state
    assert torch.equal(routes.valid, mask.bool())
    with torch.no_grad():
        assert torch.equal(by_position, model.model(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_recorders_nest_and_end():
    model, ids = make_routed(), tokens()
    with record_routes(model) as outer:
        with record_routes(model) as inner:
            model(ids)
        assert inner.executed.shape == (5, 3, LENGTH)
        with pytest.raises(UserError, match="No routes"):
            outer.executed  # noqa: B018
        model(ids[:1])
    assert outer.executed.shape == (5, 1, LENGTH)
    model(ids)
    assert outer.executed.shape == (5, 1, LENGTH)


def test_what_cannot_be_routed_is_refused_with_a_sentence():
    with pytest.raises(UserError, match=r"GPT2LMHeadModel.*LlamaForCausalLM"):
        add_routers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    with pytest.raises(UserError, match="already"):
        add_routers(make_routed())
    with pytest.raises(UserError, match="always_run_layers 5"):
        add_routers(make_base(), RouterConfig(always_run_layers=5))
    with pytest.raises(UserError, match="always_run_tokens"):
        RouterConfig(always_run_tokens=0)
    with pytest.raises(UserError, match="tau"):
        RouterConfig(tau=0)
    with pytest.raises(UserError, match="add_routers"):
        set_threshold(make_base(), 0.5)
    with pytest.raises(UserError, match="2-D"):
        make_routed()(tokens(), attention_mask=torch.ones(3, 1, LENGTH, LENGTH))
    with pytest.raises(UserError, match="eager or sdpa"):
        make_routed(attention="flex_attention")(tokens())
    with pytest.raises(UserError, match="θ"):
        set_threshold(make_routed(), 1.0)
    for text in ("0.3", None):
        with pytest.raises(UserError, match=rf"θ is {text!r}: it must be a number"):
            set_threshold(make_routed(), text)
    with pytest.raises(NotImplementedError, match="dropout"):
        make_routed(attention_dropout=0.1).train()(tokens())


def test_execution_modes():
    model = make_routed()
    for mode in ("dense", "skip", "auto"):
        set_execution(model, mode)
    with pytest.raises(UserError, match="sparse"):
        set_execution(model, "sparse")
