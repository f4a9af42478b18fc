"""Responses compared: win rates in AlpacaEval's manner, and what can be said of each response by itself.

A win rate is the share of prompts on which the judge prefers the first of two models, ties counting half.
Both answer the same prompts, so that it is paired by construction; prompts that share a fact move together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtale_lib import jobs, paper
from qtale_lib.errors import UserError
from qtale_lib.judges import LOSS, TIE, WIN, Comparison, differing, judge_of, preferences
from qtale_lib.measurements import Measurements, sharing
from qtale_lib.statistics import Run, estimate
from qtale_lib.tables import Table, number

if TYPE_CHECKING:
    from qtale_lib.data import Example
    from qtale_lib.lab import Lab

Cell = tuple[str, int, str]  # method, bits, rule that sets θ
LABELS = {"argmax": "θ 0.5", "searched": "searched θ", "none": ""}


@dataclass(frozen=True)
class Match:
    """Two cells whose responses are compared; the win rate is the first's."""

    name: str
    first: Cell
    second: Cell

    @property
    def label(self) -> str:
        """As "QTALE, 4 bits, searched θ against D-LLM, 4 bits, θ 0.5"."""
        return f"{cell_label(self.first)} against {cell_label(self.second)}"


MATCHES = (
    Match("win rate, 16 bits", ("qtale", 16, "argmax"), ("dllm", 16, "argmax")),
    Match("win rate, 4 bits", ("qtale", 4, "searched"), ("dllm", 4, "argmax")),
    Match("win rate, 4 bits, both θ searched", ("qtale", 4, "searched"), ("dllm", 4, "searched")),
    Match("QTALE kept", ("qtale", 4, "searched"), ("qtale", 16, "argmax")),
    Match("D-LLM kept", ("dllm", 4, "argmax"), ("dllm", 16, "argmax")),
    Match("QTALE and Full, 16 bits", ("qtale", 16, "argmax"), ("full", 16, "none")),
    Match("QTALE and Full, 4 bits", ("qtale", 4, "searched"), ("full", 4, "none")),
)


def cell_label(cell: Cell) -> str:
    """As "QTALE, 4 bits, searched θ"."""
    method, bits, rule = cell
    return ", ".join(filter(None, (paper.METHODS[method], f"{bits} bits", LABELS[rule])))


def responses(lab: Lab, cell: Cell, seed: int, task: str = jobs.WRITTEN_TASK) -> dict[str, Any] | None:
    """The stored responses of a cell (see stages.read_off), or None."""
    method, bits, rule = cell
    if jobs.Job(jobs.Run(task, method, seed), bits, "responses") not in jobs.response_jobs(lab.profile):
        return None
    found = lab.find("responses", task=task, method=method, seed=seed, bits=bits, theta=rule)
    return found and found["value"]


def comparisons(lab: Lab, match: Match, seed: int) -> list[Comparison]:
    """The match's pairs of responses, prompt by prompt; none where a side has no responses."""
    first, second = (responses(lab, cell, seed) for cell in (match.first, match.second))
    if first is None or second is None:
        return []
    examples = {each.id: each for each in lab.prompts(jobs.WRITTEN_TASK)}
    texts = zip(first["ids"], first["texts"], second["texts"], strict=True)
    return [Comparison(examples[name], one, other) for name, one, other in texts]


def to_judge(lab: Lab) -> list[Comparison]:
    """All pairs of all matches that a judge need look at."""
    pairs = [
        pair for match in MATCHES for seed in lab.profile.seeds for pair in comparisons(lab, match, seed)
    ]
    return differing(pairs)


def judged(lab: Lab, match: Match) -> Iterator[tuple[int, list[Comparison], np.ndarray]]:
    """(seed, pairs, preferences [pairs]) of every seed that is judged whole."""
    try:
        judge = judge_of(lab)
    except UserError:  # said once, by `judging`
        return
    for seed in lab.profile.seeds:
        pairs = comparisons(lab, match, seed)
        found = preferences(judge, pairs)
        if pairs and None not in found:
            yield seed, pairs, np.array(found, dtype=float)


def win_runs(store: Measurements, match: Match) -> list[Run]:
    """One Run per seed: points of win rate above 50 %, paired over prompts."""
    return _runs(judged(store.lab, match))


def _runs(seeds: Iterable[tuple[int, list[Comparison], np.ndarray]]) -> list[Run]:
    runs = []
    for seed, pairs, found in seeds:
        shared = sharing(tuple(pair.example.facts for pair in pairs))
        points = 100 * (found - TIE)
        runs.append(Run(jobs.WRITTEN_TASK, seed, float(points.mean()), points, shared))
    return runs


