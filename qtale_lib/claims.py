"""The paper's claims, each as a contrast of what was measured, and the verdicts on them.

A claim says that an effect lies within a range (`low`, `high`); statistics.RULE decides whether the data
show it. QTALE stands at its searched theta when quantized and at 0.5 in 16 bits, D-LLM at arg max, as in the
paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf

import numpy as np
import pandas as pd

from qtale_lib import effects, noise, paper
from qtale_lib.effects import Contrast, Probes
from qtale_lib.measurements import ROUTED_METHODS, Measurements
from qtale_lib.statistics import NOT_SHOWN, NOT_TESTABLE, SHOWN, Run, estimate, verdict

RARELY = 5.0  # percent of tokens (Sec. 3.1)
TARGET_MARGIN = 10.0  # points of execution ratio around the target that count as having met it
NEGLIGIBLE = 5.0  # points of execution ratio that count as no change
COMPARABLE = {"csqa": 1.0, "mmlu": 1.0, "alpaca": 5.0}  # a loss below this counts as comparable
UNITS = {"csqa": "accuracy points", "mmlu": "accuracy points", "alpaca": "% of PPL"}
RATIO_UNIT = "points of execution ratio"


@dataclass(frozen=True)
class Claim:
    """One claim: the paper's words and where they stand, what is computed, the range that it claims.

    `paper` is the same effect in the paper's tables, where it prints one.
    """

    id: str
    notebook: str
    quote: str
    source: str
    measured: str
    unit: str
    runs: Callable[[Measurements], list[Run]]
    low: float = -inf
    high: float = inf
    paper: float | None = None


def _noise_claim(measured: str, unit: str, statistic: Callable[[np.ndarray], float], **said) -> Claim:
    return Claim(
        notebook="01",
        source="Sec. 3.3, Fig. 4",
        measured=measured,
        unit=unit,
        runs=lambda store: noise.runs(statistic),
        **said,
    )


def _probe_claim(effect: Callable[[Probes], float], methods: tuple[str, ...] = ("dllm",), **said) -> Claim:
    return Claim(runs=partial(effects.probe_runs, effect=effect, methods=methods), **said)


def _table_claim(id: str, group: str, contrast: Contrast, measure: str = "score", **said) -> Claim:
    return Claim(
        id=f"{id}, {paper.TASK_LABELS[group]}",
        unit=UNITS[group] if measure == "score" else RATIO_UNIT,
        runs=partial(effects.contrast_runs, contrast=contrast, group=group, measure=measure),
        paper=effects.paper_effect(contrast, group, measure),
        **said,
    )


# Figure 4: the noise. Figures 2, 3, 5-7: the probes.

CENTRED = {"quote": "the distribution of π is centered near 0", "low": -0.25, "high": 0.25}
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
    ),
    _probe_claim(
        effects.unevenness,
        ROUTED_METHODS,
        id="F2 balanced",
        notebook="02",
        quote="more balanced participation of layers",
        source="Sec. 3.3",
        measured="spread of the ratio over layers, last epoch: QTALE − D-LLM, below 0",
        unit="points (standard deviation)",
        high=0.0,
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
    ),
)


# Tables 1 and 2.


def _comparable(method: str, group: str) -> Claim:
    name, margin = paper.METHODS[method], COMPARABLE[group]
    return _table_claim(
        f"T1 {name} comparable",
        group,
        {(method, 16, "argmax"): 1.0, ("full", 16, "none"): -1.0},
        notebook="05",
        quote="comparable accuracy and PPL before quantization",
        source="Sec. 4.2, Tables 1, 2",
        measured=f"{name} − Full, 16 bits, above −{margin:g}",
        low=-margin,
    )


def _loses_more(bits: int, group: str) -> Claim:
    dllm = {("dllm", bits, "argmax"): 1.0, ("dllm", 16, "argmax"): -1.0}
    return _table_claim(
        f"T1 D-LLM loses more, {bits} bits",
        group,
        {**dllm, ("full", bits, "none"): -1.0, ("full", 16, "none"): 1.0},
        notebook="05",
        quote="noticeable drops in accuracy and PPL compared to the quantized full models",
        source="Sec. 4.2, Tables 1, 2" if bits > 2 else "beyond the paper (Sec. 4.2)",
        measured=f"change from 16 to {bits} bits: D-LLM − Full, below 0",
        high=0.0,
    )


def _recovers(bits: int, group: str) -> Claim:
    return _table_claim(
        f"T1 QTALE recovers, {bits} bits",
        group,
        {("qtale", bits, "searched"): 1.0, ("dllm", bits, "argmax"): -1.0},
        notebook="05",
        quote="effectively restores the redundancy needed for robust quantization",
        source="Sec. 4.2, Tables 1, 2" if bits > 2 else "beyond the paper (Sec. 4.2)",
        measured=f"QTALE (searched θ) − D-LLM, {bits} bits, above 0",
        low=0.0,
    )


def _gap_to_full() -> Claim:
    return _table_claim(
        "T1 gap to Full",
        "csqa",
        {("qtale", 4, "searched"): 1.0, ("full", 4, "none"): -1.0},
        notebook="05",
        quote="the gap to quantization-only models kept below 0.5%",
        source="Abstract, Tables 1, 2",
        measured="QTALE (searched θ) − Full, 4 bits, above −0.5",
        low=-0.5,
    )


# Table 3.


def _target_met() -> Claim:
    def runs(store: Measurements) -> list[Run]:
        target = 100 * store.profile.training.rate_target
        found = effects.contrast_runs(store, {("dllm", 16, "argmax"): 1.0}, "csqa", "loss_ratio")
        return [Run(run.task, run.seed, run.effect - target) for run in found]

    return Claim(
        id="T3 target, CSQA",
        notebook="06",
        quote="after fine-tuning, D-LLM achieves the target execution ratio",
        source="Sec. 2.2",
        measured=f"loss-R − target, D-LLM, 16 bits, within ± {TARGET_MARGIN:g}",
        unit=RATIO_UNIT,
        runs=runs,
        low=-TARGET_MARGIN,
        high=TARGET_MARGIN,
    )


def _half(group: str) -> Claim:
    return _table_claim(
        "T3 half",
        group,
        {("dllm", 16, "argmax"): 1.0},
        "execution_ratio",
        notebook="06",
        quote="reduces the FLOPs … to about 50% of those of the original model",
        source="Sec. 2.2, Table 3",
        measured=f"layer FLOPs relative to Full (R), D-LLM, 16 bits, within 50 ± {TARGET_MARGIN:g}",
        low=50 - TARGET_MARGIN,
        high=50 + TARGET_MARGIN,
    )


def _increase(group: str) -> Claim:
    large = group == "alpaca"
    bound = f"{'above' if large else 'below'} {NEGLIGIBLE:g}"
    return _table_claim(
        "T3 increase",
        group,
        {("qtale", 4, "searched"): 1.0, ("qtale", 4, "argmax"): -1.0},
        "execution_ratio",
        notebook="06",
        quote="a more substantial increase" if large else "the execution ratio does not drastically increase",
        source="Sec. 4.3, Table 3",
        measured=f"QTALE, 4 bits: R at the searched θ − R at 0.5, {bound}",
        low=NEGLIGIBLE if large else -inf,
        high=inf if large else NEGLIGIBLE,
    )


# Table 4.


def _gain_from_theta(bits: int, sign: float = 1.0) -> Contrast:
    rules = {"searched": 0.5 * sign, "argmax": -0.5 * sign}
    return {(method, bits, rule): weight for method in ROUTED_METHODS for rule, weight in rules.items()}


def _theta_helps(group: str) -> Claim:
    return _table_claim(
        "T4 θ helps",
        group,
        _gain_from_theta(4),
        notebook="07",
        quote="execution ratio adjustment … essential in recovering accuracy/PPL",
        source="Sec. 4.4, Table 4",
        measured="4 bits, mean of D-LLM and QTALE: searched θ − 0.5, above 0",
        low=0.0,
    )


def _theta_control(group: str) -> Claim:
    return _table_claim(
        "T4 θ control",
        group,
        _gain_from_theta(4) | _gain_from_theta(16, -1.0),
        notebook="07",
        quote="redundancy to absorb quantization errors",
        source="Sec. 3.4; the control is ours",
        measured="gain from the searched θ at 4 bits − the same at 16 bits, above 0",
        low=0.0,
    )


def _entropy_helps(group: str) -> Claim:
    return _table_claim(
        "T4 entropy helps",
        group,
        {("qtale", 4, "argmax"): 1.0, ("dllm", 4, "argmax"): -1.0},
        notebook="07",
        quote="quantization-robust training … essential in recovering accuracy/PPL",
        source="Sec. 4.4, Table 4",
        measured="4 bits, θ 0.5: QTALE − D-LLM, above 0",
        low=0.0,
    )


def _entropy_keeps_ratio() -> Claim:
    return _table_claim(
        "T4 entropy keeps R",
        "csqa",
        {("qtale", 4, "argmax"): 1.0, ("dllm", 4, "argmax"): -1.0},
        "execution_ratio",
        notebook="07",
        quote="does not alter the execution ratio after fine-tuning",
        source="Sec. 4.4, Table 4",
        measured=f"R, 4 bits, θ 0.5: QTALE − D-LLM, within ± {NEGLIGIBLE:g}",
        low=-NEGLIGIBLE,
        high=NEGLIGIBLE,
    )


QUANTIZED = [(bits, group) for bits in (4, 3) for group in paper.GROUPS] + [(2, "csqa")]
TABLE_CLAIMS = (
    *(_comparable(method, group) for method in ROUTED_METHODS for group in paper.GROUPS),
    *(_loses_more(bits, group) for bits, group in QUANTIZED),
    *(_recovers(bits, group) for bits, group in QUANTIZED),
    _gap_to_full(),
    _target_met(),
    *(make(group) for make in (_half, _increase) for group in paper.GROUPS),
    *(make(group) for make in (_theta_helps, _theta_control, _entropy_helps) for group in paper.GROUPS),
    _entropy_keeps_ratio(),
)
CLAIMS = (*NOISE_CLAIMS, *PROBE_CLAIMS, *TABLE_CLAIMS)


def verdicts(store: Measurements, notebook: str | None = None) -> pd.DataFrame:
    """One row per claim (of one notebook, or of all): effect, interval, detectable effect, paper, verdict."""
    chosen = [claim for claim in CLAIMS if notebook in (None, claim.notebook)]
    return pd.DataFrame([_row(claim, store) for claim in chosen])


def _row(claim: Claim, store: Measurements) -> dict[str, object]:
    measured = estimate(claim.runs(store))
    decided = verdict(measured, claim.low, claim.high, claim.paper)
    said = {name: getattr(claim, name) for name in ("id", "quote", "source", "measured", "unit", "paper")}
    names = ("effect", "low", "high", "detectable", "tasks", "seeds", "questions", "trial")
    numbers = {name: asdict(measured)[name] if measured else None for name in names}
    return {**said, **numbers, "verdict": decided.word, "reason": decided.reason}


def tally(frame: pd.DataFrame) -> dict[str, int]:
    """How many claims are shown, not shown and not testable here."""
    return {word: int((frame.verdict == word).sum()) for word in (SHOWN, NOT_SHOWN, NOT_TESTABLE)}
