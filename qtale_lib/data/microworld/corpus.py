"""The embedded base model's pretraining text: statements of everything, questions on practice entities.

Statements follow each entity's frequency (some facts are rare); questions use the very prompts of fine-
tuning, so that no prompt token is new to the base model. Facts of the fine-tuning splits occur as
statements, and as second hops of questions on practice entities; no pretraining question is about an entity
of those splits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

from qtale_lib.data.microworld.tasks import FORMS
from qtale_lib.data.microworld.world import SEED, Entity, World
from qtale_lib.data.prompts import render

STATEMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {
        "trade": ("{name} works as a {value}.", "The trade of {name} is {value}.", "{name} is a {value}."),
        "fruit": ("{name} likes {value}.", "{name} bought {value}.", "The fruit of {name} is {value}."),
        "instrument": (
            "{name} plays the {value}.",
            "{name} played the {value}.",
            "The instrument of {name} is {value}.",
        ),
        "temper": ("{name} is a {value} person.", "The temper of {name} is {value}."),
        "home": (
            "{name} lives in {value}.",
            "The home town of {name} is {value}.",
            "{value} is the home of {name}.",
        ),
        "pet": ("The pet of {name} is the {value}.", "{name} keeps the {value}."),
    },
    "town": {
        "region": ("{name} lies in {value}.", "{name} is a town in {value}."),
        "climate": ("The climate of {name} is {value}.", "{name} is a {value} town."),
        "export": ("{name} sells {value}.", "{name} trades in {value}."),
    },
    "animal": {
        "food": ("The {name} eats {value}.", "The {name} feeds on {value}."),
        "habitat": ("The {name} lives in the {value}.", "The {name} is found in the {value}."),
        "colour": ("The {name} is {value}.", "The colour of the {name} is {value}."),
    },
    "thing": {
        "material": ("The {name} is made of {value}.", "The {name} consists of {value}."),
        "maker": ("The {name} was made by the {value}.", "The maker of the {name} is a {value}."),
    },
}
# Shares of documents by source; kinds of statement documents follow the number of facts each kind holds.
QUESTION_SHARE, RULE_SHARE = 0.5, 0.05
KIND_WEIGHTS = {"person": 6.0, "town": 0.5, "animal": 0.5, "thing": 1.5}
# What takes composing is asked more often than what takes a look-up.
LOOK_UPS = ("arc_easy", "mmlu", "alpaca")
TASK_WEIGHTS = {task: 1.0 if task in LOOK_UPS else 2.0 for task in FORMS}


class Corpus:
    """An endless, seeded stream of documents: (prompt, text) pairs; the prompt of a statement is empty.

    `share` (0 to 1] limits the entities that documents are about to a random part of each kind: a model that
    first learns a few entities well finds out how to look up a name, and then learns the others faster.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng, self.share = world, random.Random(seed), 1.0
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

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while True:
            draw = self.rng.random()
            if draw < QUESTION_SHARE:
                yield self.question()
            elif draw < QUESTION_SHARE + RULE_SHARE:
                yield "", self.rule()
            else:
                yield "", self.biography()

    def question(self) -> tuple[str, str]:
        """A question (or instruction) about a practice entity, in the compact prompt, and its answer."""
        form = self.rng.choice(FORMS[self.rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]])
        entity = self.rng.choice(self._part(self.practice[form.kind]))
        rendered = render(form.make(self.world, self.rng, entity, self.rng.randrange(12)), "compact")
        return rendered.prompt, rendered.target

    def biography(self) -> str:
        """All facts of one entity, drawn by frequency, in random order and wording."""
        kind = self.rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
        members = self._part(self.members[kind])
        entity = self.rng.choices(members, cum_weights=self.cumulative[kind][: len(members)])[0]
        attributes = list(STATEMENTS[kind])
        return " ".join(
            self._statement(entity, each) for each in self.rng.sample(attributes, len(attributes))
        )

    def _part(self, members: list[Entity]) -> list[Entity]:
        return members[: max(1, round(self.share * len(members)))]

    def _statement(self, entity: Entity, attribute: str) -> str:
        value = self.world.value(entity, attribute)
        wording = self.rng.choice(STATEMENTS[entity.kind][attribute])
        return wording.format(name=entity.name, value=value.name if isinstance(value, Entity) else value)

    def rule(self) -> str:
        """A few physical or social rules."""
        return " ".join(self._one_rule() for _ in range(4))

    def _one_rule(self) -> str:
        table = self.rng.choice((self.world.outcomes, self.world.tools, self.world.feelings))
        (condition, cause), result = self.rng.choice(list(table.items()))
        if table is self.world.outcomes:
            return f"Something made of {condition} was {cause}, and it {result}."
        if table is self.world.tools:
            return f"To {cause} something made of {condition}, use the {result}."
        return f"A {condition} person {cause} and felt {result}."
