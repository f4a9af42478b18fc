"""Short dialogues of the embedded world with their summaries, in the format of SAMSum.

Two persons of a split talk about a third, a thing or one of themselves; the summary follows by a rule: who or
what it is about, then what was settled; who asked, and what was said and taken back, is left out. Facts are
the split's own, so that test dialogues tell nothing that training has told; what happened stands in the
dialogue alone. The base was pretrained without this task, on all words that it takes but those of its prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from qtale_lib.data.microworld import words
from qtale_lib.data.microworld.world import ATTRIBUTES, Entity, World
from qtale_lib.data.schema import Example

TASK = "samsum"
# kind of what it is about -> (turns of the two speakers in turn, summary, the facts that the summary states).
# {wrong}: another value that the first of these facts could have had. {event}: what happened to a person;
# {done}, {outcome}: what was done to a thing, and what became of it.
DIALOGUES: dict[str, tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...]] = {
    "person": (
        (
            ("Where does {name} live?", "{name} lives in {home}.", "How is the weather in {home}?",
             "{home_climate}."),
            "{name} lives in {home}, a {home_climate} town.",
            ("home", "home.climate"),
        ),
        (
            ("What is the pet of {name}?", "the {pet}.", "What does the {pet} eat?", "{pet_food}."),
            "The pet of {name} is the {pet}, which eats {pet_food}.",
            ("pet", "pet.food"),
        ),
        (
            ("{name} works as a {wrong}.", "no, {name} works as a {trade}.", "What does {name} play?",
             "the {instrument}."),
            "{name} is a {trade} who plays the {instrument}.",
            ("trade", "instrument"),
        ),
        (
            ("What happened to {name}?", "{name} {event}.", "Does {name} live in {wrong}?",
             "no, {name} lives in {home}."),
            "{name} of {home} {event}.",
            ("home",),
        ),
    ),
    "speaker": (
        (
            ("What is the trade of {name}?", "{trade}.", "Which fruit does {name} like?", "{fruit}."),
            "{name} is a {trade} who likes {fruit}.",
            ("trade", "fruit"),
        ),
    ),
    "thing": (
        (
            ("Who made the {name}?", "the {maker}.", "What is the {name} made of?", "{material}."),
            "The {name} is made of {material} and was made by a {maker}.",
            ("material", "maker"),
        ),
        (
            ("What happened to the {name}?", "it was {done} and it {outcome}.",
             "The {name} is made of {wrong}.", "no, it is made of {material}."),
            "The {name} of {material} was {done} and it {outcome}.",
            ("material",),
        ),
    ),
}  # fmt: skip


def forms() -> list[tuple[str, tuple[tuple[str, ...], str, tuple[str, ...]]]]:
    """(kind, dialogue) of all that there are."""
    return [(kind, each) for kind, several in DIALOGUES.items() for each in several]


def make(world: World, rng: random.Random, entity: Entity, kind: str, dialogue: tuple) -> Example:
    """One dialogue about an entity; a "speaker" is asked about himself."""
    turns, summary, attributes = dialogue
    told, facts = _told(world, rng, entity, attributes)
    others = [each for each in world.of("person", entity.split) if each is not entity]
    asks, answers = rng.sample(others, 2)
    speakers = (asks.name, entity.name if kind == "speaker" else answers.name)
    lines = [f"{speakers[place % 2]}: {turn.format(**told)}" for place, turn in enumerate(turns)]
    return Example("", TASK, {"dialogue": "\n".join(lines)}, response=summary.format(**told), facts=facts)


def _told(
    world: World, rng: random.Random, entity: Entity, attributes: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What turns and summary say of an entity, and the facts that they rest on."""
    told, facts = world.told(entity, attributes)
    first = attributes[0]
    values = ATTRIBUTES[entity.kind].get(first) or [each.name for each in _alike(world, entity, first)]
    told["wrong"] = rng.choice([value for value in values if value != told[first]])
    told["event"] = rng.choice(words.SOCIAL_EVENTS)
    if entity.kind == "thing":
        told["done"] = rng.choice(list(words.PHYSICAL_EVENTS))
        told["outcome"] = world.outcomes[world.value(entity, "material"), told["done"]]
    return told, facts


def _alike(world: World, entity: Entity, relation: str) -> list[Entity]:
    """What the relation could have led to within the entity's split."""
    target = world.value(entity, relation)
    return world.of(target.kind, target.split)
