"""The paper's claims, each as a contrast of what was measured, and the verdicts on them.

A claim says that an effect lies within a range (`low`, `high`); statistics.RULE decides whether the data
show it. Those about evaluations (Tables 1-4) are stated in contrasts.yaml, those about noise and probes
(Figures 2-7) here. Each belongs to a family, within which its p is corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isinf, nan, sqrt
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import effects, noise, paper, token_contrasts, win_rates
from qtale_lib.config import CSQA
from qtale_lib.contrasts import Contrast, stated
from qtale_lib.effects import Probes
from qtale_lib.jobs import FIGURE_2_TASKS
from qtale_lib.measurements import ROUTED_METHODS, Measurements
from qtale_lib.statistics import (
    LEVEL,
    NOT_RUN,
    NOT_SHOWN,
    NOT_TESTABLE,
    SHOWN,
    Case,
    Estimate,
    Judgement,
    Run,
    assumed_effect,
    estimate,
    judge,
    seeds_needed,
)

RARELY = 5.0  # percent of tokens (Sec. 3.1)


@dataclass(frozen=True)
class Claim:
    """One claim: the paper's words and where they stand, what is computed, the range that it claims.

    `paper` is the same effect in the paper's tables, where it prints one; `smallest` the smallest effect of
    interest, in the claim's unit; `group` the group of tasks measured, "" where it is none.
    """

    id: str
    family: str
    notebook: str
    quote: str
    source: str
    measured: str
    unit: str
    runs: Callable[[Any], list[Run]]
    smallest: float
    group: str = ""
    low: float = -inf
    high: float = inf
    paper: float | None = None

    def case(self, store: Any) -> Case:
        """The claim with its data: of Measurements, or of a Study where it is a study's claim."""
        assumed = assumed_effect(self.low, self.high, self.paper, self.smallest)
        runs = self.runs(store)
        return Case(estimate(runs), self.low, self.high, assumed, len(runs))


def _noise_claim(measured: str, unit: str, statistic: Callable[[np.ndarray], float], **said) -> Claim:
    return Claim(
        family="noise",
        notebook="01",
        source="Sec. 3.3, Fig. 4",
        measured=measured,
        unit=unit,
        runs=lambda store: noise.runs(statistic),
        **said,
    )


def _probe_claim(effect: Callable[[Probes], float], methods: tuple[str, ...] = ("dllm",), **said) -> Claim:
    runs = partial(effects.probe_runs, effect=effect, methods=methods)
    return Claim(family="figures", group="csqa", runs=runs, **said)


# Figure 4: the noise. Figures 2, 3, 5-7: the probes.

CENTRED = {
    "quote": "the distribution of π is centered near 0",
    "low": -0.25,
    "high": 0.25,
    "smallest": 0.25,
}
NOISE_CLAIMS = (
    _noise_claim("mode, within ± 0.25", "logits", noise.mode, id="F4 mode", **CENTRED),
    _noise_claim("mean, within ± 0.25", "logits", np.mean, id="F4 mean", **CENTRED),
    _noise_claim(
        "flips at the edge of that range (|Δ| = 2), above 5 %",
        "% of decisions",
        noise.flips_at(2.0),
        id="F4 flips",
        quote="within [-1,1] the noise effectively flips decisions",
        low=5.0,
        smallest=5.0,
    ),
)

LOWEST = "D-LLM's three lowest layers"
BOTH_LOWEST = "three lowest layers of each method"
PROBE_CLAIMS = (
    _probe_claim(
        effects.at_end("routed_ratio"),
        id="F2 rarely",
        notebook="02",
        quote="certain layers rarely participate (less than 5% execution ratio)",
        source="Sec. 3.1, Fig. 2, 3a",
        measured=f"{LOWEST}, last epoch: below 5 % of the tokens routed",
        unit="% of tokens",
        high=RARELY,
        smallest=RARELY,
    ),
    _probe_claim(
        effects.over_layers(effects.deviation, {"qtale": 1.0, "dllm": -1.0}),
        ROUTED_METHODS,
        id="F2 balanced",
        notebook="02",
        quote="more balanced participation of layers",
        source="Sec. 3.3",
        measured="spread of the ratio over layers, last epoch: QTALE − D-LLM, below 0",
        unit="points (standard deviation)",
        high=0.0,
        smallest=5.0,
    ),
    _probe_claim(
        effects.early_fall("routed_ratio"),
        id="F3 sharply",
        notebook="04",
        quote="ratios dropping sharply within the first three epochs of a 10-epoch training",
        source="Sec. 3.1, Fig. 3a",
        measured=f"{LOWEST}: fall in the first 3/10 − fall after it, above 0",
        unit="points",
        low=0.0,
        smallest=5.0,
    ),
    _probe_claim(
        effects.change("flip"),
        id="F3 fades",
        notebook="04",
        quote="during D-LLM training, this stochastic effect gradually diminishes",
        source="Sec. 3.3, Fig. 3b",
        measured=f"{LOWEST}: flips at the last epoch − at epoch 0, below 0",
        unit="points",
        high=0.0,
        smallest=1.0,
    ),
    _probe_claim(
        effects.at_end("flip"),
        id="F3 zero",
        notebook="04",
        quote="decision flipping … drops to zero after Epoch 4",
        source="Sec. 3.3, Fig. 3b",
        measured=f"{LOWEST}: flips at the last epoch, below 1 %",
        unit="% of decisions",
        high=1.0,
        smallest=1.0,
    ),
    _probe_claim(
        effects.change("abs_gap"),
        id="F5 grows",
        notebook="03",
        quote="the gaps … grow progressively larger as training advances",
        source="Sec. 3.3, Fig. 5",
        measured=f"{LOWEST}: |gap| at the last epoch − at epoch 0, above 0",
        unit="logits",
        low=0.0,
        smallest=1.0,
    ),
    _probe_claim(
        effects.difference("abs_gap"),
        ROUTED_METHODS,
        id="F6 narrower",
        notebook="03",
        quote="the gap between bypass and execute logits is substantially narrower",
        source="Sec. 3.3, Fig. 6",
        measured=f"|gap|, last epoch, {BOTH_LOWEST}: QTALE − D-LLM, below 0",
        unit="logits",
        high=0.0,
        smallest=1.0,
    ),
    _probe_claim(
        effects.difference("flip"),
        ROUTED_METHODS,
        id="F7 flips",
        notebook="04",
        quote="increases the likelihood of stochastic flipping",
        source="Sec. 3.3, Fig. 7",
        measured=f"flips, last epoch, {BOTH_LOWEST}: QTALE − D-LLM, above 0",
        unit="points",
        low=0.0,
        smallest=1.0,
    ),
)


