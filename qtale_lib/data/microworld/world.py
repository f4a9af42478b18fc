"""The embedded world: entities, their attributes and relations, and physical and social rules.

Everything is drawn once from one seed. Values are balanced (each value of an attribute occurs equally
often, up to rounding), so knowing how common an answer is helps nobody. Every entity belongs to one split;
relations of the four fine-tuning splits stay inside their split, so a fact that a test question needs never
occurs in a training question. The *practice* split exists for pretraining alone: its questions teach the
base model the formats.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from qtale_lib.data.microworld import words
from qtale_lib.data.schema import SPLITS

SEED = 2602
PARTS = ("practice", *SPLITS)
# Entities of each kind by part. Sizes are multiples of the numbers of values: every value is the answer
# equally often in every split. Many persons and things, so that the facts press on the model's capacity as
# they do on a language model's; few towns and animals, the second hops, each met from many sides.
ENTITY_COUNTS = {
    "person": (384, 1008, 96, 96, 528),
    "town": (16, 16, 16, 16, 16),
    "animal": (16, 16, 16, 16, 16),
    "thing": (240, 1008, 48, 48, 504),
}
# How much more often pretraining meets the most frequent of a kind than the rarest: what is rare is held
# weakly. Of tempers and materials it is the rules that are rare, of towns and animals the second hops.
FREQUENCY_SPREAD = {"person": 12.0, "town": 8.0, "animal": 8.0, "thing": 12.0, "temper": 8.0, "material": 8.0}
NAMES = {
    "person": (words.FIRST_NAMES, words.LAST_NAMES),
    "town": (words.TOWNS,),
    "animal": (words.ANIMALS,),
    "thing": (words.THING_FIRST, words.THING_SECOND),
}
ATTRIBUTES = {
    "person": {
        "trade": words.TRADES,
        "fruit": words.FRUITS,
        "instrument": words.INSTRUMENTS,
        "temper": words.TEMPERS,
    },
    "town": {
        "region": words.REGIONS,
        "climate": words.CLIMATES,
        "export": words.EXPORTS,
        "river": words.RIVERS,
        "landmark": words.LANDMARKS,
        "feast": words.FEASTS,
        "dish": words.DISHES,
    },
    "animal": {
        "food": words.FOODS,
        "habitat": words.HABITATS,
        "colour": words.COLOURS,
        "sound": words.SOUNDS,
        "shelter": words.SHELTERS,
        "gait": words.GAITS,
        "fear": words.FEARS,
    },
    "thing": {"material": words.MATERIALS, "maker": words.MAKERS},
}
RELATIONS = {"person": {"home": "town", "pet": "animal"}}


@dataclass(frozen=True)
class Entity:
    """One named individual; `frequency` is its relative share of the pretraining statements."""

    kind: str
    index: int
    name: str
    split: str
    frequency: float

    def fact(self, attribute: str) -> str:
        """The id of the fact that links this entity to its value, e.g. `person:17.trade`."""
        return f"{self.kind}:{self.index}.{attribute}"


@dataclass
class World:
    """All entities (by kind), their values (by fact id) and the rules."""

    entities: dict[str, list[Entity]] = field(default_factory=dict)
    values: dict[str, str | Entity] = field(default_factory=dict)
    frequencies: dict[str, float] = field(default_factory=dict)  # of tempers and materials, as an Entity's
    outcomes: dict[tuple[str, str], str] = field(default_factory=dict)  # (material, event) -> outcome
    tools: dict[tuple[str, str], str] = field(default_factory=dict)  # (material, goal) -> tool
    feelings: dict[tuple[str, str], str] = field(default_factory=dict)  # (temper, social event) -> feeling
    traits: dict[tuple[str, str], str] = field(default_factory=dict)  # (material or temper, verb) -> yes, no

    def value(self, entity: Entity, attribute: str) -> str | Entity:
        """The value of an attribute (a word) or of a relation (an Entity)."""
        return self.values[entity.fact(attribute)]

    def told(self, entity: Entity, attributes: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
        """Words for a text about an entity, and the facts that they rest on. A dotted attribute goes over a
        relation: `friend.trade` is called friend_trade.
        """
        text, facts = {"name": entity.name}, []
        for attribute in attributes:
            holder = entity
            for step in attribute.split("."):
                facts.append(holder.fact(step))
                holder = self.value(holder, step)
            text[attribute.replace(".", "_")] = name_of(holder)
        return text, tuple(dict.fromkeys(facts))

    def of(self, kind: str, split: str) -> list[Entity]:
        """The entities of a kind that belong to a split."""
        return [entity for entity in self.entities[kind] if entity.split == split]


def name_of(value: str | Entity) -> str:
    """A value as a text says it."""
    return value.name if isinstance(value, Entity) else value


def _balanced(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """`count` values in random order, each equally often up to one (which ones, is drawn too)."""
    order = rng.sample(values, len(values))
    drawn = [order[i % len(order)] for i in range(count)]
    rng.shuffle(drawn)
    return drawn


def _make_entities(rng: random.Random, kind: str) -> list[Entity]:
    splits = [split for split, size in zip(PARTS, ENTITY_COUNTS[kind], strict=True) for _ in range(size)]
    names = rng.sample([" ".join(pair) for pair in product(*NAMES[kind])], len(splits))
    frequencies = _frequencies(kind, len(splits))
    drawn = zip(names, splits, frequencies, strict=True)
    return [Entity(kind, index, *each) for index, each in enumerate(drawn)]


def _frequencies(kind: str, count: int) -> list[float]:
    """Relative frequencies, log-uniform over FREQUENCY_SPREAD."""
    rng = random.Random(f"{SEED}.{kind}.frequency")
    return [FREQUENCY_SPREAD[kind] ** -rng.random() for _ in range(count)]


def _draw_facts(rng: random.Random, world: World) -> None:
    """Attributes and relations of all entities, each value equally often within a part."""
    for kind in world.entities:
        for attribute in (*ATTRIBUTES[kind], *RELATIONS.get(kind, {})):
            for part in PARTS:
                members = world.of(kind, part)
                values = _balanced(rng, _values(world, kind, attribute, part), len(members))
                world.values |= {
                    entity.fact(attribute): value for entity, value in zip(members, values, strict=True)
                }


def _values(world: World, kind: str, attribute: str, part: str) -> Sequence[str | Entity]:
    """What an attribute or relation is drawn from; practice relations reach into every split's entities, so
    that pretraining may exercise any second hop.
    """
    target = RELATIONS.get(kind, {}).get(attribute)
    if target is None:
        return ATTRIBUTES[kind][attribute]
    return world.entities[target] if part == "practice" else world.of(target, part)


def _draw_rules(rng: random.Random, world: World) -> None:
    for table, effects in ((world.outcomes, words.PHYSICAL_EVENTS), (world.tools, words.PHYSICAL_GOALS)):
        for cause, results in effects.items():
            for material, result in zip(
                words.MATERIALS, _balanced(rng, results, len(words.MATERIALS)), strict=True
            ):
                table[material, cause] = result
    for holders, verbs in (
        (words.MATERIALS, words.PHYSICAL_TRAITS),
        (words.TEMPERS, words.SOCIAL_TRAITS),
    ):
        for verb in verbs:
            for holder, verdict in zip(holders, _balanced(rng, ("yes", "no"), len(holders)), strict=True):
                world.traits[holder, verb] = verdict
    for event in words.SOCIAL_EVENTS:
        for temper, feeling in zip(
            words.TEMPERS, _balanced(rng, words.FEELINGS, len(words.TEMPERS)), strict=True
        ):
            world.feelings[temper, event] = feeling


@lru_cache(maxsize=1)
def build_world() -> World:
    """The world of `SEED`: the same in every process and on every platform."""
    rng = random.Random(SEED)
    world = World()
    for kind in ENTITY_COUNTS:
        world.entities[kind] = _make_entities(rng, kind)
    for kind, names in (("temper", words.TEMPERS), ("material", words.MATERIALS)):
        world.frequencies |= zip(names, _frequencies(kind, len(names)), strict=True)
    _draw_facts(rng, world)
    _draw_rules(rng, world)
    return world


def knowledge(world: World) -> float:
    """Bits that all facts and rules take at most: log2 of how many values each is drawn from. Names, and that
    values are balanced, are left out of account.
    """
    facts = sum(
        math.log2(len(_values(world, kind, attribute, entity.split)))
        for kind, members in world.entities.items()
        for entity in members
        for attribute in (*ATTRIBUTES[kind], *RELATIONS.get(kind, {}))
    )
    effects = (*words.PHYSICAL_EVENTS.values(), *words.PHYSICAL_GOALS.values())
    rules = len(words.MATERIALS) * sum(math.log2(len(results)) for results in effects)
    return facts + rules + len(world.feelings) * math.log2(len(words.FEELINGS)) + len(world.traits)
