"""lm-eval's own tasks on local rows: its prompts and answers, scored as its own model class scores them."""

import math
import random
from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM
from small_models import TOKENIZER, WORDS, questions, responses, routed_llama, tiny_llama, word_tokenizer

from qtale_lib.config import load_profile
from qtale_lib.data import load_task
from qtale_lib.data.benchmarks import BENCHMARKS
from qtale_lib.data.hub import COPIES
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.harness import OWN, _lm_eval, evaluate_own_task
from qtale_lib.lab import Lab
from qtale_lib.stages import measure

FIELDS = {
    "piqa": ("goal",), "boolq": ("passage", "question"), "siqa": ("context", "question"),
    "arc_easy": ("question",), "arc_challenge": ("question",), "winogrande": ("sentence",),
    "openbookqa": ("question",), "mmlu": ("question",),
}  # fmt: skip
SIZES = {"piqa": 2, "boolq": 2, "siqa": 3, "winogrande": 2}
KNOWING = word_tokenizer(words=("yes", "no", "A", "B", "C", "D", "Question", "Answer"))
SUBJECTS = ("anatomy", "college physics", "world religions")


def made_up(task: str, count: int = 9) -> list[Example]:
    """Questions of a task in random words, every choice right in turn."""
    draw = random.Random(f"made up for {task}")
    rows = []
    for index in range(count):
        fields = {name: " ".join(draw.choices(WORDS, k=draw.randint(2, 6))) for name in FIELDS[task]}
        if task == "winogrande":
            fields["sentence"] = f"{fields['sentence']} _ {draw.choice(WORDS)} ."
        if task == "mmlu":
            fields["subject"] = SUBJECTS[index % 3]
        size = SIZES.get(task, 4)
        choices = ("yes", "no") if task == "boolq" else tuple(draw.sample(WORDS, size))
        rows.append(Example(f"{task}/{index}", task, fields, choices, index % size, facts=(f"f{index}",)))
    return rows


@pytest.mark.parametrize("task", OWN)
def test_scores_are_those_of_lm_evals_own_model_class(task):
    model, rows = tiny_llama(len(KNOWING)), made_up(task, 16)
    result = evaluate_own_task(model, KNOWING, rows, task, batch_size=4)
    theirs = HFLM(pretrained=model, tokenizer=KNOWING, batch_size=1, max_length=64)
    _, samples = _lm_eval(theirs, rows, task)
    sums = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    if task == "boolq":
        sums = [row[::-1] for row in sums]  # its choices are no, yes
    best = [max(range(len(row)), key=row.__getitem__) for row in sums]
    assert result["correct"] == [int(b == e.answer) for b, e in zip(best, rows, strict=True)]
    assert result["correct"] == [int(sample["acc"]) for sample in samples] and 0 < sum(result["correct"]) < 16
    nll = [math.log(sum(map(math.exp, row))) - row[e.answer] for row, e in zip(sums, rows, strict=True)]
    assert result["choice_nll"] == pytest.approx(nll, abs=2e-4)
    assert (result["acc"], result["count"]) == (pytest.approx(sum(result["correct"]) / 16), 16)
    assert result["ids"] == [e.id for e in rows] and result["facts"][3] == ["f3"]
    assert ("acc_norm" in result) == ("acc_norm" in samples[0])


PROMPTS = {
    "piqa": lambda e: f"Question: {e.fields['goal']}\nAnswer:",
    "boolq": lambda e: f"{e.fields['passage']}\nQuestion: {e.fields['question']}?\nAnswer:",
    "siqa": lambda e: f"Q: {e.fields['context']} {e.fields['question']}\nA:",
    "arc_easy": lambda e: f"Question: {e.fields['question']}\nAnswer:",
    "arc_challenge": lambda e: f"Question: {e.fields['question']}\nAnswer:",
    "winogrande": lambda e: e.fields["sentence"].split("_")[0] + e.choices[0],
    "openbookqa": lambda e: e.fields["question"],
    "mmlu": lambda e: "\n".join(
        [
            "The following are multiple choice questions (with answers) about "
            f"{e.fields['subject']}.\n\n{e.fields['question']}",
            *(f"{letter}. {choice}" for letter, choice in zip("ABCD", e.choices, strict=True)),
            "Answer:",
        ]
    ),
}