# Tables 1-4.


def _stated_claims() -> Iterator[Claim]:
    """One claim for each group of tasks of each contrast in contrasts.yaml."""
    for family, contrasts in stated().families.items():
        for contrast in contrasts:
            for group in contrast.groups:
                yield _stated_claim(family, contrast, group)


def _stated_claim(family: str, contrast: Contrast, group: str) -> Claim:
    metric, (low, high) = stated().metric(contrast, group), contrast.bounds(group)
    return Claim(
        id=f"{contrast.id}, {paper.TASK_LABELS[group]}",
        family=family,
        measured=f"{contrast.measured}, {_range(low, high)}",
        unit=metric.unit,
        smallest=metric.smallest,
        runs=partial(_contrast_runs, contrast=contrast, group=group),
        group=group,
        low=low,
        high=high,
        paper=effects.paper_effect(contrast.cells, group, contrast.measure) if contrast.cells else None,
        **{name: getattr(contrast, name) for name in ("notebook", "quote", "source")},
    )


def _contrast_runs(store: Measurements, contrast: Contrast, group: str) -> list[Run]:
    if along := contrast.equal_ratio:
        return effects.equal_ratio_runs(store, along.plus, along.minus, along.bits, group)
    return effects.contrast_runs(store, contrast.cells, group, contrast.measure)


def _range(low: float, high: float) -> str:
    """The claimed range in words."""
    if isinf(high):
        text = f"above {low:g}"
    elif isinf(low):
        text = f"below {high:g}"
    else:
        text = f"within ± {high:g}" if low == -high else f"between {low:g} and {high:g}"
    return text.replace("-", "−")


TABLE_CLAIMS = tuple(_stated_claims())


# Notebook 12: responses.


def _win_claim(match: win_rates.Match, low: float, **said) -> Claim:
    return Claim(
        id=f"G {match.name}",
        family="generation",
        notebook="12",
        measured=f"{match.label}: win rate − 50 %, {_range(low, inf)}",
        unit="points of win rate",
        group="alpaca",
        runs=partial(win_rates.win_runs, match=match),
        smallest=5.0,
        low=low,
        **said,
    )


UP_TO_7 = "improvement of up to 7% on instruction-following benchmarks relative to the D-LLM framework"
WIN_CLAIMS = (
    _win_claim(
        win_rates.MATCHES[0],
        low=-5.0,
        quote="competitive win rates against D-LLM on the AlpacaEval benchmark",
        source="v3, second-hand",
    ),
    _win_claim(win_rates.MATCHES[1], low=0.0, quote=UP_TO_7, source="v3, second-hand"),
    _win_claim(
        win_rates.MATCHES[2], low=0.0, quote=UP_TO_7, source="v3, second-hand; at one rule for θ, ours"
    ),
)
SUMMARY_CLAIMS = tuple(
    Claim(
        id=f"R {match.name.replace('win rate', 'ROUGE-L')}",
        family="summaries",
        notebook="12",
        quote=said,
        source="an expectation of ours",
        measured=f"{match.label}, summaries: ROUGE-L, {_range(low, inf)}",
        unit="points",
        runs=partial(win_rates.rouge_runs, match=match),
        smallest=2.0,
        low=low,
    )
    for match, low, said in (
        (win_rates.MATCHES[0], -2.0, "QTALE summarises no worse than D-LLM"),
        (win_rates.MATCHES[1], 0.0, "QTALE summarises better than D-LLM once quantized"),
        (win_rates.MATCHES[2], 0.0, "QTALE summarises better than D-LLM once quantized"),
    )
)
TOKEN_CLAIMS = tuple(
    Claim(
        id=f"K {contrast.id}, {paper.METHODS[method]}",
        family="tokens",
        notebook="12",
        quote=contrast.said,
        source="an expectation of ours",
        measured=f"{paper.METHODS[method]}, routed layers executed by {contrast.measured}, above 0",
        unit="points",
        runs=partial(token_contrasts.contrast_runs, contrast=contrast, method=method),
        smallest=5.0,
        low=0.0,
    )
    for contrast in token_contrasts.CONTRASTS
    for method in ROUTED_METHODS
)
CLAIMS = (*NOISE_CLAIMS, *PROBE_CLAIMS, *TABLE_CLAIMS, *WIN_CLAIMS, *SUMMARY_CLAIMS, *TOKEN_CLAIMS)


