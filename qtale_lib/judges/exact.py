"""The embedded world's exact grader: the response that states more of the facts asked for is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qtale_lib.errors import UserError
from qtale_lib.judges import Comparison, better

if TYPE_CHECKING:
    from qtale_lib.lab import Lab


class ExactJudge:
    """See `grading.grade`; equally many facts are a tie."""

    name = "the world's exact grader"

    def preferences(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """By the facts stated."""
        from qtale_lib.data.microworld.grading import grade  # builds the world

        graded = [[grade(c.example, text).right for text in (c.first, c.second)] for c in comparisons]
        return [better(*pair) for pair in graded]

    def estimate(self, comparisons: Sequence[Comparison]) -> str:
        """Nothing is ever left."""
        return ""

    def ask(self, comparisons: Sequence[Comparison], report: Callable[[float], None]) -> None:
        """Nothing to ask."""


def judge_of(lab: Lab) -> ExactJudge:
    """UserError for other data than the embedded world's."""
    profile = lab.profile
    if profile.data != "microworld" or profile.data_dir is not None:
        raise UserError(
            f"judge.kind of profile {profile.name} is exact, which knows the embedded world alone; "
            "set likelihood or endpoint."
        )
    return ExactJudge()