@pytest.mark.parametrize("task", OWN)
def test_prompts_are_lm_evals_own(task):
    rows, asked = made_up(task), []

    class Listening(HFLM):
        def loglikelihood(self, requests, **_):
            asked.extend(requests)
            return [(-1.0, False) for _ in requests]

    _lm_eval(Listening(pretrained=tiny_llama(len(TOKENIZER)), tokenizer=TOKENIZER), rows, task)
    met = {request.args[0] for request in asked}
    assert {PROMPTS[task](example) for example in rows} <= met
    assert len(asked) == sum(len(example.choices) for example in rows)


@pytest.mark.parametrize("task", sorted(set(OWN) - {"boolq"}))  # whose copy there is another one
def test_rows_have_the_columns_of_the_hub(task):
    """A row for lm-eval, read as a row of the hub, is the example again."""
    for example in made_up(task):
        row = OWN[task].row(example)
        row = {**row, "subject": row["subject"].replace(" ", "_")} if task == "mmlu" else row
        parsed = BENCHMARKS[task].parse(COPIES[task].adapt({"id": example.id, **row}))
        again = Example(**{"id": example.id, "task": task, "facts": example.facts, **parsed})
        assert again == example


def test_routes_are_counted_and_long_prompts_lose_their_left():
    result = evaluate_own_task(routed_llama(), TOKENIZER, made_up("mmlu"), "mmlu", max_length=24)
    assert result["rows"] == {"used": 9, "dropped": 0, "cut": 9}
    assert 0.3 < result["execution_ratio"] < 0.95 and result["loss_ratio"] < result["execution_ratio"]
    assert result["protocol"]["name"] == "lm_eval" and result["protocol"]["lm_eval"] == "0.4.13"
    with pytest.raises(UserError, match="longer than 1 tokens; raise max_length"):
        evaluate_own_task(routed_llama(), TOKENIZER, made_up("mmlu"), "mmlu", max_length=1)


def test_what_lm_eval_lacks_is_refused():
    model = tiny_llama(len(TOKENIZER))
    with pytest.raises(UserError, match='lm-eval has no task "mmlu_music"; set protocol: likelihood'):
        evaluate_own_task(model, TOKENIZER, load_task("mmlu", "test")[:3], "mmlu")
    with pytest.raises(UserError, match="lm-eval's own tasks have none for alpaca"):
        evaluate_own_task(model, TOKENIZER, responses(3), "alpaca")


def test_the_profile_says_which_protocol_measures_and_every_result_names_it():
    model, choice, free = tiny_llama(len(TOKENIZER)), questions(5), responses(5)
    named = {}
    for protocol in ("likelihood", "lm_eval"):
        profile = load_profile("tiny", protocol=protocol, max_length=64)
        lab = SimpleNamespace(profile=profile, examples=lambda task, _: free if task == "alpaca" else choice)
        results = [measure(lab, task, model, TOKENIZER) for task in ("arc_easy", "alpaca")]
        named[protocol] = [result["protocol"]["name"] for result in results]
        assert set(results[0]) >= {"metric", "acc", "stderr", "execution_ratio", "expected_acc", "ids"}
    assert named == {"likelihood": ["likelihood", "perplexity"], "lm_eval": ["lm_eval", "perplexity"]}


def test_the_protocol_is_part_of_an_evaluations_settings_alone():
    ours, other = (Lab(load_profile("tiny", protocol=name)) for name in ("likelihood", "lm_eval"))
    spec = {"task": "piqa", "method": "qtale", "seed": 0, "bits": 4, "theta": "zero"}
    assert "protocol" not in ours.settings("evaluation", spec)
    assert other.settings("evaluation", spec) == {
        **ours.settings("evaluation", spec), "protocol": "lm_eval"
    }  # fmt: skip
    for kind, changed in (
        ("finetune", {}),
        ("quantization", {}),
        ("threshold", {}),
        ("evaluation", {"task": "alpaca"}),
    ):
        assert ours.settings(kind, {**spec, **changed}) == other.settings(kind, {**spec, **changed})
