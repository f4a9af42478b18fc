"""The paper's claims and their verdicts as tables: in full, on one page, and the seeds they would take."""

from __future__ import annotations

import re
from math import inf
from textwrap import shorten
from typing import Any

import pandas as pd

from qtale_lib import paper
from qtale_lib.claims import tally
from qtale_lib.contrasts import stated
from qtale_lib.statistics import POWER, RULE
from qtale_lib.tables import NOT_RUN, Table, number, or_dash


def verdict_table(frame: pd.DataFrame, name: str = "claims") -> Table:
    """Verdicts (claims.verdicts) for readers: claim, measured, effect with interval, the paper's, verdict."""
    intervals = [_interval(row) for row in frame.itertuples()]
    text = pd.DataFrame({
        "claim": frame.id, "family": frame.family, "notebook": frame.notebook,
        "the paper": [f"“{r.quote}” ({r.source})" for r in frame.itertuples()],
        "measured": frame.measured, "effect [95 %]": intervals,
        "paper's": [number(value) if pd.notna(value) else "–" for value in frame.paper],
        "p": [_probability(value) for value in frame.p],
        "corrected": [_probability(value) for value in frame.corrected],
        "power": [_percent(value) for value in frame.power],
        f"seeds for {POWER:.0%}": [_seeds(value) for value in frame.seeds_needed],
        "over": [_basis(row) for row in frame.itertuples()],
        "verdict": [f"{row.verdict}: {row.reason}" for row in frame.itertuples()],
    })  # fmt: skip
    counts = ", ".join(f"{count} {word}" for word, count in tally(frame).items())
    return Table(name, f"Claims: {counts}", text, frame, ("id",), (RULE, *_what_scores_are()))


def scoreboard(frame: pd.DataFrame) -> Table:
    """The same verdicts on one page: one short line a claim, the primary family first."""
    frame = frame.sort_values("family", key=lambda family: family != "primary", kind="stable")
    frame = frame[list(SCOREBOARD)].reset_index(drop=True)
    claims = [_in_short(row) for row in frame.itertuples()]
    said = pd.DataFrame({"family": frame.family, "claim": claims, "measured": frame.measured})
    text = _said_once(said).assign(**{
        "tasks": [paper.TASK_LABELS.get(group, "–") for group in frame.group],
        "effect [95 %]": [_short_interval(row) for row in frame.itertuples()],
        "verdict": frame.verdict,
        "power": [_percent(value) for value in frame.power],
        "notebook": frame.notebook,
    })  # fmt: skip
    counts = ", ".join(f"{count} {word}" for word, count in tally(frame).items())
    notes = (
        "An empty cell says the same as the one above it. Effects on accuracy are in points, on PPL in "
        "percent; a gain is positive.",
        "In full, with p, the paper's effects and the rule behind the verdicts: table claims.",
    )
    return Table("scoreboard", f"Which claims hold: {counts}", text, frame, ("id",), notes)


SCOREBOARD = ("id", "family", "quote", "source", "measured", "group",
              "effect", "low", "high", "unit", "verdict", "power", "notebook")  # fmt: skip


def seeds_table(frame: pd.DataFrame) -> Table:
    """How many seeds the primary contrasts would take (claims.planned) to show one point of accuracy."""
    text = pd.DataFrame({
        "measured": frame.measured, "on": frame.on, "seeds here": frame.seeds, "questions": frame.questions,
        "effect": frame.effect.map(number),
        **{name: [or_dash(value) for value in frame[name]] for name in ("spread", "sampling")},
        f"seeds for {POWER:.0%}": [_seeds(value) for value in frame.needed],
    })  # fmt: skip
    smallest = stated().metrics["csqa"].smallest
    notes = (
        f"Seeds for {POWER:.0%}: fine-tunings a task and method that would show a true effect of "
        f"{smallest:g} accuracy point in the claimed direction, with the same questions, at the 5 % level of "
        "one contrast by itself.",
        "Spread: standard deviation of the effect from one seed of each task to another; sampling: standard "
        "error from the questions. Both in points, of the mean over the tasks.",
    )
    caption = f"Seeds that a contrast of {smallest:g} point takes"
    return Table("seeds", caption, _said_once(text), frame, ("id", "on"), notes)


def _said_once(said: pd.DataFrame) -> pd.DataFrame:
    """Cells that say the same as those above, like all cells to their left, left empty."""
    repeated = (said == said.shift()).cummin(axis=1)
    return said.mask(repeated, "").astype(str)


def _in_short(row: Any) -> str:
    """The first words of a claim, and the first place where it stands."""
    words = shorten(row.quote, 44, placeholder=" …", break_on_hyphens=False).replace("… …", "…")
    return f"“{words}”, {re.split('[,;]', row.source)[0]}"


def _short_interval(row: Any) -> str:
    if pd.isna(row.effect):
        return "–"
    ends = "–" if pd.isna(row.low) else f"{number(row.low)}, {number(row.high)}"
    unit = re.split(" of | [(]", row.unit.removeprefix("accuracy "))[0]
    return f"{number(row.effect)} [{ends}] {unit}"


def _percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0%}"


def _what_scores_are() -> tuple[str, ...]:
    metrics = stated().metrics.items()
    said = [f"{paper.TASK_LABELS[group]}: {metric.metric}" for group, metric in metrics]
    stated_there = f"{', '.join(stated().families)} (contrasts.yaml)"
    families = (
        f"Families: {stated_there}, figures, noise, generation, summaries, tokens; of studies: execution "
        "ratio, quantizers, sensitivity."
    )
    return f"Effects on answers: {'; '.join(said)}.", families


def _probability(value: float) -> str:
    return "–" if pd.isna(value) else "< 0.001" if value < 0.001 else number(value, 3)


def _seeds(value: float) -> str:
    """A number of seeds; where no number would do, more questions are what is missing."""
    return "–" if pd.isna(value) else "more questions" if value == inf else f"{value:.0f}"


def _interval(row: Any) -> str:
    if pd.isna(row.effect):
        return "–" if row.made else NOT_RUN
    if pd.isna(row.low):
        return f"{number(row.effect)} {row.unit}, no interval"
    return f"{number(row.effect)} [{number(row.low)}, {number(row.high)}] {row.unit}"


def _basis(row: Any) -> str:
    if pd.isna(row.tasks):
        return f"0 of {row.made} runs" if row.made else "–"
    if row.id.startswith("F4"):
        return f"{row.seeds:.0f} batches of draws"
    questions = f", {row.questions:.0f} questions" if row.questions else ""
    along = f", {row.runs:.0f} of {row.made} runs, at R {number(row.ratio_low)}–{number(row.ratio_high)}"
    compared = "" if pd.isna(row.ratio_low) else along
    return f"{row.tasks:.0f} task(s), {row.seeds:.0f} seed(s){questions}{compared}"
