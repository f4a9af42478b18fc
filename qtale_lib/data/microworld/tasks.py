"""The tasks asked of the embedded world, as Examples in the formats of the originals.

A task is a list of *forms*: a form knows the kind of entity it asks about and makes one Example from such
an entity. The examples of a split are every (form, entity) pair of that split, shuffled, and repeated with
fresh distractors until `COUNTS` is reached. Right answers take every position equally often; distractors
are drawn from the same balanced values as answers.

What takes two steps (all but ARC-easy, MMLU and Alpaca) mostly states the fact that it starts from: the first
step is taken in context, the second from memory. In the other questions both come from memory, which a model
of this size hardly learns: room above it. WinoGrande asks which of two things an outcome tells of.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from qtale_lib.data.microworld import dialogues, words
from qtale_lib.data.microworld.world import ATTRIBUTES, SEED, Entity, World, build_world, name_of
from qtale_lib.data.schema import Example

COUNTS = {"train": 4000, "validation": 1000, "calibration": 600, "test": 2400}
STATED_SHARE = 0.85  # of the questions that take two steps
PREMISES = {
    "temper": "The temper of {name} is {value}.",
    "home": "{name} lives in {value}.",
    "pet": "The pet of {name} is the {value}.",
    "material": "The {name} is made of {value}.",
}
EVENTS = tuple(words.PHYSICAL_EVENTS)
GOALS = tuple(words.PHYSICAL_GOALS)


@dataclass(frozen=True)
class Form:
    """One way to ask: the `kind` of entity asked about, and how; the slot places the right answer."""

    kind: str
    make: Callable[[World, random.Random, Entity, int], Example]


def _choose(
    rng: random.Random, right: str, others: Sequence[str], count: int, slot: int
) -> tuple[tuple[str, ...], int]:
    """`count` different choices with `right` at position slot mod count."""
    wrong = rng.sample([other for other in others if other != right], count - 1)
    position = slot % count
    return (*wrong[:position], right, *wrong[position:]), position


def _one_hop(task: str, kind: str, attribute: str, question: str, subject: str = "") -> Form:
    def make(world: World, rng: random.Random, entity: Entity, slot: int) -> Example:
        right, values = world.value(entity, attribute), tuple(ATTRIBUTES[kind][attribute])
        choices, answer = _choose(rng, right, values, 4, slot)
        fields = {"question": question.format(name=entity.name)}
        if subject:
            fields["subject"] = subject
        facts = (entity.fact(attribute),)
        return Example("", task, fields, choices, answer, facts=facts, values=values)

    return Form(kind, make)


def _two_hop(task: str, relation: str, attribute: str, question: str) -> Form:
    def make(world: World, rng: random.Random, person: Entity, slot: int) -> Example:
        middle = world.value(person, relation)
        values = tuple(ATTRIBUTES[middle.kind][attribute])
        choices, answer = _choose(rng, world.value(middle, attribute), values, 4, slot)
        text = _premise(world, rng, relation, person) + question.format(name=person.name)
        facts = (person.fact(relation), middle.fact(attribute))
        return Example("", task, {"question": text}, choices, answer, facts=facts, values=values)

    return Form("person", make)


def _premise(world: World, rng: random.Random, attribute: str, entity: Entity) -> str:
    """The fact that a question starts from; or, for some, nothing."""
    if rng.random() >= STATED_SHARE:
        return ""
    return PREMISES[attribute].format(name=entity.name, value=name_of(world.value(entity, attribute))) + " "


def _openbookqa(event: str) -> Form:
    def make(world: World, rng: random.Random, thing: Entity, slot: int) -> Example:
        right = world.outcomes[world.value(thing, "material"), event]
        choices, answer = _choose(rng, right, words.PHYSICAL_EVENTS[event], 4, slot)
        premises = _premise(world, rng, "material", thing)
        question = f"{premises}The {thing.name} was {event}. What happened?"
        facts = (thing.fact("material"),)
        return Example("", "openbookqa", {"question": question}, choices, answer, facts=facts)

    return Form("thing", make)


def _piqa(goal: str) -> Form:
    def make(world: World, rng: random.Random, thing: Entity, slot: int) -> Example:
        right = world.tools[world.value(thing, "material"), goal]
        tools, answer = _choose(rng, right, words.PHYSICAL_GOALS[goal], 2, slot)
        solutions = tuple(f"use the {tool}" for tool in tools)
        values = tuple(f"use the {tool}" for tool in words.PHYSICAL_GOALS[goal])
        fields = {"goal": f"{_premise(world, rng, 'material', thing)}To {goal} the {thing.name}"}
        facts = (thing.fact("material"),)
        return Example("", "piqa", fields, solutions, answer, facts=facts, values=values)

    return Form("thing", make)


def _siqa(event: str) -> Form:
    def make(world: World, rng: random.Random, person: Entity, slot: int) -> Example:
        right = world.feelings[world.value(person, "temper"), event]
        values = tuple(words.FEELINGS)
        choices, answer = _choose(rng, right, values, 3, slot)
        context = f"{_premise(world, rng, 'temper', person)}{person.name} {event}."
        fields = {"context": context, "question": "How does this person feel?"}
        facts = (person.fact("temper"),)
        return Example("", "siqa", fields, choices, answer, facts=facts, values=values)

    return Form("person", make)


def _winogrande(event: str) -> Form:
    """Two things of stated materials, each with its event; one came out as the other did not.

    In half of the questions the other's material would have come out alike, had the event been its own.
    """

    def make(world: World, rng: random.Random, thing: Entity, slot: int) -> Example:
        material = world.value(thing, "material")
        outcome, alike = world.outcomes[material, event], rng.random() < 0.5
        other, its = rng.choice(_counterparts(thing.split, material, event, alike))
        # the order in the sentence says nothing about the answer
        first, second = rng.sample([(thing, event), (other, its)], 2)
        told = ", the ".join(f"{p.name} of {world.value(p, 'material')} was {e}" for p, e in (first, second))
        sentence = f"The {told}, and the one of _ {outcome}."
        pair = (thing, other) if slot % 2 == 0 else (other, thing)
        choices = tuple(world.value(each, "material") for each in pair)
        facts = (thing.fact("material"), other.fact("material"))
        return Example("", "winogrande", {"sentence": sentence}, choices, slot % 2, facts=facts)

    return Form("thing", make)


@cache
def _counterparts(split: str, material: str, event: str, alike: bool) -> list[tuple[Entity, str]]:
    """Things of another material, each with another event, that come out otherwise than this one at its own;
    at its own they would come out alike, or not.
    """
    world = build_world()
    outcome = world.outcomes[material, event]
    return [
        (each, its)
        for each in world.of("thing", split)
        for own in [world.value(each, "material")]
        for its in EVENTS
        if own != material and world.outcomes[own, its] != outcome
        if its != event and alike == (world.outcomes[own, event] == outcome)
    ]


def _boolq(kind: str, attribute: str, verb: str, scene: str) -> Form:
    """Yes/no about what a thing of its material, or a person of that temper, does."""

    def make(world: World, rng: random.Random, entity: Entity, slot: int) -> Example:
        guest = rng.choice([each for each in world.of("person", entity.split) if each is not entity])
        named = entity.name if kind == "person" else f"the {entity.name}"
        premises = _premise(world, rng, attribute, entity)
        fields = {
            "passage": premises + scene.format(name=entity.name, guest=guest.name),
            "question": f"does {named} {verb}",
        }
        verdict = world.traits[world.value(entity, attribute), verb]
        answer = ("yes", "no").index(verdict)
        return Example("", "boolq", fields, ("yes", "no"), answer, facts=(entity.fact(attribute),))

    return Form(kind, make)


def _alpaca(kind: str, instruction: str, response: str, attributes: Sequence[str], given: str = "") -> Form:
    """Instruction about an entity; a dotted attribute goes over a relation (`friend.trade`)."""

    def make(world: World, rng: random.Random, entity: Entity, slot: int) -> Example:
        text, facts = world.told(entity, attributes)
        fields = {"instruction": instruction.format(**text), "input": given.format(**text)}
        return Example("", "alpaca", fields, response=response.format(**text), facts=facts)

    return Form(kind, make)


FORMS: dict[str, tuple[Form, ...]] = {
    "piqa": tuple(_piqa(goal) for goal in GOALS),
    "boolq": (
        *(_boolq("thing", "material", verb, scene) for verb, scene in words.PHYSICAL_TRAITS.items()),
        *(_boolq("person", "temper", verb, scene) for verb, scene in words.SOCIAL_TRAITS.items()),
    ),
    "siqa": tuple(_siqa(event) for event in words.SOCIAL_EVENTS),
    "arc_easy": (
        _one_hop("arc_easy", "person", "trade", "What is the trade of {name}?"),
        _one_hop("arc_easy", "person", "fruit", "Which fruit does {name} like?"),
        _one_hop("arc_easy", "person", "instrument", "What does {name} play?"),
        _one_hop("arc_easy", "thing", "material", "What is the {name} made of?"),
        _one_hop("arc_easy", "thing", "maker", "Who made the {name}?"),
    ),
    "arc_challenge": (
        _two_hop("arc_challenge", "home", "climate", "What is the climate in the home town of {name}?"),
        _two_hop("arc_challenge", "home", "export", "What does the home town of {name} sell?"),
        _two_hop("arc_challenge", "home", "region", "In which region does {name} live?"),
        _two_hop("arc_challenge", "pet", "food", "What does the pet of {name} eat?"),
        _two_hop("arc_challenge", "pet", "colour", "What is the colour of the pet of {name}?"),
        _two_hop("arc_challenge", "pet", "habitat", "Where does the pet of {name} come from?"),
        _two_hop("arc_challenge", "home", "river", "Which river flows by the home town of {name}?"),
        _two_hop("arc_challenge", "home", "landmark", "What is the home town of {name} known for?"),
        _two_hop("arc_challenge", "home", "feast", "When is the feast in the home town of {name}?"),
        _two_hop("arc_challenge", "home", "dish", "What does the home town of {name} cook?"),
        _two_hop("arc_challenge", "pet", "sound", "Which sound does the pet of {name} make?"),
        _two_hop("arc_challenge", "pet", "shelter", "Where does the pet of {name} sleep?"),
        _two_hop("arc_challenge", "pet", "gait", "How does the pet of {name} move?"),
        _two_hop("arc_challenge", "pet", "fear", "What does the pet of {name} fear?"),
    ),
    "winogrande": tuple(_winogrande(event) for event in EVENTS),
    "openbookqa": tuple(_openbookqa(event) for event in EVENTS),
    "mmlu": (
        _one_hop("mmlu", "person", "trade", "{name} works as a", "sociology"),
        _one_hop("mmlu", "person", "instrument", "{name} plays the", "music"),
        _one_hop("mmlu", "person", "temper", "The temper of {name} is", "psychology"),
        _one_hop("mmlu", "town", "region", "{name} lies in", "geography"),
        _one_hop("mmlu", "town", "climate", "The climate of {name} is", "meteorology"),
        _one_hop("mmlu", "town", "export", "{name} trades in", "economics"),
        _one_hop("mmlu", "animal", "food", "The {name} feeds on", "nutrition"),
        _one_hop("mmlu", "animal", "habitat", "The {name} is found in the", "ecology"),
        _one_hop("mmlu", "animal", "colour", "The colour of the {name} is", "zoology"),
        _one_hop("mmlu", "thing", "material", "The {name} consists of", "chemistry"),
        _one_hop("mmlu", "thing", "maker", "The {name} was made by the", "history"),
    ),
    "alpaca": (
        _alpaca(
            "person",
            "Describe {name}.",
            "{name} is a {temper} {trade} who likes {fruit}.",
            ("temper", "trade", "fruit"),
        ),
        _alpaca(
            "person",
            "Where does {name} live?",
            "{name} lives in {home}, a {home_climate} town.",
            ("home", "home.climate"),
        ),
        _alpaca(
            "person",
            "Introduce the pet of {name}.",
            "The pet of {name} is the {pet}, which is {pet_colour}.",
            ("pet", "pet.colour"),
        ),
        _alpaca(
            "person",
            "Name the instrument of this person.",
            "{name} plays the {instrument}.",
            ("instrument",),
            "{name}",
        ),
        _alpaca(
            "person", "Name the trade of this person.", "{name} works as a {trade}.", ("trade",), "{name}"
        ),
        _alpaca(
            "town",
            "Tell me about {name}.",
            "{name} is a {climate} town in {region} that sells {export}.",
            ("climate", "region", "export"),
        ),
        _alpaca(
            "animal",
            "Describe the {name}.",
            "The {name} is {colour}, eats {food} and lives in the {habitat}.",
            ("colour", "food", "habitat"),
        ),
        _alpaca(
            "thing",
            "Who made the {name}?",
            "The {name} is made of {material} and was made by a {maker}.",
            ("material", "maker"),
        ),
    ),
}


def _dialogue(kind: str, dialogue: tuple) -> Form:
    def make(world: World, rng: random.Random, entity: Entity, slot: int) -> Example:
        return dialogues.make(world, rng, entity, kind, dialogue)

    return Form("person" if kind == "speaker" else kind, make)


# What the base has not been pretrained on: in neither its text nor the world's fingerprint.
UNSEEN = {dialogues.TASK: tuple(_dialogue(*each) for each in dialogues.forms())}
ASKED = {**FORMS, **UNSEEN}


@lru_cache(maxsize=64)
def examples(task: str, split: str) -> tuple[Example, ...]:
    """All examples of a task in a split: the same in every process."""
    world = build_world()
    rng = random.Random(f"{SEED}.{task}.{split}")
    pairs = [(form, entity) for form in ASKED[task] for entity in world.of(form.kind, split)]
    order: list[tuple[Form, Entity]] = []
    while len(order) < COUNTS[split]:
        order += rng.sample(pairs, len(pairs))
    made = (form.make(world, rng, entity, slot) for slot, (form, entity) in enumerate(order[: COUNTS[split]]))
    return tuple(replace(example, id=f"{task}-{split}-{slot}") for slot, example in enumerate(made))


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """sha256 over every example of FORMS as text: tells whether a base was pretrained on this very world."""
    digest = hashlib.sha256()
    for task in FORMS:
        for split in COUNTS:
            for example in examples(task, split):
                digest.update(repr(example).encode())
    return digest.hexdigest()
