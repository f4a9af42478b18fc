"""The embedded base model's pretraining text: statements of everything, passages about strangers, questions.

A document is a list of (prompt, answer) pairs: "The trade of Anna Reed is" + "baker". Everything that can be
known or worked out stands in an answer, which is what the loss weighs. Most facts are met in short records,
"Anna Reed : trade" + "baker", "; fruit" + "plums": a fact takes three words there, eight in a sentence.
What follows from facts and rules is practised on strangers, whose facts the passage states and who are not
in the world at all: nothing there can be learnt by heart but the rules. Nothing is ever worked out for an
entity of the fine-tuning splits. Questions are about practice entities and use the very prompts of
fine-tuning, so that no prompt token is new to the base.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

from qtale_lib.data.microworld import words
from qtale_lib.data.microworld.tasks import FORMS, PREMISES
from qtale_lib.data.microworld.world import ATTRIBUTES, NAMES, RELATIONS, SEED, Entity, World
from qtale_lib.data.prompts import render

Pair = tuple[str, str]


class Item(NamedTuple):
    """Something to say of an entity, as a sentence or under a key of its record."""

    sentence: str
    key: str
    answer: str


STATEMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {
        "trade": ("{name} works as a", "The trade of {name} is", "{name} is a"),
        "fruit": ("{name} likes", "{name} bought", "The fruit of {name} is"),
        "instrument": ("{name} plays the", "{name} played the", "The instrument of {name} is"),
        "temper": ("The temper of {name} is", "{name} has a temper that is"),
        "home": ("{name} lives in", "The home town of {name} is"),
        "pet": ("The pet of {name} is the", "{name} keeps the"),
    },
    "town": {
        "region": ("{name} lies in", "{name} is a town in"),
        "climate": ("The climate of {name} is", "The weather in {name} is"),
        "export": ("{name} sells", "{name} trades in"),
        "river": ("The river of {name} is the", "{name} lies on the"),
        "landmark": ("{name} is known for its", "The pride of {name} is its"),
        "feast": ("{name} has its feast at", "The feast of {name} is at"),
        "dish": ("{name} cooks", "The dish of {name} is"),
    },
    "animal": {
        "food": ("The {name} eats", "The {name} feeds on"),
        "habitat": ("The {name} lives in the", "The {name} is found in the"),
        "colour": ("The {name} is", "The colour of the {name} is"),
        "sound": ("The {name} makes a", "The sound of the {name} is a"),
        "shelter": ("The {name} sleeps in a", "The shelter of the {name} is a"),
        "gait": ("The {name} moves and", "On its way the {name}"),
        "fear": ("The {name} fears", "The fear of the {name} is"),
    },
    "thing": {
        "material": ("The {name} is made of", "The {name} consists of"),
        "maker": ("The {name} was made by the", "The maker of the {name} is a"),
    },
}
# What follows from two facts of a person: relation -> attribute of its target -> wordings.
TWO_HOPS = {
    "home": {
        "region": ("{name} lives in the region of", "The home town of {name} lies in"),
        "climate": ("The climate in the home town of {name} is", "The weather at the home of {name} is"),
        "export": ("The home town of {name} sells", "The home town of {name} trades in"),
        "river": ("The river in the home town of {name} is the", "The home town of {name} lies on the"),
        "landmark": ("The home town of {name} is known for its", "The pride of the home of {name} is its"),
        "feast": ("The home town of {name} has its feast at", "The feast at the home of {name} is at"),
        "dish": ("The home town of {name} cooks", "The dish at the home of {name} is"),
    },
    "pet": {
        "food": ("The pet of {name} eats", "The pet of {name} feeds on"),
        "habitat": ("The pet of {name} comes from the", "The pet of {name} is found in the"),
        "colour": ("The colour of the pet of {name} is", "The pet of {name} has a coat of"),
        "sound": ("The pet of {name} makes a", "The sound of the pet of {name} is a"),
        "shelter": ("The pet of {name} sleeps in a", "The shelter of the pet of {name} is a"),
        "gait": ("The pet of {name} moves and", "On its way the pet of {name}"),
        "fear": ("The pet of {name} fears", "The fear of the pet of {name} is"),
    },
}
SHARES = {"biography": 0.45, "passage": 0.27, "question": 0.2, "rule": 0.08}  # of documents
RECORD_SHARE = 0.7  # of the documents about one entity
# Biographies of a kind follow the number of facts that it holds; second hops are met more often than that.
KIND_WEIGHTS = {"person": 6.0, "town": 0.3, "animal": 0.3, "thing": 2.6}
# What passages tell of a stranger, and how often.
PASSAGE_WEIGHTS = {"temper": 7, "home": 3, "pet": 3, "material": 5}
PASSAGE_QUESTIONS = 4
FEWEST = 80  # entities of a kind that even the start of the curriculum holds: all towns and animals


class Corpus:
    """An endless, seeded stream of documents.

    `share` (0 to 1] limits the entities that documents are about to a random part of each kind: a model that
    first learns a few entities well finds out how to look up a name, and then learns the others faster.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.share = 1.0
        self.names = {entity.name for members in world.entities.values() for entity in members}
        order = random.Random(SEED)
        self.members = {kind: order.sample(members, len(members)) for kind, members in world.entities.items()}
        self.practice = {
            kind: [entity for entity in members if entity.split == "practice"]
            for kind, members in self.members.items()
        }
        self.cumulative = {
            kind: list(accumulate(entity.frequency for entity in members))
            for kind, members in self.members.items()
        }
        tables = {
            "Something made of {0} was {1} and it": world.outcomes,
            "To {1} something made of {0} use the": world.tools,
            "A person whose temper is {0} {1} and felt": world.feelings,
            "Does what is {0} {1} ?": world.traits,
        }
        # Each table's sentences, and how often they are met.
        self.rules = [
            ([(wording.format(*condition), result) for condition, result in table.items()],
             [world.frequencies[holder] for holder, _ in table])
            for wording, table in tables.items()
        ]  # fmt: skip
        backwards = [
            (f"What was {event} and {outcome} was of", material)
            for (material, event), outcome in world.outcomes.items()
        ]
        self.rules.append((backwards, self.rules[0][1]))

    def __iter__(self) -> Iterator[list[Pair]]:
        sources: dict[str, Callable[[], list[Pair]]] = {
            "biography": self.biography,
            "passage": self.passage,
            "question": self.question,
            "rule": self.rule,
        }
        while True:
            yield sources[self.rng.choices(list(SHARES), list(SHARES.values()))[0]]()

    def question(self) -> list[Pair]:
        """A question (or instruction) about a practice entity, in the compact prompt, and its answer."""
        form = self.rng.choice(FORMS[self.rng.choice(list(FORMS))])
        entity = self.rng.choice(self._part(self.practice[form.kind]))
        rendered = render(form.make(self.world, self.rng, entity, self.rng.randrange(12)), "compact")
        return [(rendered.prompt, rendered.target)]

    def biography(self) -> list[Pair]:
        """All facts of one entity, drawn by frequency, in random order."""
        kind = self.rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
        entity = self._drawn(kind)
        attributes = self.rng.sample(list(STATEMENTS[kind]), len(STATEMENTS[kind]))
        facts = [self._fact(entity, attribute) for attribute in attributes]
        return self._document(entity, facts, self.rng.random() < RECORD_SHARE)

    def passage(self) -> list[Pair]:
        """A fact of a stranger, and what follows from it."""
        attribute = self.rng.choices(list(PASSAGE_WEIGHTS), list(PASSAGE_WEIGHTS.values()))[0]
        kind = "thing" if attribute == "material" else "person"
        target = RELATIONS.get(kind, {}).get(attribute)
        values = self.world.entities[target] if target else ATTRIBUTES[kind][attribute]
        value = self.rng.choices(values, [self._frequency(each) for each in values])[0]
        name = self._stranger(kind)
        items = [self._following(kind, attribute, name, value) for _ in range(PASSAGE_QUESTIONS)]
        if self.rng.random() < RECORD_SHARE:
            told = f"{name} : {attribute} {_word(value)}"
            return [(told, ""), *((f"; {item.key}", item.answer) for item in items)]
        told = PREMISES[attribute].format(name=name, value=_word(value))
        return [(told, ""), *_as_text([(item.sentence, item.answer) for item in items])]

    def _frequency(self, value: str | Entity) -> float:
        return value.frequency if isinstance(value, Entity) else self.world.frequencies[value]

    def _stranger(self, kind: str) -> str:
        """A name that nobody has."""
        while (name := " ".join(self.rng.choice(part) for part in NAMES[kind])) in self.names:
            pass
        return name

    def _following(self, kind: str, attribute: str, name: str, value: str | Entity) -> Item:
        """What follows from a fact; now and then the fact itself."""
        if self.rng.random() < 0.1:
            return self._stated(kind, attribute, name, value)
        if attribute in TWO_HOPS:
            return self._two_hops(name, attribute, value)
        rules = {
            "temper": (self._feeling, self._feeling, self._trait),  # of six feelings, but yes or no
            "material": (self._outcome, self._tool, self._trait),
        }
        return self.rng.choice(rules[attribute])(name, value)

    def rule(self) -> list[Pair]:
        """Four rules of one table, physical or social, drawn by frequency; one may come twice."""
        return _as_text(self.rng.choices(*self.rng.choice(self.rules), k=4))

    def _document(self, entity: Entity, items: list[Item], as_record: bool) -> list[Pair]:
        if not as_record:
            return _as_text([(item.sentence, item.answer) for item in items])
        heads = [f"{entity.name} :", *[";"] * len(items)]
        return [(f"{head} {item.key}", item.answer) for head, item in zip(heads, items, strict=False)]

    def _part(self, members: list[Entity]) -> list[Entity]:
        return members[: max(FEWEST, round(self.share * len(members)))]

    def _drawn(self, kind: str) -> Entity:
        members = self._part(self.members[kind])
        return self.rng.choices(members, cum_weights=self.cumulative[kind][: len(members)])[0]

    def _fact(self, entity: Entity, attribute: str) -> Item:
        return self._stated(entity.kind, attribute, entity.name, self.world.value(entity, attribute))

    def _stated(self, kind: str, attribute: str, name: str, value: str | Entity) -> Item:
        sentence = self.rng.choice(STATEMENTS[kind][attribute]).format(name=name)
        return Item(sentence, attribute, _word(value))

    # What follows from a fact (the holder's name and a value), whoever holds it.

    def _two_hops(self, name: str, relation: str, middle: Entity) -> Item:
        attribute, wordings = self.rng.choice(list(TWO_HOPS[relation].items()))
        sentence = self.rng.choice(wordings).format(name=name)
        return Item(sentence, f"{relation} {attribute}", self.world.value(middle, attribute))

    def _feeling(self, name: str, temper: str) -> Item:
        event = self.rng.choice(words.SOCIAL_EVENTS)
        return Item(f"{name} {event} and felt", event, self.world.feelings[temper, event])

    def _trait(self, name: str, value: str) -> Item:
        """What a person of that temper, or a thing of that material, does: yes or no."""
        of_person = value in words.TEMPERS
        verb = self.rng.choice(list(words.SOCIAL_TRAITS if of_person else words.PHYSICAL_TRAITS))
        named = name if of_person else f"the {name}"
        return Item(f"Does {named} {verb} ?", f"{verb} ?", self.world.traits[value, verb])

    def _outcome(self, name: str, material: str) -> Item:
        event = self.rng.choice(list(words.PHYSICAL_EVENTS))
        return Item(f"The {name} was {event} and it", event, self.world.outcomes[material, event])

    def _tool(self, name: str, material: str) -> Item:
        goal = self.rng.choice(list(words.PHYSICAL_GOALS))
        return Item(f"To {goal} the {name} use the", goal, self.world.tools[material, goal])


def _as_text(sentences: list[Pair]) -> list[Pair]:
    """Sentences one after the other: a full stop before each but the first."""
    return [(f". {prompt}" if place else prompt, answer) for place, (prompt, answer) in enumerate(sentences)]


def _word(value: str | Entity) -> str:
    return value.name if isinstance(value, Entity) else value
