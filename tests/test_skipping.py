"""Skipping execution against dense execution: routes, logits, text, work done and bytes cached."""

import copy
import threading

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small_models import routed_llama, word_tokenizer
from test_adaptive import (
    FAMILIES,
    LENGTH,
    make_base,
    make_routed,
    mixed,
    padding_mask,
    run,
    tokens,
    undecided,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

from qtale_lib.adaptive import (
    RouterConfig,
    add_routers,
    record_routes,
    routing_state,
    set_execution,
    set_threshold,
)
from qtale_lib.errors import UserError
from qtale_lib.evaluation import score
from qtale_lib.kv_cache import cache_size
from qtale_lib.routing import EXECUTE

ATTENTIONS = ["eager", "sdpa"]
PATTERNS = ["all", "none", "first", "last", "random", "alternating"]


def pattern(kind, layers, batch, length, seed=0):
    """Which (layer, row, token) should execute, bool [layers, B, T]."""
    wanted = torch.zeros(layers, batch, length, dtype=torch.bool)
    if kind == "all":
        wanted[:] = True
    elif kind == "first":
        wanted[..., 0] = True
    elif kind == "last":
        wanted[..., -1] = True
    elif kind == "alternating":
        wanted[:, :, ::2] = True
    elif kind == "random":
        wanted = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return wanted


def force(model, wanted):
    """Make the routers decide as `wanted`, bool [L, B, T], says; tokens count on over cached passes."""
    for index, layer in enumerate(model.model.layers):
        if not hasattr(layer, "router"):
            continue

        def decide(router, args, logits, wanted=wanted[index], done=[0]):  # noqa: B006
            start = done[0] % wanted.shape[1]
            done[0] = start + logits.shape[1]
            gap = torch.where(wanted[:, start : done[0]], 5.0, -5.0)
            return torch.stack([gap, -gap] if EXECUTE == 0 else [-gap, gap], -1)

        layer.router.register_forward_hook(decide)


def both(model, ids, **kwargs):
    """(logits, routes) of the dense and the skipping pass."""
    outcomes = []
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        outcomes.append(run(model, ids, **kwargs))
    return outcomes


def assert_equal(dense, skip, valid, tolerance=1e-5):
    assert torch.equal(dense[1].executed, skip[1].executed)
    torch.testing.assert_close(skip[0][valid], dense[0][valid], rtol=tolerance, atol=tolerance)


# --- one pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_is_dense_execution(family, attention):
    model = make_routed(family, attention, double=False)
    for mask in (None, padding_mask([11, 7, 1], "left"), padding_mask([11, 7, 1], "right")):
        dense, skip = both(model, tokens(), attention_mask=mask)
        valid = dense[1].valid
        assert_equal(dense, skip, valid)
        at = dense[1].routed_layers
        torch.testing.assert_close(skip[1].logits[at][:, valid], dense[1].logits[at][:, valid])
    assert mixed(both(model, tokens())[1][1])


@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    family=st.sampled_from(sorted(FAMILIES)),
    attention=st.sampled_from(ATTENTIONS),
    heads=st.sampled_from([(4, 2), (4, 1), (4, 4), (6, 2)]),
    kind=st.sampled_from(PATTERNS),
    always=st.tuples(st.integers(0, 2), st.integers(1, 3)),
    double=st.booleans(),
    use_cache=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_any_route_pattern_is_dense_execution(
    lengths, side, family, attention, heads, kind, always, double, use_cache, seed
):
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    router = RouterConfig(always_run_layers=always[0], always_run_tokens=always[1])
    model = add_routers(make_base(family, attention, layers=4, seed=seed, **shape), router)
    if double and attention == "sdpa":  # transformers' eager masks are -inf there, NaN for padding
        model.double()
    force(model, pattern(kind, 4, len(lengths), LENGTH, seed))
    mask = padding_mask(lengths, side)
    dense, skip = both(model, tokens(len(lengths), seed=seed), attention_mask=mask, use_cache=use_cache)
    assert_equal(dense, skip, mask.bool())


@given(
    theta=st.floats(0, 0.999),
    batch=st.integers(1, 3),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_threshold_is_dense_execution(theta, batch, side, seed):
    model = make_routed(seed=seed)
    set_threshold(model, theta)
    mask = padding_mask([LENGTH, 6, 3][:batch], side)
    dense, skip = both(model, tokens(batch, seed=seed), attention_mask=mask)
    assume(not undecided(dense[1]))
    assert_equal(dense, skip, mask.bool(), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_0_is_the_base_model(family):
    base = make_base(family)
    mask = padding_mask([11, 7, 4], "right")
    with torch.no_grad():
        expected, alone = base(tokens(), attention_mask=mask).logits, base(tokens(1)).logits
    model = add_routers(base)
    set_threshold(model, 0.0)
    set_execution(model, "skip")
    logits, routes = run(model, tokens(), attention_mask=mask)
    assert torch.equal(routes.executed.all(0), mask.bool())
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(model, tokens(1))[0], alone, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_differs_by_its_rounding_only(attention):
    model = make_routed(attention=attention, double=False).bfloat16()
    force(model, pattern("random", 5, 3, LENGTH))
    mask = padding_mask([11, 8, 5], "left")
    dense, skip = both(model, tokens(), attention_mask=mask)
    assert skip[0].dtype == torch.bfloat16
    assert_equal(dense, skip, mask.bool(), 5e-2)


@pytest.mark.parametrize("length", [1, 2, 64])
def test_prompts_from_one_token_to_the_maximum(length):
    model, ids = make_routed(double=False, max_position_embeddings=64), tokens(2, length)
    assert_equal(*both(model, ids), torch.ones_like(ids, dtype=torch.bool))


def test_recorded_states_of_earlier_layers_stay():
    """The residual stream is not written in place: output_hidden_states holds each layer's own."""
    model, states = make_routed(double=False), []
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        with torch.no_grad():
            states.append(model(tokens(), output_hidden_states=True).hidden_states)
    for dense, skip in zip(*states, strict=True):
        torch.testing.assert_close(skip, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_some_layers_with_a_sliding_window(family):
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    model = make_routed(family, double=False, **window)
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [None] * 3 + [4, 4]
    mask = padding_mask([11, 7, 4], "left")
    dense, skip = both(model, tokens(), attention_mask=mask)
    assert_equal(dense, skip, mask.bool())
    texts = []
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        texts.append(model.generate(tokens(), attention_mask=mask, **PLAIN, do_sample=False))
    assert torch.equal(*texts)


def test_unmerged_lora_inside_peft():
    model = get_peft_model(make_routed(double=False), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert_equal(*both(model.eval(), tokens()), torch.ones(3, LENGTH, dtype=torch.bool))


def test_training_stays_dense():
    model = make_routed(double=False).train()
    outcomes = []
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        torch.manual_seed(0)
        outcomes.append(model(tokens()).logits)
    assert torch.equal(*outcomes)


# --- the work done ------------------------------------------------------------------------------------------


def count_work(model):
    """Per layer and module, the numbers of tokens of its calls: what hooks saw, filled in as it runs."""
    seen = {}
    for index, layer in enumerate(model.model.layers):
        for name in ("input_layernorm", "mlp", "self_attn"):
            calls = seen[index, name] = []

            def note(module, args, kwargs, calls=calls):
                states = args[0] if args else kwargs["hidden_states"]
                calls.append(states.shape[0] * states.shape[1])

            getattr(layer, name).register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_compute_executed_tokens_and_no_other(batch, side):
    model, mask = make_routed(double=False), padding_mask([11, 7, 4][:batch], side)
    seen = count_work(model)
    set_execution(model, "skip")
    _, routes = run(model, tokens(batch), attention_mask=mask)
    assert mixed(routes)
    for layer in routes.routed_layers:
        for name in ("input_layernorm", "mlp", "self_attn"):
            assert seen[layer, name] == [int(routes.executed[layer].sum())]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_that_no_token_executes_costs_its_router_alone(batch):
    model, cache = make_routed(double=False), DynamicCache()
    wanted = pattern("all", 5, batch, 4)
    wanted[3, :, 2:] = False
    force(model, wanted)
    set_execution(model, "skip")
    with torch.no_grad():
        model(tokens(batch, 2), past_key_values=cache)  # the reserved tokens
        seen = count_work(model)
        for _ in range(2):
            model(tokens(batch, 1), past_key_values=cache)
    for name in ("input_layernorm", "mlp", "self_attn"):
        assert seen[3, name] == [] and seen[4, name] == [batch, batch]


def test_rows_that_execute_alike_need_no_mask(monkeypatch):
    """Prefill and decoding of one sequence, and of equal rows, leave the mask to the kernel."""
    model = make_routed(double=False)
    set_execution(model, "skip")
    masks = []
    for layer in model.model.layers[2:]:
        layer.self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(1), past_key_values=cache)
        for _ in range(3):
            model(tokens(1, 1), past_key_values=cache)
        model(tokens(3), attention_mask=padding_mask([11, 6, 4], "right"), use_cache=False)
        set_threshold(model, 0.0)
        model(tokens(3))
    assert masks and all(mask is None for mask in masks)


class Synchronisations(TorchDispatchMode):
    """Counts what waits for a GPU: numbers that go to the host, and results of unknown size."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += waits
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("batch", [1, 3])
def test_one_synchronisation_a_layer(batch, monkeypatch):
    model, counts, to_list = make_routed(double=False), [], torch.Tensor.tolist
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        cache = DynamicCache()
        for ids in (tokens(batch), tokens(batch, 2), tokens(batch, 1)):
            with torch.no_grad(), Synchronisations() as seen, monkeypatch.context() as patch:

                def listed(tensor, seen=seen):
                    seen.count += 1
                    return to_list(tensor)

                patch.setattr(torch.Tensor, "tolist", listed)
                model(ids, past_key_values=cache)
            counts.append(seen.count)
    for dense, skip in zip(counts[:3], counts[3:], strict=True):
        assert skip == dense + 3


@pytest.mark.parametrize("execution", ["auto", "dense", "skip"])
def test_scoring_skips_unless_told_otherwise(execution):
    model, pairs = routed_llama(), [([3, 20, 30, 40], [21, 22, 2]), ([5, 6], [7]), ([9, 9, 31], [8, 24])]
    set_execution(model, "dense")
    expected, seen = score(model, pairs), count_work(model)
    set_execution(model, execution)
    scores = score(model, pairs)
    assert scores.count == expected.count and scores.greedy == expected.greedy
    for ours, theirs in zip(scores.log_probabilities, expected.log_probabilities, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    computed = sum(sum(seen[layer, "mlp"]) for layer in range(5))
    assert computed == (5 * 3 * 6 if execution == "dense" else scores.count.executed + 2 * (18 - 12))
    assert routing_state(model).execution == execution


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[11], [11, 9, 8], [11, 11, 2]])
def test_cached_steps_are_the_full_pass(family, attention, lengths):
    model, ids = make_routed(family, attention, double=False), tokens(len(lengths), seed=3)
    mask = padding_mask(lengths, "left")
    full = run(model, ids, attention_mask=mask, use_cache=False)
    set_execution(model, "skip")
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad(), record_routes(model) as routes:
        for stop in (4, 5, 8, 9, 10, 11):
            seen = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
            parts.append(model(ids[:, start:stop], **seen).logits)
            start = stop
            assert cache.get_seq_length() == stop
    assert 0.2 < routes.executed[2:, mask.bool()].double().mean() < 0.9
    assert_equal(full, (torch.cat(parts, 1), routes), mask.bool())


@given(
    cuts=st.sets(st.integers(1, LENGTH - 1)),
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    family=st.sampled_from(["llama", "mistral"]),
    attention=st.sampled_from(ATTENTIONS),
    kind=st.sampled_from(PATTERNS),
    always=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_cut_into_cached_steps_is_the_full_pass(
    cuts, lengths, side, family, attention, kind, always, seed
):
    router = RouterConfig(always_run_layers=always)
    model = add_routers(make_base(family, attention, layers=4, seed=seed), router)
    ids, mask = tokens(len(lengths), seed=seed), padding_mask(lengths, side)
    force(model, pattern(kind, 4, len(lengths), LENGTH, seed))
    full = run(model, ids, attention_mask=mask, use_cache=False)
    set_execution(model, "skip")
    cache, parts, start = DynamicCache(), [], 0
    with torch.no_grad(), record_routes(model) as routes:
        for stop in [*sorted(cuts), LENGTH]:
            seen = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            parts.append(model(ids[:, start:stop], **seen).logits)
            start = stop
    assert_equal(full, (torch.cat(parts, 1), routes), mask.bool())
    assert cache_size(cache).tokens == int(routes.executed.sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_bytes_follow_the_execution_ratio(side):
    model, mask = make_routed(double=False), padding_mask([11, 6, 5], side)
    set_execution(model, "skip")
    for ids, attention_mask in ((tokens(1), None), (tokens(), mask)):
        cache = DynamicCache()
        _, routes = run(model, ids, attention_mask=attention_mask, past_key_values=cache)
        size, per_token = cache_size(cache), 2 * 2 * 6 * 4  # key and value, two heads of 6 float32
        assert size.tokens == int(routes.executed.sum())
        assert size.token_bytes == size.tokens * per_token
        longest = routes.executed.sum(2).amax(1)[2:].sum() + 2 * ids.shape[1]  # padded in always-run layers
        assert size.slots == int(longest) * len(ids)
        assert size.slot_bytes == size.slots * per_token
    set_execution(model, "dense")
    cache = DynamicCache()
    run(model, tokens(), past_key_values=cache)
    with pytest.raises(UserError, match="skip"):
        cache_size(cache)


def test_choosing_repeating_and_cropping_rows():
    model, ids = make_routed(double=False), tokens(3, 16)
    set_execution(model, "skip")
    full = run(model, ids)[0]

    def prefilled():
        cache = DynamicCache()
        run(model, ids[:, :10], past_key_values=cache)
        return cache

    def goes_on(cache, rows, start=10):
        for stop in range(start + 1, 17):
            logits = run(model, ids[rows, stop - 1 : stop], past_key_values=cache)[0]
            torch.testing.assert_close(logits[:, 0], full[rows, stop - 1], rtol=1e-5, atol=1e-5)

    for rows in ([0, 1, 2], [2, 2, 0], [1], [2, 0]):
        chosen, reordered = prefilled(), prefilled()
        chosen.batch_select_indices(torch.tensor(rows))
        goes_on(chosen, rows)
        reordered.reorder_cache(torch.tensor(rows))
        goes_on(reordered, rows)
    repeated = prefilled()
    repeated.batch_repeat_interleave(2)
    goes_on(repeated, [0, 0, 1, 1, 2, 2])
    cropped = prefilled()
    cropped.crop(-4)
    assert cropped.get_seq_length() == 6
    with pytest.raises(UserError, match="minus"):
        cropped.layers[2].crop(4)
    goes_on(cropped, [0, 1, 2], 6)
    cropped.reset()
    assert cropped.get_seq_length() == 0
    goes_on(cropped, [0, 1, 2], 0)
    kept = prefilled()
    goes_on(copy.deepcopy(kept), [0, 1, 2])
    goes_on(kept, [0, 1, 2])


def test_other_caches_are_refused_with_a_sentence():
    model, ids, dense = make_routed(double=False), tokens(), DynamicCache()
    run(model, ids, past_key_values=dense)
    set_execution(model, "skip")
    with pytest.raises(UserError, match="not filled by skipping"):
        model(ids, past_key_values=dense)
    with pytest.raises(UserError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    skipping = DynamicCache()
    run(model, ids, past_key_values=skipping)
    set_execution(model, "dense")
    with pytest.raises(NotImplementedError, match="without routes"):
        model(ids, past_key_values=skipping)


def test_attention_weights_are_refused_with_a_sentence():
    model = make_routed(attention="eager")
    assert len(model(tokens(), output_attentions=True).attentions) == 5
    set_execution(model, "skip")
    with pytest.raises(UserError, match="dense"):
        model(tokens(), output_attentions=True)


# --- generation ---------------------------------------------------------------------------------------------

PLAIN = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "eos_token_id": list(range(8))},
        {"do_sample": False, "use_cache": False},
    ],
)
def test_generated_text_is_that_of_dense_execution(family, how):
    model = make_routed(family)
    for ids, mask in ((tokens(2, 5), padding_mask([5, 3], "left", 5)), (tokens(1, 1), None)):
        texts = []
        for mode in ("dense", "skip"):
            set_execution(model, mode)
            torch.manual_seed(0)
            texts.append(model.generate(ids, attention_mask=mask, **PLAIN | how))
        assert torch.equal(*texts)


@pytest.mark.parametrize("batch", [1, 2])
def test_greedy_text_and_routes_over_256_tokens(batch):
    model, ids = make_routed(double=False, max_position_embeddings=300), tokens(batch, 9)
    outcomes = []
    for mode in ("dense", "skip"):
        set_execution(model, mode)
        with record_routes(model) as routes:
            how = PLAIN | {"max_new_tokens": 256, "do_sample": False}
            text = model.generate(ids, attention_mask=padding_mask([9, 5][:batch], "left", 9), **how)
        outcomes.append((text, routes.executed))
    assert len(outcomes[1][0].unique()) > 8
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_assisted_decoding_is_plain_greedy_decoding():
    model, ids = make_routed(double=False), tokens(1, 5)
    set_execution(model, "skip")
    plain = model.generate(ids, **PLAIN, do_sample=False)
    for extra in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make_base(seed=1)}):
        assert torch.equal(model.generate(ids, **PLAIN, **extra, do_sample=False), plain)


def test_streaming():
    model, tokenizer = routed_llama(), word_tokenizer()
    set_execution(model, "skip")
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    how = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    whole = model.generate(ids, **how)[0, ids.shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={**how, "streamer": streamer})
    thread.start()
    assert "".join(streamer).split() == tokenizer.decode(whole).split()
    thread.join()
