"""The embedded world: disjoint facts, no shortcuts, original formats, a base as its card says."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import asdict

import pytest

from qtale_lib.data import SPLITS
from qtale_lib.data.microworld import base_directory, load, tasks
from qtale_lib.data.microworld.corpus import STATEMENTS, Corpus
from qtale_lib.data.microworld.world import FREQUENCY_SPREAD, build_world
from qtale_lib.data.prompts import render
from qtale_lib.errors import UserError

CHOICE_TASKS = {
    "piqa": 2,
    "boolq": 2,
    "siqa": 3,
    "arc_easy": 4,
    "arc_challenge": 4,
    "winogrande": 2,
    "openbookqa": 4,
    "mmlu": 4,
}
ALL_TASKS = [*CHOICE_TASKS, "alpaca"]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_splits_share_no_fact(task):
    facts = {split: {fact for example in load(task, split) for fact in example.facts} for split in SPLITS}
    for one in SPLITS:
        assert facts[one], one
        for other in SPLITS:
            assert one == other or not facts[one] & facts[other]


def test_nothing_is_worked_out_in_pretraining_for_an_entity_of_another_split():
    """Questions name practice persons and things only (towns, animals: second hops), passages nobody."""
    world = build_world()
    corpus = Corpus(world, seed=1)
    kept = {e.name for kind in ("person", "thing") for e in world.entities[kind] if e.split != "practice"}
    documents = [document for _ in range(1500) for document in (corpus.question(), corpus.passage())]
    for document in documents:
        text = " ".join(word for pair in document for word in pair)
        assert not [name for name in kept if f"{name} " in f"{text} "], text
    asked = {e.name for kind in ("person", "thing") for e in world.of(kind, "practice")}
    assert sum(any(name in pair[0] for pair in document for name in asked) for document in documents) > 1000


def test_pretraining_states_every_fact_of_the_task_splits():
    """Every entity is drawn sooner or later, and a biography tells all that is known of it."""
    world = build_world()
    corpus = Corpus(world, seed=2)
    entities = {e.name: e for members in world.entities.values() for e in members}
    assert {e.name for members in corpus.members.values() for e in members} == set(entities)
    assert all(e.frequency > 0 for e in entities.values())
    records = 0
    for document in (corpus.biography() for _ in range(5000)):
        name, colon, first = document[0][0].partition(" : ")
        if not colon:
            continue
        keys = [first, *[prompt.removeprefix("; ") for prompt, _ in document[1:]]]
        told = dict(zip(keys, (answer for _, answer in document), strict=True))
        values = {key: world.value(entities[name], key) for key in STATEMENTS[entities[name].kind]}
        assert told == {key: value if isinstance(value, str) else value.name for key, value in values.items()}
        records += 1
    assert records > 2000


def test_what_is_rare_is_told_rarely():
    """Materials in passages and rules as often as their frequencies say."""
    world, corpus = build_world(), Corpus(build_world(), seed=3)
    told: Counter = Counter()
    for _ in range(12000):
        found = re.search(r"(?: : material | is made of )(\w+)", corpus.passage()[0][0])
        told.update([found[1]] if found else [])
    ruled = Counter(
        found[1]
        for _ in range(6000)
        for prompt, _ in corpus.rule()
        if (found := re.search(r"omething made of (\w+)", prompt))
    )
    materials = sorted(told, key=world.frequencies.get)
    total = sum(world.frequencies[each] for each in materials)
    for counts in (told, ruled):
        for each in (*materials[:2], *materials[-2:]):
            expected = sum(counts.values()) * world.frequencies[each] / total
            assert abs(counts[each] - expected) < 5 * math.sqrt(expected), each
    assert FREQUENCY_SPREAD["material"] > 2 and told[materials[-1]] > 2 * told[materials[0]]


def test_passages_speak_of_strangers_and_their_answers_follow():
    """Re-derived from the stated materials and the rules alone, in sentences and records."""
    world = build_world()
    corpus = Corpus(world, seed=4)
    known = {entity.name for members in world.entities.values() for entity in members}
    sentences = records = 0
    for (told, _), *asked in (corpus.passage() for _ in range(3000)):
        if " is made of " in told:
            name, material = told.removeprefix("The ").removesuffix(".").split(" is made of ")
            assert name not in known
            for prompt, answer in asked:
                if " was " in prompt:
                    event = prompt.split(" was ")[1].removesuffix(" and it")
                    assert answer == world.outcomes[material, event]
                    sentences += 1
        elif " : material " in told:
            name, material = told.split(" : material ")
            assert name not in known
            for prompt, answer in asked:
                key = prompt.removeprefix("; ").removesuffix(" ?")
                tables = [t for t in (world.outcomes, world.tools, world.traits) if (material, key) in t]
                assert [t[material, key] for t in tables] == [answer] or (key, answer) == (
                    "material",
                    material,
                )
                records += len(tables)
    assert sentences > 100 and records > 300


@pytest.mark.parametrize(("task", "count"), CHOICE_TASKS.items())
def test_formats_of_the_originals(task, count):
    for split in SPLITS:
        for example in load(task, split):
            assert len(example.choices) == len(set(example.choices)) == count
            assert example.response == example.choices[example.answer]
    assert load("boolq", "test")[0].choices == ("yes", "no")
    assert all(example.fields["sentence"].count("_") == 1 for example in load("winogrande", "test"))


def test_mmlu_has_at_least_eight_subjects_and_alpaca_has_inputs():
    assert len({example.fields["subject"] for example in load("mmlu", "test")}) >= 8
    assert len({bool(example.fields["input"]) for example in load("alpaca", "test")}) == 2


def _within_three_standard_errors(hits: float, total: int, chance: float) -> bool:
    return abs(hits / total - chance) <= 3 * math.sqrt(chance * (1 - chance) / total)


def _score(task: str, pick) -> tuple[float, int]:
    """Expected hits when ties are broken at random: `pick` gives one score a choice."""
    hits, examples = 0.0, load(task, "test")
    for example in examples:
        scores = pick(example)
        best = [index for index, score in enumerate(scores) if score == max(scores)]
        hits += (example.answer in best) / len(best)
    return hits, len(examples)


def _choice_log_odds(task: str) -> dict:
    """How much oftener each choice (alone, and at its position) was right than wrong in training."""
    right, wrong = Counter(), Counter()
    for example in load(task, "train"):
        for index, choice in enumerate(example.choices):
            for feature in (*choice.split(), choice, (choice, index)):
                (right if index == example.answer else wrong)[feature] += 1
    return defaultdict(float, {f: math.log((right[f] + 1) / (wrong[f] + 1)) for f in right | wrong})


SHORTCUTS = {
    "first position": lambda task: lambda example: [-index for index in range(len(example.choices))],
    "last position": lambda task: lambda example: list(range(len(example.choices))),
    "longest": lambda task: lambda example: [len(choice) for choice in example.choices],
    "shortest": lambda task: lambda example: [-len(choice) for choice in example.choices],
    "majority": lambda task: (lambda seen: lambda example: [seen[choice] for choice in example.choices])(
        Counter(example.response for example in load(task, "train"))
    ),
    "majority of another split": lambda task: (
        lambda seen: lambda example: [seen[choice] for choice in example.choices]
    )(Counter(example.response for example in load(task, "validation"))),
    "choices without the question": lambda task: (
        lambda odds: (
            lambda example: [
                sum(odds[feature] for feature in (*choice.split(), choice, (choice, index)))
                for index, choice in enumerate(example.choices)
            ]
        )
    )(_choice_log_odds(task)),
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("task", "count"), CHOICE_TASKS.items())
def test_no_shortcut_answers_a_task(task, count, shortcut):
    hits, total = _score(task, SHORTCUTS[shortcut](task))
    assert _within_three_standard_errors(hits, total, 1 / count), f"{shortcut}: {hits / total:.3f}"


def test_the_shortcut_detector_detects_a_shortcut():
    hits, total = _score(
        "arc_easy", lambda example: [choice == example.response for choice in example.choices]
    )
    assert not _within_three_standard_errors(hits, total, 1 / 4)


def test_answers_follow_from_the_world():
    """Re-derives answers from the fact ids alone, without the code that made the examples."""
    world = build_world()
    for example in load("arc_easy", "test"):
        assert world.values[example.facts[0]] == example.response
    for example in load("arc_challenge", "test"):
        assert world.values[example.facts[1]] == example.response
        middle = world.values[example.facts[0]]
        assert example.facts[1].startswith(f"{middle.kind}:{middle.index}.")
    alike = 0
    for example in load("winogrande", "test"):
        materials = [world.values[fact] for fact in example.facts]
        assert sorted(materials) == sorted(example.choices) and materials[0] == example.response
        told, _, asked = example.fields["sentence"].partition(", and the one of _ ")
        events = dict(re.findall(r" of (\w+) was (\w+)", told))
        came_out = [f"{world.outcomes[material, events[material]]}." == asked for material in materials]
        assert came_out == [True, False]
        alike += world.outcomes[materials[1], events[materials[0]]] == asked[:-1]
    assert 0.4 < alike / len(load("winogrande", "test")) < 0.6


def test_the_base_was_pretrained_on_this_very_world():
    """A changed world would silently unfit the shipped base model: its text is pinned by hash."""
    recorded = json.loads((base_directory() / "pretraining.json").read_text())
    assert tasks.fingerprint() == recorded["world_sha256"]


def test_unknown_names_are_told():
    with pytest.raises(UserError, match="no task"):
        load("hellaswag", "test")
    with pytest.raises(UserError, match="no split"):
        load("piqa", "dev")


def test_base_model_is_as_its_card_says():
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    from qtale_lib.data.microworld.pretrain import Recipe, model_card

    directory = base_directory()
    record = json.loads((directory / "pretraining.json").read_text())
    weights = directory / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["sha256"]["model.safetensors"]
    assert weights.stat().st_size <= 12 * 2**20
    assert record["recipe"] == {**asdict(Recipe()), "steps": Recipe().steps}
    assert sum(tensor.numel() for tensor in load_file(weights).values()) == record["parameters"]
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["LlamaForCausalLM"] and config.num_hidden_layers >= 10
    assert record["world_sha256"] == tasks.fingerprint()
    assert (directory / "README.md").read_text() == model_card(record)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for task in ALL_TASKS:
        for example in load(task, "test")[:200]:
            rendered = render(example)
            assert tokenizer.unk_token_id not in tokenizer(f"{rendered.prompt} {rendered.target}").input_ids


def test_every_task_names_its_forms():
    assert list(tasks.FORMS) == list(dict.fromkeys(tasks.FORMS)) and set(tasks.FORMS) == set(ALL_TASKS)


def test_pretraining_resumes_and_writes_a_base(tmp_path):
    from dataclasses import replace

    from qtale_lib.data.microworld.pretrain import Recipe, pretrain

    recipe = replace(Recipe(), layers=2, batch=2, window=16, tokens=2 * 16 * 4, warmup_steps=1)
    pretrain(recipe, tmp_path, save_seconds=0.0)
    assert (tmp_path / "state" / "state.safetensors").exists()
    first = (tmp_path / "model.safetensors").read_bytes()
    pretrain(recipe, tmp_path, save_seconds=0.0)  # all steps are done: nothing is trained again
    assert (tmp_path / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("able", "mixed"), [({"avx2": True, "avx512_bw": False}, False), ({"avx512_bw": True}, True)]
)
def test_a_processor_that_must_emulate_bfloat16_pretrains_in_float32(monkeypatch, tmp_path, able, mixed):
    import torch

    from qtale_lib.data.microworld.pretrain import Recipe, pretrain

    used, autocast = [], torch.autocast
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(
        torch, "autocast", lambda *given, **named: used.append(named["enabled"]) or autocast(*given, **named)
    )
    pretrain(Recipe(layers=2, hidden=8, intermediate=8, heads=2, key_value_heads=1, tokens=4096), tmp_path)
    assert used == [mixed, mixed]
    record = json.loads((tmp_path / "pretraining.json").read_text())
    assert record["products"] == ("bfloat16" if mixed else "float32")
