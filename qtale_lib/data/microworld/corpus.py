"""The embedded base model's pretraining text: statements of everything, exercises on practice entities.

A document is a list of (prompt, answer) pairs: "The trade of Anna Reed is" + "baker". Everything that can be
known or worked out stands in an answer, which is what the loss weighs. Most facts are met in short records,
"Anna Reed : trade" + "baker", "; fruit" + "plums": a fact takes three words there, eight in a sentence.
Facts of the fine-tuning splits occur as facts, and as second hops of exercises on practice entities; nothing
is ever worked out for an entity of those splits. Passages speak of strangers, who are not in the world at
all. Questions use the very prompts of fine-tuning, so that no prompt token is new to the base.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
WHO = {
    "fruit": "bought",
    "instrument": "played the",
    "trade": "worked as a",
    "temper": "has a temper that is",
}
# Shares of documents by source, and how many of those about one entity are records.
SHARES = {
    "biography": 0.36,
    "passage": 0.24,
    "exercise": 0.04,
    "who": 0.03,
    "reverse": 0.02,
    "rule": 0.03,
    "question": 0.28,
}
RECORD_SHARE = 0.7
# Biographies of a kind follow the number of facts that it holds; second hops are met more often than that.
KIND_WEIGHTS = {"person": 6.0, "town": 0.6, "animal": 0.6, "thing": 2.2}
# What exercises start from, and how often.
INFERENCES = {
    ("person", "home"): 1.0,
    ("person", "pet"): 1.0,
    ("person", "temper"): 2.0,
    ("thing", "material"): 2.0,
}
# What passages tell of strangers, and how often.
PASSAGE_WEIGHTS = {
    "trade": 1,
    "fruit": 1,
    "instrument": 1,
    "temper": 3,
    "home": 2,
    "pet": 2,
    "material": 3,
}
PASSAGE_QUESTIONS = 4
EXERCISES = 4  # inferences in a document of exercises


class Corpus:
    """An endless, seeded stream of documents.

    `share` (0 to 1] limits the entities that documents are about to a random part of each kind: a model that
    first learns a few entities well finds out how to look up a name, and then learns the others faster.
    `hints` (0 to 1) is the share of inferences before which the facts that they need are stated: what is
    first done in context is then done from memory.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        self.share, self.hints = 1.0, 0.0
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
        self.rules = [
            (wording.format(*condition), result)
            for wording, table in tables.items()
            for condition, result in table.items()
        ]

    def __iter__(self) -> Iterator[list[Pair]]:
        sources: dict[str, Callable[[], list[Pair]]] = {
            "biography": self.biography,
            "exercise": self.exercise,
            "passage": self.passage,
            "who": self.who,
            "reverse": self.reverse,
            "rule": self.rule,
            "question": self.question,
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

    def exercise(self) -> list[Pair]:
        """What follows from a fact of one practice entity and from rules; hints before some of it."""
        kind, attribute = self.rng.choices(list(INFERENCES), list(INFERENCES.values()))[0]
        entity = self.rng.choice(self._part(self.practice[kind]))
        items: list[Item] = []
        for _ in range(EXERCISES):
            inference = self._inference(entity, attribute)
            if self.rng.random() < self.hints:
                items.append(self._fact(entity, attribute))
            items.append(inference)
        return self._document(entity, items, self.rng.random() < RECORD_SHARE)

    def who(self) -> list[Pair]:
        """Which of two practice persons a fact is about; hints before some of it."""
        sentences: list[Pair] = []
        for _ in range(2):
            attribute = self.rng.choice(list(WHO))
            first, second = self._unlike(attribute)
            if self.rng.random() < self.hints:
                for person in self.rng.sample((first, second), 2):
                    fact = self._fact(person, attribute)
                    sentences.append((fact.sentence, fact.answer))
            asked = self.rng.choice((first, second))
            value = self.world.value(asked, attribute)
            prompt = f"{first.name} ; {second.name} : who {WHO[attribute]} {value} ?"
            sentences.append((prompt, asked.name))
        return _as_text(sentences)

    def passage(self) -> list[Pair]:
        """Facts of strangers, who are not in the world, and what is said or follows of one or another.

        Nothing here can be known by heart: it teaches to read a passage that speaks of several.
        """
        attribute = self.rng.choices(list(PASSAGE_WEIGHTS), list(PASSAGE_WEIGHTS.values()))[0]
        kind = "thing" if attribute == "material" else "person"
        values = self.rng.sample(self._values(kind, attribute), self.rng.choice((2, 2, 3)))
        strangers = [(self._stranger(kind), value) for value in values]
        told = [PREMISES[attribute].format(name=name, value=_word(value)) for name, value in strangers]
        pairs = [self._asked(kind, attribute, *self.rng.choice(strangers)) for _ in range(PASSAGE_QUESTIONS)]
        return [(" ".join(told), ""), *_as_text(pairs)]

    def _values(self, kind: str, attribute: str) -> Sequence[str | Entity]:
        target = RELATIONS.get(kind, {}).get(attribute)
        return self.world.entities[target] if target else ATTRIBUTES[kind][attribute]

    def _stranger(self, kind: str) -> str:
        """A name that nobody has."""
        while (name := " ".join(self.rng.choice(part) for part in NAMES[kind])) in self.names:
            pass
        return name

    def _asked(self, kind: str, attribute: str, name: str, value: str | Entity) -> Pair:
        """The fact itself, what follows from it, or whose it is."""
        draw = self.rng.random()
        if draw < 0.2:
            item = self._stated(kind, attribute, name, value)
        elif attribute in WHO and (draw < 0.5 or attribute != "temper"):
            return f"Who {WHO[attribute]} {_word(value)} ?", name
        elif attribute in TWO_HOPS:
            item = self._two_hops(name, attribute, value)
        elif attribute == "temper":
            item = (self._feeling if draw < 0.8 else self._trait)(name, value)
        else:
            item = (self._outcome if draw < 0.5 else self._tool if draw < 0.75 else self._trait)(name, value)
        return item.sentence, item.answer

    def _unlike(self, attribute: str) -> tuple[Entity, Entity]:
        """Two practice persons that differ in an attribute."""
        members = self._part(self.practice["person"])
        while True:
            first, second = self.rng.sample(members, 2)
            if self.world.value(first, attribute) != self.world.value(second, attribute):
                return first, second

    def rule(self) -> list[Pair]:
        """A few physical or social rules."""
        return _as_text(self.rng.sample(self.rules, 4))

    def reverse(self) -> list[Pair]:
        """Persons by what is known of them."""
        attribute = self.rng.choice(list(WHO))
        persons = [self._drawn("person") for _ in range(4)]
        asked = f"Who {WHO[attribute]}"
        return _as_text([(f"{asked} {self.world.value(each, attribute)} ?", each.name) for each in persons])

    def _document(self, entity: Entity, items: list[Item], as_record: bool) -> list[Pair]:
        if not as_record:
            return _as_text([(item.sentence, item.answer) for item in items])
        heads = [f"{entity.name} :", *[";"] * len(items)]
        return [(f"{head} {item.key}", item.answer) for head, item in zip(heads, items, strict=False)]

    def _part(self, members: list[Entity]) -> list[Entity]:
        return members[: max(2, round(self.share * len(members)))]

    def _drawn(self, kind: str) -> Entity:
        members = self._part(self.members[kind])
        return self.rng.choices(members, cum_weights=self.cumulative[kind][: len(members)])[0]

    def _fact(self, entity: Entity, attribute: str) -> Item:
        return self._stated(entity.kind, attribute, entity.name, self.world.value(entity, attribute))

    def _stated(self, kind: str, attribute: str, name: str, value: str | Entity) -> Item:
        sentence = self.rng.choice(STATEMENTS[kind][attribute]).format(name=name)
        return Item(sentence, attribute, _word(value))

    def _inference(self, entity: Entity, attribute: str) -> Item:
        """Something that follows from a fact of the entity."""
        value = self.world.value(entity, attribute)
        if attribute in TWO_HOPS:
            return self._two_hops(entity.name, attribute, value)
        rules = {
            "temper": (self._feeling, self._feeling, self._trait),
            "material": (self._outcome, self._tool, self._trait),
        }
        return self.rng.choice(rules[attribute])(entity.name, value)

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
