"""Sparse weights and fewer layers, against loops that follow the definitions word by word."""

from __future__ import annotations

import copy
from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import make_model
from small_models import TOKENIZER, WORDS, routed_llama

from qtale_lib.adaptive import record_routes
from qtale_lib.data.encoding import encode_pairs
from qtale_lib.errors import UserError
from qtale_lib.evaluation import score
from qtale_lib.pruning import prune
from qtale_lib.pruning.layers import block_influence, executed_layers, greedy
from qtale_lib.pruning.weights import kept_weights
from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.statistics import calibration_loss

TEXTS = [" ".join(WORDS[(7 * k + i) % len(WORDS)] for i in range(4 + k)) for k in range(10)]
ROWS = [TOKENIZER(text)["input_ids"] for text in TEXTS]


def model_of(layers=4, seed=0):
    return make_model(vocab_size=len(TOKENIZER), num_hidden_layers=layers, seed=seed)


def inputs_of(model, name):
    """What a linear reads in passes over each row alone, [tokens, in]."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]), use_cache=False)
    hook.remove()
    return torch.cat(seen)


# --- weights


def naive(score, pattern, by_row):
    """Which weights stay: of those compared with one another, the lowest go."""
    kept = torch.ones_like(score, dtype=torch.bool)
    rows, width = score.shape
    if ":" in pattern:
        stay, of = map(int, pattern.split(":"))
        groups = [[(r, c + k) for k in range(of)] for r in range(rows) for c in range(0, width, of)]
        gone = of - stay
    else:
        groups = [[(r, c) for c in range(width)] for r in range(rows)]
        groups = groups if by_row else [list(chain(*groups))]
        gone = round(float(pattern) * len(groups[0]))
    for group in groups:
        for place in sorted(group, key=lambda place: score[place].item())[:gone]:
            kept[place] = False
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["0.5", "0.25", "0.9", "2:4", "4:8"]), st.booleans())
def test_the_lowest_scores_go(seed, pattern, by_row):
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kept_weights(score, pattern, by_row), naive(score, pattern, by_row))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_magnitude_keeps_the_largest_weights_and_no_other_changes(pattern):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, weights=f"magnitude {pattern}")
    names = {f"{name}.weight" for name in decoder_linears(model)}
    for name, tensor in pruned.state_dict().items():
        old = before[name]
        expected = old * naive(old.abs(), pattern, by_row=False) if name in names else old
        assert torch.equal(tensor, expected), name
    assert pruned.pruning == {"weights": f"magnitude {pattern}", "zeros": pytest.approx(0.5, abs=1e-3)}


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_wanda_weighs_weights_by_their_inputs_behind_the_layers_pruned_before(name, pattern):
    model = model_of()
    whole = copy.deepcopy(model)
    pruned = prune(model, TOKENIZER, TEXTS, weights=f"wanda {pattern}")
    layer = int(name.split(".")[2])
    for i in range(layer):  # those before are pruned when this one's inputs are looked at
        whole.model.layers[i] = pruned.model.layers[i]
    norms = inputs_of(whole, name).pow(2).sum(0).sqrt()
    weight = whole.get_submodule(name).weight
    kept = naive(weight.abs() * norms, pattern, by_row=True)
    assert torch.equal(pruned.get_submodule(name).weight, weight * kept)


def test_wanda_looks_at_the_tokens_that_execute_a_routed_layer():
    model = routed_llama()
    whole = copy.deepcopy(model)
    pruned, name = prune(model, TOKENIZER, TEXTS, weights="wanda 0.5"), "model.layers.2.self_attn.q_proj"
    for i in range(2):
        whole.model.layers[i] = pruned.model.layers[i]
    squares = 0.0
    for row in ROWS:
        seen = []
        hook = whole.get_submodule(name).register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
        with torch.no_grad(), record_routes(whole) as routes:
            whole(torch.tensor([row]), use_cache=False)
        hook.remove()
        squares = squares + seen[0][routes.executed[2]].pow(2).sum(0)
    weight = whole.get_submodule(name).weight
    assert torch.equal(
        pruned.get_submodule(name).weight, weight * naive(weight.abs() * squares.sqrt(), "0.5", True)
    )


# --- layers


def outputs(model, ids):
    """Hidden states before the first layer and behind each, before the final norm, list of [tokens, d]."""
    states = []
    hooks = [layer.register_forward_hook(lambda _, args, out: states.append((args[0][0], out[0])))
             for layer in model.model.layers]  # fmt: skip
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [states[0][0], *(after for _, after in states)]


def test_block_influence_is_how_far_a_layer_turns_its_tokens():
    model, cosines = model_of(), [[] for _ in range(4)]
    for row in ROWS:
        states = outputs(model, row)
        for i in range(4):
            for old, new in zip(states[i], states[i + 1], strict=True):
                cosines[i].append((old @ new / (old.norm() * new.norm())).item())
    expected = [1 - sum(own) / len(own) for own in cosines]
    assert block_influence(model, ROWS) == pytest.approx(expected, abs=1e-5)
    order = sorted(range(4), key=lambda i: expected[i])
    assert prune(model, TOKENIZER, TEXTS, layers="block_influence 2").pruning["removed"] == sorted(order[:2])


def without(model, removed):
    """A model of the same weights built anew with fewer layers."""
    kept = [i for i in range(len(model.model.layers)) if i not in removed]
    other = model_of(len(kept))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for place, i in enumerate(kept):
        own = model.model.layers[i].state_dict()
        state |= {f"model.layers.{place}.{name}": tensor for name, tensor in own.items()}
    other.load_state_dict(state)
    return other


def test_the_greedy_search_removes_what_the_loss_misses_least():
    model = model_of(5)
    first = min(range(5), key=lambda i: calibration_loss(without(model, {i}), ROWS))
    rest = [i for i in range(5) if i != first]
    second = min(rest, key=lambda i: calibration_loss(without(model, {first, i}), ROWS))
    before = calibration_loss(model, ROWS)
    assert greedy(model, ROWS, 2) == sorted((first, second))
    assert calibration_loss(model, ROWS) == before and model.config.num_hidden_layers == 5


@pytest.mark.parametrize("removed", list(combinations(range(4), 2)))
def test_a_model_without_layers_is_that_model(removed):
    from qtale_lib.pruning.layers import remove_layers

    model, ids = model_of(), torch.tensor([ROWS[-1]])
    expected = without(model, set(removed))
    remove_layers(model, "sleb", list(removed))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        greedy_text = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, expected)]
    assert torch.equal(*greedy_text)
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert executed_layers(model, valid)[:, 0, 0].tolist() == [i not in removed for i in range(4)]


@pytest.mark.parametrize("confidence", [0.1, 0.3, 0.6])
def test_a_token_leaves_at_the_first_layer_that_is_confident(confidence):
    """One token of each row after another, by hand: where it leaves, and what the next ones then see."""
    model = model_of()
    plain = copy.deepcopy(model)
    prune(model, layers=f"early_exit {confidence}")
    for row in ROWS[:4]:
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0]
        ran = executed_layers(model, torch.ones(1, len(row), dtype=torch.bool))[:, 0]
        hidden, left = outputs(plain, row)[0][None], torch.zeros(len(row), dtype=torch.bool)
        place = plain.model.rotary_emb(hidden, torch.arange(len(row))[None])
        mask = torch.full((len(row), len(row)), -torch.inf).triu(1)[None, None]
        for i, layer in enumerate(plain.model.layers):
            assert torch.equal(ran[i], ~left)
            with torch.no_grad():
                after = layer(hidden, attention_mask=mask, position_embeddings=place)
                for token in range(len(row)):
                    if not left[token]:
                        continue
                    after[0, token] = hidden[0, token]
                seen = plain.lm_head(plain.model.norm(after))[0].softmax(-1)
            left |= torch.tensor([max(seen[token].tolist()) >= confidence for token in range(len(row))])
            hidden = after
        with torch.no_grad():
            torch.testing.assert_close(
                logits, plain.lm_head(plain.model.norm(hidden))[0], rtol=1e-4, atol=1e-4
            )


def test_what_ran_is_counted_where_answers_are_scored():
    pairs = encode_pairs(TOKENIZER, [("w1 w2 w3", " w4 w5"), ("w6", " w7")])
    removed = prune(model_of(), TOKENIZER, TEXTS, layers="sleb 3")
    assert score(removed, pairs).count.ratios()["execution_ratio"] == 0.25
    assert score(model_of(), pairs).count.ratios()["execution_ratio"] == 1.0
    early = prune(model_of(), layers="early_exit 0.3")
    count = score(early, pairs).count
    alone = [score(early, [pair]).count for pair in pairs]  # padding counts for nothing
    assert count.executed == sum(own.executed for own in alone) < count.pairs
    assert count.pairs == 4 * count.tokens == sum(own.pairs for own in alone)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "either weights or layers"),
        ({"weights": "wanda 0.5", "layers": "sleb 1"}, "either weights or layers"),
        ({"weights": "wanda 0.5"}, "calibrates on text"),
        ({"layers": "early_exit 1.0"}, "above 0 and below 1"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_a_sentence(asked, said):
    with pytest.raises(UserError, match=said):
        prune(model_of(), **asked)


def test_the_last_layer_a_routed_model_and_odd_widths_are_refused():
    with pytest.raises(UserError, match="cannot be removed of 4"):
        prune(model_of(), TOKENIZER, TEXTS, layers="sleb 4")
    with pytest.raises(UserError, match="routers skip layers themselves"):
        prune(routed_llama(), TOKENIZER, TEXTS, layers="sleb 1")
    with pytest.raises(UserError, match="groups of 4"):
        prune(make_model(intermediate_size=98), weights="magnitude 2:4")
