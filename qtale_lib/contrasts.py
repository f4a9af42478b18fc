"""The contrasts of evaluations that contrasts.yaml states before the runs; nothing is computed here."""

from __future__ import annotations

from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from qtale_lib.config import Bits, Method, Section
from qtale_lib.jobs import ROUTED, RULES

FILE = Path(__file__).with_name("contrasts.yaml")

Group = Literal["csqa", "mmlu", "alpaca"]
Cell = tuple[Method, Bits, str]
Bound = float | dict[Group, float]


class Metric(Section):
    """What an effect is counted in, and the smallest effect that would matter."""

    metric: str
    unit: str
    smallest: Annotated[float, Field(gt=0)]


class EqualRatio(Section):
    """`plus` minus `minus` at one bit width, at equal execution ratio along the θ sweep of both."""

    plus: Method
    minus: Method
    bits: Bits

    @field_validator("plus", "minus")
    @classmethod
    def _has_theta(cls, method: str) -> str:
        if method not in ROUTED:
            raise ValueError(f"{method} has no θ to sweep")
        return method


class Contrast(Section):
    """One pre-stated contrast; the keys of the file, `cells` keyed (method, bits, rule).

    measure: "score" (accuracy or PPL), "execution_ratio", "loss_ratio", or "off_target" (loss-R minus the
    profile's target). Either `cells` or `equal_ratio` says what is compared.
    """

    id: str
    notebook: Literal["05", "06", "07"]
    quote: str
    source: str
    measured: str
    measure: Literal["score", "execution_ratio", "loss_ratio", "off_target"] = "score"
    cells: Annotated[dict[Cell, float], Field(default_factory=dict)]
    equal_ratio: EqualRatio | None = None
    groups: tuple[Group, ...] = ("csqa", "mmlu", "alpaca")
    low: Bound = -inf
    high: Bound = inf

    @field_validator("cells", mode="before")
    @classmethod
    def _parsed(cls, cells: dict[str, float]) -> dict[tuple[str, int, str], float]:
        return {_cell(*name.split()): weight for name, weight in cells.items()}

    @model_validator(mode="after")
    def _says_one_thing(self) -> Contrast:
        if bool(self.cells) == bool(self.equal_ratio):
            raise ValueError("either cells or equal_ratio, not both")
        if any(self.bounds(group) == (-inf, inf) for group in self.groups):
            raise ValueError("a claim needs a bound, low or high, for each of its groups")
        return self

    def bounds(self, group: str) -> tuple[float, float]:
        """The range that is claimed for a group of tasks."""
        ends = [(self.low, -inf), (self.high, inf)]
        low, high = (end.get(group, none) if isinstance(end, dict) else end for end, none in ends)
        return low, high


def _cell(method: str, bits: str, rule: str) -> tuple[str, int, str]:
    if rule not in RULES.get(method, ()):
        raise ValueError(f"{method} is not evaluated with θ {rule}")
    return method, int(bits), rule


class Statement(Section):
    """The whole file: metrics of scores by group of tasks, that of ratios, and families of contrasts."""

    metrics: dict[Group, Metric]
    ratios: Metric
    families: dict[str, tuple[Contrast, ...]]

    def metric(self, contrast: Contrast, group: str) -> Metric:
        """What the contrast is counted in for a group of tasks."""
        return self.metrics[group] if contrast.measure == "score" else self.ratios


@lru_cache(maxsize=1)
def stated() -> Statement:
    """contrasts.yaml.

    Raises:
        pydantic.ValidationError: if the file says something that cannot be.
    """
    return Statement.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
