"""The exact grader: the world knows what is true, so a response to an instruction can be held against it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from qtale_lib.data.microworld.world import ATTRIBUTES, RELATIONS, Entity, World, build_world
from qtale_lib.data.schema import Example


@dataclass(frozen=True)
class Grade:
    """How many of the facts asked for a response states, of how many; false: how many it states falsely."""

    right: int
    asked: int
    false: int

    @property
    def share(self) -> float:
        """Of the facts asked for, those that are stated."""
        return self.right / self.asked


def grade(example: Example, response: str) -> Grade:
    """Grade a response to an instruction of the embedded world (task alpaca).

    A fact is stated if its value is named and no other value that it could have had; falsely, if one of those
    is named. Of somebody else nothing is right: a response that does not name whom it is asked about states
    no fact.
    """
    world = build_world()
    subject = _holder(world, example.facts[0]).name
    words = re.findall(r"\w+", response.replace(subject, " ")) if subject in response else []
    right = false = 0
    for fact in example.facts:
        value, others = _values(fact)
        wrong = sum(word in others for word in words)
        right += value in words and not wrong
        false += bool(wrong)
    return Grade(right, len(example.facts), false)


def _holder(world: World, fact: str) -> Entity:
    kind, index = fact.partition(".")[0].split(":")
    return world.entities[kind][int(index)]


@lru_cache(maxsize=2**14)
def _values(fact: str) -> tuple[str, frozenset[str]]:
    """The fact's value, and the others that it could have had."""
    world = build_world()
    holder, attribute = _holder(world, fact), fact.partition(".")[2]
    value = world.value(holder, attribute)
    if isinstance(value, Entity):
        target = RELATIONS[holder.kind][attribute]
        return value.name, frozenset(entity.name for entity in world.entities[target]) - {value.name}
    return value, frozenset(ATTRIBUTES[holder.kind][attribute]) - {value}
