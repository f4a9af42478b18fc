"""Scores, ratios and perplexity against plain forward passes, one sequence at a time."""

import math
import os
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import stdev

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from small_models import (
    TOKENIZER,
    WORDS,
    questions,
    responses,
    routed_llama,
    tiny_llama,
    word_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtale_lib.adaptive import record_routes, set_threshold
from qtale_lib.config import TASKS
from qtale_lib.data.encoding import IGNORED, encode, encode_all
from qtale_lib.data.prompts import render
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.evaluation import TASKS_FOLDER, evaluate_choices, perplexity, ratio_stderr, score
from qtale_lib.probes import probe_routes

MODELS = os.environ.get("QTALE_TEST_MODELS")


@pytest.fixture(scope="module", params=["plain", "routed"])
def model(request):
    return tiny_llama(len(TOKENIZER)) if request.param == "plain" else routed_llama()


def log_likelihood(model, prompt: str, continuation: str) -> float:
    """Sum of log p(token) over the continuation, from one unpadded forward pass over the whole text."""
    ids = TOKENIZER(f"{prompt} {continuation}", return_tensors="pt")["input_ids"]
    start = len(TOKENIZER(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    return sum(
        float(logits[position - 1].log_softmax(-1)[ids[0, position]])
        for position in range(start, ids.shape[1])
    )


def test_choices_agree_with_one_forward_pass_per_choice(model):
    rows = questions(12)
    result = evaluate_choices(model, TOKENIZER, rows, "arc_easy", batch_size=7)
    correct, nll = [], []
    for row in rows:
        text = render(row)
        sums = [log_likelihood(model, text.prompt, continuation) for continuation in text.continuations]
        correct.append(int(max(range(4), key=sums.__getitem__) == row.answer))
        nll.append(math.log(sum(math.exp(value - sums[row.answer]) for value in sums)))
    assert result["correct"] == correct and 0 < sum(correct) < 12
    assert result["choice_nll"] == pytest.approx(nll, abs=2e-4)
    assert result["acc"] == pytest.approx(sum(correct) / 12)
    assert result["nll"] == pytest.approx(sum(nll) / 12, abs=2e-4)
    assert result["stderr"] == pytest.approx(stdev(correct) / math.sqrt(12))
    assert (result["count"], result["task_version"]) == (12, 1.0)
    assert result["facts"] == [[f"f{index}"] for index in range(12)]
    assert result["protocol"]["lm_eval"] == "0.4.13" and result["protocol"]["style"] == "compact"


def test_open_and_expected_accuracy_are_those_of_every_possible_draw(model):
    """Against all draws of three wrong choices, enumerated; the drawn choices' own scores stay the same."""
    drawn = [
        replace(row, choices=(f"w{i}", f"w{i} w2", f"w{i + 9}", f"w{i + 18}"), response=f"w{i + 9}", answer=2)
        for i, row in enumerate(questions(8))
    ]
    rows = [replace(row, values=("w30", *row.choices, "w31 w2", "w32", "w33")) for row in drawn]
    result = evaluate_choices(model, TOKENIZER, rows, "arc_easy", batch_size=5)
    open_right, expected = [], []
    for row in rows:
        sums = {value: log_likelihood(model, render(row).prompt, value) for value in row.values}
        right = sums.pop(row.response)
        open_right.append(int(right > max(sums.values())))
        draws = [right > max(draw) for draw in combinations(sums.values(), 3)]
        expected.append(sum(draws) / len(draws))
    assert result["open_correct"] == open_right and result["open_acc"] == sum(open_right) / 8
    assert result["expected_correct"] == pytest.approx(expected) and 0 < result["expected_acc"] < 1
    assert result["expected_acc"] == pytest.approx(sum(expected) / 8)
    alone = evaluate_choices(model, TOKENIZER, drawn, "arc_easy", batch_size=5)
    assert alone["choice_nll"] == pytest.approx(result["choice_nll"], abs=1e-4)
    assert (alone["open_acc"], alone["expected_acc"]) == (alone["acc"], alone["acc"])
    assert alone["open_correct"] is None
    listed = evaluate_choices(model, TOKENIZER, rows, "arc_easy", style="dllm", max_length=512)
    assert listed["open_acc"] is listed["expected_acc"] is None


def counted_by_hand(model, sequences: set[tuple[int, ...]]) -> dict[str, float]:
    """Ratios from one unpadded pass per sequence; the loss sees all but the first 2 (the last is not fed)."""
    executed = pairs = loss_executed = loss_pairs = 0
    for ids in sequences:
        with torch.no_grad(), record_routes(model) as routes:
            model(input_ids=torch.tensor([ids]))
        kept = routes.executed[:, 0].int()  # [L, T]
        executed, pairs = executed + int(kept.sum()), pairs + kept.numel()
        loss_executed, loss_pairs = loss_executed + int(kept[:, 2:].sum()), loss_pairs + kept[:, 2:].numel()
    tokens = sum(map(len, sequences))
    return {"execution_ratio": executed / pairs, "loss_ratio": loss_executed / loss_pairs, "tokens": tokens}


def test_ratios_count_every_token_fed_once_and_no_padding():
    model, rows = routed_llama(), questions(10)
    fed = {
        tuple(TOKENIZER(f"{text.prompt} {continuation}")["input_ids"][:-1])
        for text in map(render, rows)
        for continuation in text.continuations
    }
    assert len(fed) < 40  # choices that share all but their last token are fed once
    set_threshold(model, 0.4)
    result, expected = (
        evaluate_choices(model, TOKENIZER, rows, "arc_easy", batch_size=16),
        counted_by_hand(model, fed),
    )
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert 0.4 < result["loss_ratio"] < result["execution_ratio"] < 0.95


@pytest.mark.parametrize("reserved", [1, 2, 4])
def test_loss_ratio_is_over_the_tokens_that_training_rates(reserved):
    """Perplexity feeds what a probe of the same rows feeds, but for the last token, which is not rated."""
    model, rows = routed_llama(reserved=reserved), responses(9, 0)
    set_threshold(model, 0.5)
    encoded, _ = encode_all(rows, TOKENIZER)
    probe = probe_routes(model, encoded, batch_size=4, seed=0, epoch=0)
    result = perplexity(model, TOKENIZER, rows)
    assert result["loss_ratio"] == pytest.approx(probe["loss_ratio"])
    assert 0.1 < result["loss_ratio"] < 0.95


def test_a_model_without_routers_executes_everything():
    result = evaluate_choices(tiny_llama(len(TOKENIZER)), TOKENIZER, questions(4), "arc_easy")
    assert (result["execution_ratio"], result["loss_ratio"]) == (1.0, 1.0)


@given(batch_size=st.integers(1, 40), seed=st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_batch_size_changes_nothing(batch_size, seed):
    model, rows = routed_llama(seed), responses(9, seed)
    one, many = (perplexity(model, TOKENIZER, rows, batch_size=size) for size in (1, batch_size))
    assert many["example_nll"] == pytest.approx(one["example_nll"], abs=1e-4)
    assert {k: many[k] for k in ("execution_ratio", "loss_ratio", "tokens")} == {
        k: one[k] for k in ("execution_ratio", "loss_ratio", "tokens")
    }


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_changes_no_choice(batch_size):
    model, rows = routed_llama(), questions(8)
    whole, parts = (
        evaluate_choices(model, TOKENIZER, rows, "arc_easy", batch_size=b) for b in (64, batch_size)
    )
    assert parts["choice_nll"] == pytest.approx(whole["choice_nll"], abs=1e-4)
    assert (parts["correct"], parts["execution_ratio"]) == (whole["correct"], whole["execution_ratio"])


def rigged_llama(tokenizer, word: str, sign: float):
    """Hidden states are all ones whatever is read: the logit of `word` is 32 * `sign`, every other is 0."""
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] = sign
    return model


@pytest.mark.parametrize(("sign", "accuracy"), [(1.0, 1.0), (-1.0, 0.0)])
def test_an_oracle_is_always_right_and_its_opposite_never(sign, accuracy):
    tokenizer = word_tokenizer(words=("right", "wrong"))
    rows = [
        Example(
            str(i),
            "boolq",
            {"passage": "w1", "question": WORDS[i]},
            ("right", "wrong")[:: 1 - 2 * (i % 2)],
            i % 2,
        )
        for i in range(6)
    ]
    result = evaluate_choices(rigged_llama(tokenizer, "right", sign), tokenizer, rows, "boolq")
    assert result["acc"] == accuracy
    assert result["choice_nll"] == pytest.approx([math.log1p(math.exp(-32 * sign))] * 6, rel=1e-5)


def test_overlong_questions_are_dropped_or_cut_alike_for_all_choices():
    model, rows = tiny_llama(len(TOKENIZER)), questions(6)
    rows[2] = Example("2", "arc_easy", {"question": " ".join(WORDS[:36])}, ("w1", "w2 w3", "w4", "w5"), 0)
    dropped = evaluate_choices(model, TOKENIZER, rows, "arc_easy", max_length=40)
    assert dropped["rows"] == {"used": 5, "dropped": 1, "cut": 0}
    assert dropped["ids"] == ["0", "1", "3", "4", "5"]
    cut = evaluate_choices(model, TOKENIZER, rows, "arc_easy", max_length=40, overlong="cut")
    assert cut["rows"] == {"used": 6, "dropped": 0, "cut": 1}
    prompt = TOKENIZER(render(rows[2]).prompt)["input_ids"]
    prompt = [prompt[0], *prompt[1 + len(prompt) + 2 - 40 :]]  # the longest choice has two tokens
    pairs = [(prompt, TOKENIZER(choice, add_special_tokens=False)["input_ids"]) for choice in rows[2].choices]
    sums = [float(values.sum()) for values in score(model, pairs).log_probabilities]
    assert cut["choice_nll"][2] == pytest.approx(float(-torch.tensor(sums).log_softmax(0)[0]), abs=1e-4)
    with pytest.raises(UserError, match="None of the 6 questions fits 5 tokens"):
        evaluate_choices(model, TOKENIZER, rows, "arc_easy", max_length=5)


def test_perplexity_is_the_exponential_of_the_training_loss(model):
    rows = responses(9)
    result, sums, counts = perplexity(model, TOKENIZER, rows, batch_size=4), [], []
    for row in rows:
        encoded = encode(row, TOKENIZER)
        ids, labels = torch.tensor([encoded["input_ids"]]), encoded["labels"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        answered = [position for position, label in enumerate(labels) if label != IGNORED]
        sums.append(sum(-float(logits[p - 1].log_softmax(-1)[labels[p]]) for p in answered))
        counts.append(len(answered))
    assert result["example_tokens"] == counts and result["count"] == sum(counts)
    assert counts == [len(row.response.split()) + 1 for row in rows]  # the end-of-text token is counted
    assert result["example_nll"] == pytest.approx(sums, abs=2e-4)
    assert result["ppl"] == pytest.approx(math.exp(sum(sums) / sum(counts)), rel=1e-4)
    assert result["stderr"] == pytest.approx(result["ppl"] * ratio_stderr(sums, counts), rel=1e-3)
    assert result["protocol"]["end_of_text"] == "counted"


def test_perplexity_leaves_out_what_is_too_long():
    rows = [*responses(3), Example("long", "alpaca", {"instruction": "w1", "input": ""}, response="w2 " * 70)]
    result = perplexity(tiny_llama(len(TOKENIZER)), TOKENIZER, rows)
    assert result["rows"] == {"used": 3, "dropped": 1, "cut": 0} and result["ids"] == ["0", "1", "2"]
    with pytest.raises(UserError, match="None of the 1 responses fits 64 tokens"):
        perplexity(tiny_llama(len(TOKENIZER)), TOKENIZER, rows[3:])


def test_ratio_stderr_is_the_spread_of_resampled_ratios():
    draw = random.Random(0)
    counts = [draw.randint(1, 9) for _ in range(400)]
    sums = [count * draw.gauss(2, 0.2) + draw.gauss(0, 1) for count in counts]
    ratios = []
    for _ in range(400):
        chosen = draw.choices(range(400), k=400)
        ratios.append(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))
    assert ratio_stderr(sums, counts) == pytest.approx(stdev(ratios), rel=0.12)
    assert ratio_stderr([2.0, 4.0, 6.0], [1, 1, 1]) == pytest.approx(stdev([2.0, 4.0, 6.0]) / math.sqrt(3))


def test_one_row_has_no_stderr():
    model = tiny_llama(len(TOKENIZER))
    assert evaluate_choices(model, TOKENIZER, questions(1), "arc_easy")["stderr"] is None
    assert perplexity(model, TOKENIZER, responses(1))["stderr"] is None


def test_the_training_mode_and_the_noise_of_training_are_left_alone():
    model = tiny_llama(len(TOKENIZER)).train()
    state = torch.get_rng_state()
    evaluate_choices(model, TOKENIZER, questions(3), "arc_easy")
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_every_choice_task_has_its_yaml():
    known = TaskManager(include_path=TASKS_FOLDER, include_defaults=False).all_subtasks
    assert sorted(known) == sorted(f"qtale_{task}" for task in TASKS if task != "alpaca")
    for task in TASKS:
        assert (
            task == "alpaca"
            or yaml.safe_load((TASKS_FOLDER / f"{task}.yaml").read_text())["task"] == f"qtale_{task}"
        )


@pytest.mark.skipif(not MODELS, reason="QTALE_TEST_MODELS does not name a folder with stories260K")
def test_a_trained_model_tells_a_story_from_a_shuffled_one():
    model = AutoModelForCausalLM.from_pretrained(Path(MODELS) / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(Path(MODELS) / "stories260K")
    opening = {"instruction": "Once upon a time there was a little girl named Lily.", "input": ""}
    told = "She loved to play outside in the park with her friends."
    mixed = "The friends outside her she park play to in loved with."
    story, shuffled = (
        perplexity(model, tokenizer, [Example("s", "alpaca", opening, response=text)] * 2)
        for text in (told, mixed)
    )
    assert story["ppl"] < 6 and shuffled["ppl"] > 4 * story["ppl"]
    rows = [Example(str(i), "piqa", {"goal": "She went to the"}, ("park", "qxzv"), 0) for i in range(2)]
    assert evaluate_choices(model, tokenizer, rows, "piqa")["acc"] == 1.0
