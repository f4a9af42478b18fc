"""NaN and infinity in weights, activations and losses: an error that names the layer, never a result."""

from __future__ import annotations

import math

import pytest
import torch
from small_run import llama, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtale_lib.adaptive import RouterConfig, add_routers, set_threshold
from qtale_lib.calibration import search_threshold
from qtale_lib.data import load_task
from qtale_lib.errors import UserError
from qtale_lib.evaluation import evaluate_choices, perplexity, score
from qtale_lib.finite import first_non_finite_layer
from qtale_lib.generation import generate
from qtale_lib.quantization import quantize
from qtale_lib.trainer import describe_divergence

TEXTS = ["all of it is here", "and more of it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def poison(model, layer: int | None, value: float = math.nan) -> None:
    weight = model.model.norm.weight if layer is None else model.model.layers[layer].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(-1)[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize(("layer", "words"), [(0, "in layer 0"), (2, "in layer 2"), (None, "after the last")])
def test_scoring_names_the_layer(model, layer, words, value):
    poison(model, layer, value)
    if value == 3e38:  # finite itself: its products are not
        poison_again = model.model.norm if layer is None else model.model.layers[layer].mlp
        for parameter in poison_again.parameters():
            parameter.data.fill_(value)
    with pytest.raises(UserError, match=f"not finite: the first appear {words}"):
        score(model, [([1, 2, 3], [4])])


@pytest.mark.parametrize("routed", [False, True])
def test_no_accuracy_perplexity_or_threshold_comes_of_nan(model, tokenizer, routed):
    if routed:
        add_routers(model, RouterConfig())
        set_threshold(model, 0.0)
    poison(model, 1)
    questions, rows = load_task("arc_easy", "test")[:4], load_task("alpaca", "test")[:4]
    with pytest.raises(UserError, match="in layer 1"):
        evaluate_choices(model, tokenizer, questions, "arc_easy")
    with pytest.raises(UserError, match="in layer 1"):
        perplexity(model, tokenizer, rows)
    if routed:
        with pytest.raises(UserError, match="in layer 1"):
            search_threshold(model, tokenizer, questions)


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_quantizing_names_the_layer(model, tokenizer, method):
    poison(model, 2)
    with pytest.raises(UserError, match="not finite in layer 2, on the texts"):
        quantize(model, tokenizer, TEXTS, method=method, bits=4, group_size=32)


def test_a_sound_model_has_no_such_layer(model):
    ids = torch.tensor([[1, 2, 3]])
    assert first_non_finite_layer(model.model.layers, lambda: model(input_ids=ids)) is None
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_the_hooks_go_even_if_the_pass_fails():
    model = llama()
    with pytest.raises(ZeroDivisionError):
        first_non_finite_layer(model.model.layers, lambda: 1 / 0)
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_divergence_at_the_start_is_the_bases():
    assert "the base's weights" in describe_divergence(3, 0) and "in layer 3" in describe_divergence(3, 0)
    assert "lower training.lr" in describe_divergence(None, 1)


# Texts at the edges.


@pytest.mark.parametrize(
    "prompt",
    ["x", "\N{PILE OF POO}", "\u202eabc", "e\u0301" * 20, "\0", "\ufffd", " \n\t", "一二三", "<unk>", "</s>"],
    ids=ascii,
)
def test_any_text_is_gone_on_from_or_refused(model, tokenizer, prompt):
    try:
        made = generate(model, tokenizer, prompt, 3)
    except UserError as error:
        assert "empty" in str(error)
    else:
        assert made.tokens <= 3


@pytest.mark.parametrize(("prompt", "said"), [("", "empty"), ("a " * 300, "leave room for 0 more")])
def test_an_empty_and_an_overlong_prompt_are_refused(model, tokenizer, prompt, said):
    with pytest.raises(UserError, match=said):
        generate(model, tokenizer, prompt, 3)


def test_a_prompt_of_one_token_is_routed_as_any_other(model, tokenizer):
    plain = generate(model, tokenizer, "the", 4)
    add_routers(model, RouterConfig())
    set_threshold(model, 0.0)
    assert generate(model, tokenizer, "the", 4).text == plain.text
    set_threshold(model, 0.5)
    made = generate(model, tokenizer, "the", 4)
    assert 0 < made.execution_ratio <= 1


def test_texts_that_quantizers_cannot_use_are_refused(model, tokenizer):
    with pytest.raises(UserError):
        quantize(model, tokenizer, ["", ""], method="awq", bits=4, group_size=32)