def at_equal_length(pairs: list[Comparison], found: np.ndarray) -> float:
    """The win rate that a line of preference over the difference in words has where that is nothing.

    AlpacaEval's length-controlled rate has a logistic curve and a difficulty of each prompt beside; this one
    takes out the same thing in the plainest way.
    """
    longer = np.array([len(pair.first.split()) - len(pair.second.split()) for pair in pairs], dtype=float)
    if not longer.any():
        return float(found.mean())
    design = np.column_stack([np.ones(len(longer)), longer])
    return float(np.linalg.lstsq(design, found, rcond=None)[0][0])


def judging(lab: Lab) -> str:
    """Who judges, or in one sentence what is missing before it can be said who wins."""
    try:
        judge = judge_of(lab)
    except UserError as error:
        return f"No win rates: {error}"
    left = judge.estimate(to_judge(lab))
    if left:
        how = f"python -m qtale_lib judge --profile {lab.profile.name}"
        return f"Not judged yet: {left} `{how}` asks."
    return f"Judge: {judge.name}."


def win_table(store: Measurements) -> Table:
    """Win rates of MATCHES with their 95 % intervals, and what else differs between the two."""
    rows = [row for match in MATCHES if (row := _win_row(store, match))]
    columns = ["match", "win_rate", "low", "high", "wins", "ties", "losses", "at_equal_length",
               "longer_words", "prompts", "seeds"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns)
    text = pd.DataFrame({
        "first against second": frame.match,
        "win rate, % [95 %]": [_interval(row) for row in frame.itertuples()],
        "wins, ties, losses": [f"{r.wins}, {r.ties}, {r.losses}" for r in frame.itertuples()],
        "at equal length, %": [number(value, 1) for value in frame.at_equal_length],
        "words more": [number(value, 2, sign=True) for value in frame.longer_words],
        "prompts": frame.prompts, "seeds": frame.seeds,
    }).astype(str)  # fmt: skip
    notes = (
        judging(store.lab),
        "A tie is half a win. Interval: over seeds and prompts or, with one seed, over prompts alone, which "
        "says nothing of another fine-tuning; prompts that share facts move together.",
        "At equal length: of a line through preference by difference in words (AlpacaEval: logistic).",
    )
    return Table("table_12_win_rates", "Win rates", text, frame, ("match",), notes)


def _win_row(store: Measurements, match: Match) -> dict[str, Any] | None:
    found = list(judged(store.lab, match))
    measured = estimate(_runs(found))
    if measured is None:
        return None
    everything = np.concatenate([preference for _, _, preference in found])
    longer = [len(p.first.split()) - len(p.second.split()) for _, pairs, _ in found for p in pairs]
    return {
        "match": match.label,
        **{name: 50 + getattr(measured, where) for name, where in
           (("win_rate", "effect"), ("low", "low"), ("high", "high"))},
        "wins": int((everything > TIE).sum()), "ties": int((everything == TIE).sum()),
        "losses": int((everything < TIE).sum()),
        "at_equal_length": 100 * np.mean([at_equal_length(pairs, p) for _, pairs, p in found]),
        "longer_words": float(np.mean(longer)), "prompts": len(found[0][1]), "seeds": len(found),
    }  # fmt: skip


def _interval(row: Any) -> str:
    ends = "–" if pd.isna(row.low) else f"{number(row.low, 1)}, {number(row.high, 1)}"
    return f"{number(row.win_rate, 1)} [{ends}]"


MEASURES = {
    "facts": "facts right, %", "exact": "as the reference, %",
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L",
    "words": "words", "execution_ratio": "R", "milliseconds": "ms a token",
}  # fmt: skip


TABLES = {
    jobs.WRITTEN_TASK: ("table_12_responses", "Responses"),
    jobs.SUMMARISED: ("table_12_summaries", "Summaries of dialogues"),
}


