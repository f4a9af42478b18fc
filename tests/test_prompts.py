"""Both prompt styles: golden texts, round trips, and the options' labels."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_lib.config import TASKS
from qtale_lib.data import BENCHMARKS
from qtale_lib.data.prompts import COMPACT, DLLM, render
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.provenance import ROOT

DATA = os.environ.get("QTALE_TEST_DATA")

FIELDS = {
    "piqa": ("goal",),
    "boolq": ("passage", "question"),
    "siqa": ("context", "question"),
    "arc_easy": ("question",),
    "arc_challenge": ("question",),
    "winogrande": ("sentence",),
    "openbookqa": ("question",),
    "mmlu": ("subject", "question"),
    "alpaca": ("instruction", "input"),
}
SIZES = {
    "piqa": 2,
    "boolq": 2,
    "siqa": 3,
    "arc_easy": 5,
    "arc_challenge": 3,
    "winogrande": 2,
    "openbookqa": 4,
    "mmlu": 4,
}
CHOICE_TASKS = sorted(SIZES)


def example(task: str, texts: list[str], answer: int = 0) -> Example:
    """An example of the task made of the given texts: its fields first, its choices after."""
    names = FIELDS[task]
    choices = ("yes", "no") if task == "boolq" else tuple(texts[len(names) :][: SIZES.get(task, 0)])
    fields = dict(zip(names, texts, strict=False))
    return Example("x", task, fields, choices, answer if choices else None, "" if choices else "a response")


def test_every_task_has_its_templates():
    assert set(COMPACT) == {*TASKS, "alpaca_eval", "samsum"} == set(BENCHMARKS)
    assert set(FIELDS) == set(TASKS)
    assert set(DLLM) == set(TASKS) - {"alpaca"}


def test_compact_golden_texts():
    siqa = Example("x", "siqa", {"context": "bo fell .", "question": "why ?"}, ("ice", "sun", "wind"), 2)
    rendered = render(siqa)
    assert rendered.prompt == "context : bo fell . question : why ? answer :"
    assert (rendered.continuations, rendered.target) == (("ice", "sun", "wind"), "wind")
    boolq = Example("x", "boolq", {"passage": "bo is red .", "question": "is bo red"}, ("yes", "no"), 0)
    assert render(boolq).prompt == "passage : bo is red . question : is bo red ? answer :"
    blank = {"sentence": "Bo met Al, and the cat sat by the old _ ."}
    winogrande = Example("x", "winogrande", blank, ("Bo", "Al"), 0)
    assert render(winogrande).prompt == f"sentence : {blank['sentence']} answer : the old"
    first = Example("x", "winogrande", {"sentence": "_ slept ."}, ("Bo", "Al"), 0)
    assert render(first).prompt == "sentence : _ slept . answer :"
    plain = Example("x", "alpaca", {"instruction": "name a colour", "input": ""}, response="red")
    assert render(plain).prompt == "instruction : name a colour response :"
    assert (render(plain).continuations, render(plain).target) == ((), "red")
    given_input = Example("x", "alpaca", {"instruction": "repeat", "input": "bo"}, response="bo")
    assert render(given_input).prompt == "instruction : repeat input : bo response :"


def test_dllm_golden_text():
    arc = Example("x", "arc_easy", {"question": "What is wet?"}, ("water", "sand", "air"), 1)
    rendered = render(arc, "dllm")
    assert rendered.prompt.endswith(
        "### Input:\nQuestion: What is wet?\n\nAnswers:\n  A. water\n  B. sand\n  C. air\n\n### Response:"
    )
    assert (rendered.continuations, rendered.target) == (("A", "B", "C"), "B")


LABELS = {
    "piqa": "12",
    "siqa": "123",
    "winogrande": "12",
    "arc_easy": "ABCDE",
    "openbookqa": "ABCD",
    "mmlu": "ABCD",
}


@pytest.mark.parametrize("task", LABELS)
def test_dllm_labels_stand_before_their_choices(task):
    rendered = render(example(task, [f"text{i}" for i in range(8)], answer=1), "dllm")
    assert rendered.continuations == tuple(LABELS[task]) and rendered.target == LABELS[task][1]
    first = len(FIELDS[task])
    for index, label in enumerate(LABELS[task]):
        assert f"\n  {label}. text{first + index}\n" in rendered.prompt


@pytest.mark.skipif(not DATA, reason="QTALE_TEST_DATA does not name a folder with dllm_prompts")
@pytest.mark.parametrize("text", ["", "some input"])
def test_dllm_alpaca_prompt_is_the_published_one(text):
    published = json.loads((Path(DATA) / "dllm_prompts" / "alpaca.json").read_text())
    fields = {"instruction": "Say {it}.", "input": text}
    expected = published["prompt_with_input" if text else "prompt_wo_input"].format(**fields)
    assert render(Example("x", "alpaca", fields, response="it"), "dllm").prompt == expected


words = st.text(st.sampled_from("abcxyz {}%\\"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)


@given(task=st.sampled_from(TASKS), texts=st.lists(words, min_size=8, max_size=8), answer=st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_compact_prompts_give_back_what_they_were_made_of(task, texts, answer):
    made = example(task, texts, answer)
    rendered = render(made)
    pattern = re.escape(COMPACT[task]).replace(r"\{", "(?P<").replace(r"\}", ">.*?)")
    pattern = pattern.replace(r"\ (?P<cue>.*?)", "(?P<cue>.*)")
    found = re.fullmatch(pattern, rendered.prompt).groupdict()
    before = made.fields.get("sentence", "").partition("_")[0].split()
    assert found.pop("cue", "").split() == before[-2:]
    assert found == dict(made.fields)
    assert rendered.target == (rendered.continuations[answer] if made.choices else "a response")


@given(
    task=st.sampled_from(CHOICE_TASKS),
    texts=st.lists(words, min_size=8, max_size=8),
    answer=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_dllm_prompts_hold_everything_in_order(task, texts, answer):
    made = example(task, texts, answer)
    rendered, position = render(made, "dllm"), 0
    parts = [*made.fields.values(), *([] if task == "boolq" else made.choices)]
    material = rendered.prompt.split("### Input:\n")[1]
    for part in parts:
        position = material.index(part, position) + len(part)
    assert rendered.target == rendered.continuations[answer]
    assert len(set(rendered.continuations)) == len(made.choices)


def test_unknown_style_and_task_are_refused():
    made = example("piqa", [f"text{i}" for i in range(8)])
    with pytest.raises(UserError, match='no prompt style "chat"; use one of compact, dllm'):
        render(made, "chat")
    with pytest.raises(UserError, match='no prompt for task "hellaswag"'):
        render(Example("x", "hellaswag", {}, ("a", "b"), 0))


def test_the_page_of_prompts_is_what_the_code_renders():
    spec = importlib.util.spec_from_file_location("prompts_page", ROOT / "scripts" / "prompts.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/prompts.py"
    assert all(f"\n## {task}\n" in script.page() for task in BENCHMARKS)
