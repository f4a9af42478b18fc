"""Dialogues with summaries: told by a rule, in the base's words, apart from its tasks; what ROUGE says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fake_lab import FakeLab
from rouge_score.rouge_scorer import RougeScorer

from qtale_lib import jobs, win_rates
from qtale_lib.base import load_base, load_tokenizer
from qtale_lib.claims import SUMMARY_CLAIMS, verdicts
from qtale_lib.config import load_profile
from qtale_lib.data import SPLITS, Example, load_task, subset
from qtale_lib.data.microworld import base_directory, tasks
from qtale_lib.data.microworld.dialogues import TASK, forms
from qtale_lib.data.microworld.grading import grade
from qtale_lib.data.prompts import render
from qtale_lib.generation import generate_all
from qtale_lib.measurements import Measurements
from qtale_lib.stages import merged_model
from qtale_lib.statistics import NOT_RUN, NOT_SHOWN, NOT_TESTABLE, SHOWN
from qtale_lib.training import finetune

WORDING = {"The", "is", "made", "of", "and", "was", "by", "a", "which", "who", "lives", "in", "town", "plays",
           "the", "likes", "it", "pet", "eats"}  # fmt: skip


def content(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) - WORDING


def test_a_summary_says_what_its_dialogue_settles_and_all_its_facts():
    for example in load_task(TASK, "test"):
        dialogue = example.fields["dialogue"]
        assert content(example.response) <= content(dialogue), example.id
        assert grade(example, example.response).share == 1 and not grade(example, example.response).false
        taken_back = re.findall(r"(?:live in|works as a|made of) (\w+)[?.]\n.*: no,", dialogue)
        assert not set(taken_back) & content(example.response), example.id


def test_two_speak_in_turn_and_some_of_themselves():
    counts = dict.fromkeys(SPLITS)
    for split in SPLITS:
        examples = load_task(TASK, split)
        turns = [example.fields["dialogue"].split("\n") for example in examples]
        speakers = [[turn.partition(":")[0] for turn in each] for each in turns]
        assert all(len(each) == 4 and each[0] == each[2] != each[1] == each[3] for each in speakers)
        counts[split] = len(examples)
    assert counts == tasks.COUNTS
    asked_of_themselves = sum(
        example.response.startswith(example.fields["dialogue"].split("\n")[1].partition(":")[0])
        for example in load_task(TASK, "train")
    )
    assert asked_of_themselves / tasks.COUNTS["train"] == pytest.approx(1 / len(forms()), abs=0.03)


def test_splits_share_no_fact_and_nobody():
    facts = {split: {fact for each in load_task(TASK, split) for fact in each.facts} for split in SPLITS}
    names = {
        split: {name for each in load_task(TASK, split) for name in re.findall(r"(\w+ \w+):", _text(each))}
        for split in SPLITS
    }
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not (facts[one] & facts[other] or names[one] & names[other])


def _text(example: Example) -> str:
    return example.fields["dialogue"]


def test_all_words_but_the_prompts_own_are_the_bases():
    tokenizer = load_tokenizer(base_directory())
    known, split = tokenizer.get_vocab(), tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    rendered = [render(example) for name in SPLITS for example in load_task(TASK, name)]
    met = {word for text in rendered for word, _ in split(f"{text.prompt} {text.target}")}
    assert met - set(known) == {"dialogue", "summary"}
    longest = max(len(split(text.target)) for text in rendered)
    assert longest < load_profile("tiny").generation.max_tokens


def test_the_base_was_made_without_them():
    assert TASK not in tasks.FORMS and set(tasks.ASKED) == {*tasks.FORMS, TASK}


# Which runs there are.


def test_dialogues_are_fine_tuned_beside_the_grid_and_answered_at_16_and_4_bits(tmp_path):
    profile = load_profile("tiny", seeds=2)
    assert not {job.run.task for job in jobs.all_jobs(profile)} & {TASK}
    needed = [job for job in jobs.needs(profile, "12") if job.run.task == TASK]
    methods, seeds = ("full", "dllm", "qtale"), (0, 1)
    assert {(j.run.method, j.run.seed, j.bits, j.extra) for j in needed} == {
        (method, seed, *what)
        for method in methods
        for seed in seeds
        for what in ((None, None), (16, None), (4, None), (16, "responses"), (4, "responses"))
    }
    without = [
        load_profile("tiny", generation={"summaries": False}),
        load_profile("tiny", tasks=["arc_easy"]),
        load_profile("tiny", data_dir=str(tmp_path)),  # where there is no folder of that name
    ]
    assert not any(jobs.summary_runs(each) for each in without)
    (tmp_path / TASK).mkdir()
    assert len(jobs.summary_runs(load_profile("tiny", data_dir=str(tmp_path)))) == 3


# ROUGE.


def test_rouge_is_counted_by_hand():
    """6 words, of which 4 alike in 3 pairs; the references have 5."""
    example = Example("0", TASK, {"dialogue": ""}, response="Ann is a tall baker.")
    (row,) = win_rates.rouge([(example, "so Ann is a tall sailor")]).to_dict("records")
    assert row == pytest.approx({
        "rouge1": 100 * 2 * 4 / (6 + 5), "rouge2": 100 * 2 * 3 / (5 + 4), "rougeL": 100 * 2 * 4 / (6 + 5)
    })  # fmt: skip


def lab_of(**changes) -> FakeLab:
    """QTALE loses the last word of half of its summaries at 4 bits, D-LLM of all of them."""
    usual = {(method, 16, rule): 100.0 for method, rule in (("full", "none"), ("dllm", "argmax"))}
    cells = {("qtale", 4, "searched"): 50.0, ("dllm", 4, "argmax"): 0.0, ("dllm", 4, "searched"): 100.0}
    return FakeLab({**usual, ("qtale", 16, "argmax"): 100.0, **cells}, questions=80, **changes)


def test_tables_and_verdicts_say_who_summarises_better():
    store = Measurements(lab_of(seeds=[0, 1, 2]))
    held = win_rates.response_table(store, jobs.SUMMARISED).frame.set_index(["method", "bits", "theta_rule"])
    assert held.loc[("full", 16, "none"), "rougeL"] == held.loc[("dllm", 16, "argmax"), "exact"] == 100
    assert held.loc[("dllm", 4, "argmax"), "rougeL"] < held.loc[("qtale", 4, "searched"), "rougeL"] < 100
    judged = verdicts(store, "12").set_index("id").loc[[claim.id for claim in SUMMARY_CLAIMS]]
    assert list(judged.verdict) == [SHOWN, SHOWN, NOT_SHOWN]
    gain = held.rougeL[("qtale", 4, "searched")] - held.rougeL[("dllm", 4, "argmax")]
    assert judged.effect.iloc[1] == pytest.approx(gain) and judged.effect.iloc[0] == 0
    one = verdicts(Measurements(lab_of()), "12").set_index("id")
    assert set(one.verdict[one.family == "summaries"]) == {NOT_TESTABLE}
    none = verdicts(Measurements(lab_of(tasks=["arc_easy"])), "12").set_index("id")
    assert set(none.verdict[none.family == "summaries"]) == {NOT_RUN}


@pytest.mark.slow
def test_a_few_hundred_steps_teach_the_base_to_summarise(tmp_path: Path):
    """It begins knowing neither the prompt nor what a summary is."""
    profile = load_profile("tiny", max_steps=300)
    asked, scorer = subset(load_task(TASK, "test"), 60), RougeScorer(["rougeL"])

    def score(model, tokenizer) -> float:
        made = generate_all(model.eval(), tokenizer, [render(example).prompt for example in asked], 32)
        pairs = zip(asked, made, strict=True)
        return float(np.mean([scorer.score(e.response, m.text)["rougeL"].fmeasure for e, m in pairs]))

    base, tokenizer = load_base(profile)
    before = score(base, tokenizer)
    finetune(profile, TASK, "full", 0, tmp_path, examples=subset(load_task(TASK, "train"), 1000))
    after = score(merged_model(tmp_path), tokenizer)
    assert before < 0.2 and after > 0.5