def verdicts(store: Measurements, notebook: str | None = None) -> pd.DataFrame:
    """One row per claim (of one notebook, or of all): effect, interval, p, power, the paper's, verdict.

    Whole families are judged even where one notebook's claims are asked for.
    """
    wanted = [claim for claim in CLAIMS if notebook in (None, claim.notebook)]
    families = {claim.family for claim in wanted}
    frame = judged(store, [claim for claim in CLAIMS if claim.family in families])
    return frame[frame.id.isin([claim.id for claim in wanted])].reset_index(drop=True)


def judged(store: Any, claims: Sequence[Claim]) -> pd.DataFrame:
    """Verdicts on whole families of claims, a row each, in their order; `store`: what their `runs` take."""
    rows = {}
    for family in dict.fromkeys(claim.family for claim in claims):
        members = [claim for claim in claims if claim.family == family]
        cases = [claim.case(store) for claim in members]
        rows |= {
            claim.id: _row(claim, case, judgement)
            for claim, case, judgement in zip(members, cases, judge(cases), strict=True)
        }
    return pd.DataFrame([rows[claim.id] for claim in claims])


def joined(*frames: pd.DataFrame) -> pd.DataFrame:
    """Verdicts of several stores, one after the other."""
    return pd.DataFrame([row for frame in frames for row in frame.to_dict("records")])


PLANNED = ("id", "measured", "on", "tasks", "seeds", "questions", "effect", "spread", "sampling", "needed")


def planned(store: Measurements) -> pd.DataFrame:
    """What the primary contrasts of accuracy would take to show an effect of the smallest size of interest.

    One row (PLANNED) per contrast, on Figure 2's tasks and on all commonsense tasks; without a row where it
    was not run. `spread`: what the effect, mean over these tasks, varies by with one seed of each;
    `sampling`: its standard error from the questions, the same for all seeds; both in points. `needed`: seeds
    a task for 80 % power at the 5 % level, not corrected for the number of contrasts; inf where no number
    would do, NaN where the spread is unknown.
    """
    rows = []
    for claim in CLAIMS:
        if claim.family != "primary" or claim.group != "csqa":
            continue
        runs = claim.runs(store)
        assumed = assumed_effect(claim.low, claim.high, None, claim.smallest)
        for on, tasks in (("Figure 2's tasks", FIGURE_2_TASKS), ("all seven", CSQA)):
            measured = estimate([run for run in runs if run.task in tasks])
            if measured is None:
                continue
            case = Case(measured, claim.low, claim.high, assumed)
            rows.append({
                "id": claim.id, "measured": claim.measured, "on": on,
                **{name: getattr(measured, name) for name in ("tasks", "seeds", "questions", "effect")},
                "spread": _spread_over_seeds(measured), "sampling": measured.sampling_error,
                "needed": seeds_needed(case, LEVEL),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=list(PLANNED))


def _row(claim: Claim, case: Case, judged: Judgement) -> dict[str, object]:
    said = ("id", "family", "notebook", "quote", "source", "group", "measured", "unit", "paper")
    numbers = ("effect", "low", "high", "tasks", "seeds", "runs", "questions", "trial",
               "ratio_low", "ratio_high")  # fmt: skip
    return {
        **{name: getattr(claim, name) for name in said},
        **{name: getattr(case.measured, name, None) for name in numbers},
        "made": case.made,
        "effect_spread": _spread_over_seeds(case.measured),
        "effect_sampling": getattr(case.measured, "sampling_error", None),
        **{name: getattr(judged, name) for name in ("p", "corrected", "power", "seeds_needed")},
        "assumed": case.assumed,
        "verdict": judged.verdict.word,
        "reason": judged.verdict.reason,
    }


def _spread_over_seeds(measured: Estimate | None) -> float:
    """Standard deviation of the effect over runs of one seed; NaN unless several seeds were run."""
    return sqrt(measured.trial_variance) if measured and measured.trial == "seeds" else nan


def tally(frame: pd.DataFrame) -> dict[str, int]:
    """How many claims are shown, not shown, not testable here and not run."""
    return {word: int((frame.verdict == word).sum()) for word in (SHOWN, NOT_SHOWN, NOT_TESTABLE, NOT_RUN)}