def response_table(store: Measurements, task: str = jobs.WRITTEN_TASK) -> Table:
    """What each cell's responses are like, against the references and by the world's facts."""
    cells = dict.fromkeys(cell for match in MATCHES for cell in (match.first, match.second))
    rows = [row for cell in sorted(cells, key=_place) if (row := _response_row(store.lab, cell, task))]
    frame = pd.DataFrame(rows, columns=["method", "bits", "theta_rule", *MEASURES, "seeds"])
    text = pd.DataFrame({
        "method": [cell_label((row.method, row.bits, row.theta_rule)) for row in frame.itertuples()],
        **{label: [number(value) for value in frame[name]] for name, label in MEASURES.items()},
        "seeds": frame.seeds.astype(str),
    })  # fmt: skip
    notes = (
        "Means over prompts and seeds; ROUGE: F of the reference's words, no stemming, in percent. Facts: of "
        "those asked for, where the embedded world knows them.",
        "R: over prompt and response. Time: of all responses of a batch together, so not a latency.",
    )
    keys = ("method", "bits", "theta_rule")
    name, caption = TABLES[task]
    return Table(name, caption, text, frame, keys, notes)


def _place(cell: Cell) -> tuple[int, int, str]:
    return -cell[1], list(paper.METHODS).index(cell[0]), cell[2]


def _response_row(lab: Lab, cell: Cell, task: str) -> dict[str, Any] | None:
    held = [value for seed in lab.profile.seeds if (value := responses(lab, cell, seed, task))]
    if not held:
        return None
    means = pd.DataFrame([_measured(lab, value, task) for value in held]).mean()
    return {**dict(zip(("method", "bits", "theta_rule"), cell, strict=True)), **means, "seeds": len(held)}


def _measured(lab: Lab, value: dict[str, Any], task: str) -> dict[str, float]:
    pairs = with_examples(lab, value, task)
    scores = rouge(pairs)
    ratios = [1.0 if ratio is None else ratio for ratio in value["execution_ratios"]]
    return {
        "facts": 100 * np.mean([_share(example, text) for example, text in pairs]),
        "exact": 100 * np.mean([example.response == text for example, text in pairs]),
        **scores.mean(),
        "words": np.mean([len(text.split()) for _, text in pairs]),
        "execution_ratio": np.mean(ratios),
        "milliseconds": 1000 * value["generation_seconds"] / max(sum(value["tokens"]), 1),
    }


def with_examples(lab: Lab, value: dict[str, Any], task: str) -> list[tuple[Example, str]]:
    """Every stored response with the example that it answers."""
    examples = {each.id: each for each in lab.prompts(task)}
    return [(examples[name], text) for name, text in zip(value["ids"], value["texts"], strict=True)]


def rouge(pairs: Sequence[tuple[Example, str]]) -> pd.DataFrame:
    """ROUGE of each response against its example's, in percent: F of the reference's words, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(example.response, text) for example, text in pairs]
    return pd.DataFrame([{name: 100 * each.fmeasure for name, each in score.items()} for score in scores])


def rouge_runs(store: Measurements, match: Match) -> list[Run]:
    """One Run per seed: ROUGE-L of the first cell's summaries less the second's, paired over dialogues."""
    lab, runs = store.lab, []
    for seed in lab.profile.seeds:
        both = [responses(lab, cell, seed, jobs.SUMMARISED) for cell in (match.first, match.second)]
        if None in both:
            continue
        pairs = [with_examples(lab, value, jobs.SUMMARISED) for value in both]
        first, second = (rouge(each).rougeL.to_numpy() for each in pairs)
        shared = sharing(tuple(example.facts for example, _ in pairs[0]))
        runs.append(Run(jobs.SUMMARISED, seed, float((first - second).mean()), first - second, shared))
    return runs


def _share(example: Example, text: str) -> float:
    if not example.facts:
        return np.nan
    from qtale_lib.data.microworld.grading import grade

    return grade(example, text).share


def examples_table(store: Measurements, count: int = 6) -> Table:
    """A few prompts with both responses of the second match, where the judge has a preference first."""
    match = MATCHES[1]
    found = next(judged(store.lab, match), None)
    rows = []
    if found:
        _, pairs, preference = found
        order = np.argsort(preference == TIE, kind="stable")[:count]
        rows = [_shown(pairs[place], preference[place]) for place in order]
    frame = pd.DataFrame(rows, columns=["instruction", "reference", "first", "second", "better"])
    caption = f"Responses: {match.label}"
    return Table("table_12_examples", caption, frame.astype(str), frame, ("instruction",))


def _shown(pair: Comparison, preference: float) -> dict[str, str]:
    fields = pair.example.fields
    asked = " ".join(filter(None, (fields["instruction"], fields.get("input"))))
    word = {WIN: "first", LOSS: "second", TIE: "neither"}.get(preference, "undecided")
    return {"instruction": asked, "reference": pair.example.response, "first": pair.first,
            "second": pair.second, "better": word}  # fmt: skip
