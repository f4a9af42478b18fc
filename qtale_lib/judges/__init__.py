"""Judges: which of two responses to an instruction is better. A new one is a module here, and its name among
the kinds of config.Judge.

A module has `judge_of(lab)`, which returns a Judge by the profile's `judge:` section. What a judge has to
ask for is asked by `python -m qtale_lib judge` and kept in the run store; reading preferences asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from qtale_lib.data import Example

if TYPE_CHECKING:
    from qtale_lib.lab import Lab

WIN, TIE, LOSS = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Comparison:
    """Two responses to the instruction of an example."""

    example: Example
    first: str
    second: str


class Judge(Protocol):
    """name: for readers of tables."""

    name: str

    def preferences(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """WIN where the first is better, LOSS where the second is, or between; None where not yet judged."""

    def estimate(self, comparisons: Sequence[Comparison]) -> str:
        """What judging those that are not judged yet would take, in a sentence; "" where nothing is left."""

    def ask(self, comparisons: Sequence[Comparison], report: Callable[[float], None]) -> None:
        """Judge those that are not judged yet, into the store; report(share done)."""


def judge_of(lab: Lab) -> Judge:
    """The judge that the profile names.

    Raises:
        UserError: if it cannot judge this profile's responses.
    """
    return import_module(f"{__name__}.{lab.profile.judge.kind}").judge_of(lab)


def preferences(judge: Judge, comparisons: Sequence[Comparison]) -> list[float | None]:
    """The judge's preferences; the same text twice is a tie, whoever judges."""
    asked = differing(comparisons)
    answers = iter(judge.preferences(asked))
    return [next(answers) if pair.first != pair.second else TIE for pair in comparisons]


def differing(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Those that a judge need look at."""
    return [pair for pair in comparisons if pair.first != pair.second]


def better(first: float, second: float) -> float:
    """WIN, TIE or LOSS by two scores."""
    return TIE if first == second else WIN if first > second else LOSS
