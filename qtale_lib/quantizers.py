"""Quantizers, sparse weights and fewer layers beside QTALE's (notebook 09): tables, figure and verdicts.

An arm is one way to compress what was fine-tuned once: a quantizer at several widths, a sparsity in 16 bits,
or, for Full alone, layers removed or left early. Changes are from the same method's own 16 bits, on the same
questions. θ is QTALE's searched one once a model is compressed, D-LLM's is 0.5, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from math import nan
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.claims import Claim
from qtale_lib.contrasts import stated
from qtale_lib.effects import gain_of, paper_rule
from qtale_lib.efficiency_tables import MIB, packed_file
from qtale_lib.jobs import USUAL_RULE
from qtale_lib.measurements import Answers, Measurements, group_of
from qtale_lib.statistics import Run, estimate
from qtale_lib.studies import Study
from qtale_lib.sweep import Setting
from qtale_lib.tables import Table, number, or_dash, with_interval

QUANTIZERS = {"rtn": "RTN", "awq": "AWQ", "gptq": "GPTQ", "magr_gptq": "MagR+GPTQ"}
FEWER = {"block_influence": "ShortGPT's block influence", "sleb": "SLEB", "early_exit": "early exit"}
QUANTIZER, SPARSITY, LAYERS = "quantizer", "sparsity", "layers"
CELLS = ("kind", "arm", "bits", "method", "rule", "accuracy", "low", "high", "change", "change_low",
         "change_high", "R", "bytes", "tasks", "seeds")  # fmt: skip
EQUAL = ("family", "method", "effect", "low", "high", "R", "tasks", "seeds")


@dataclass(frozen=True)
class Arm:
    """One way to compress; `store` holds its evaluations, `own` those of the study's 16 bits."""

    kind: str
    name: str
    store: Measurements
    own: Measurements

    def widths(self) -> list[int]:
        """Bit widths at which it was evaluated: those below 16 of a quantizer."""
        return [bits for bits in self.store.profile.bits if (bits < 16) == (self.kind == QUANTIZER)]

    def rule(self, method: str, bits: int) -> str:
        """The rule that sets θ."""
        return "searched" if self.kind == SPARSITY and method == "qtale" else paper_rule(method, bits)


def arms(study: Study) -> list[Arm]:
    """The study's own quantizer first, then those of its factors, in their order."""
    return [
        Arm(_kind(setting), arm_name(setting.profile), store, study.own) for setting, store in study.measured
    ]


def _kind(setting: Setting) -> str:
    return {"pruning.weights": SPARSITY, "pruning.layers": LAYERS}.get(setting.factor, QUANTIZER)


def arm_name(profile: Any) -> str:
    """What is done to a profile's models, for readers."""
    pruning, how = profile.pruning, profile.quantization
    if not pruning.is_none():
        return pruning.weights if pruning.layers == "none" else pruning.layers
    name = QUANTIZERS[how.method] + (f" ({how.backend})" if how.backend != "native" else "")
    return f"{name}, mixed" if how.widths == "mixed" else name


# What was measured.


def frame(study: Study) -> pd.DataFrame:
    """One row (CELLS) per arm, width and method, and first per method in 16 bits as it is.

    accuracy in percent (expected where that is known) and change from 16 bits in points: means over tasks and
    seeds, with their 95 % intervals over seeds and questions; R: the executed share; bytes: of the packed
    file (routers included), of quantizers alone.
    """
    plain = Arm(QUANTIZER, "16 bits", study.own, study.own)
    rows = [row for method in study.profile.methods for row in _row(study, plain, method, 16)]
    for arm in arms(study):
        cells = [(bits, method) for bits in arm.widths() for method in arm.store.profile.methods]
        rows += [row for bits, method in cells for row in _row(study, arm, method, bits)]
    return pd.DataFrame(rows, columns=list(CELLS))


def _row(study: Study, arm: Arm, method: str, bits: int) -> Iterator[dict[str, Any]]:
    rule = arm.rule(method, bits)
    here, whole = (arm.store, method, bits, rule), (arm.own, method, 16, USUAL_RULE[method])
    found = [
        (task, seed, answers) for task, seed in _trials(study) if (answers := _answers(here, task, seed))
    ]
    if not found:
        return
    level = estimate([Run(task, seed, a.mean, a.scores, a.shared) for task, seed, a in found])
    change = None if here == whole else estimate(contrast_runs(study, {here: 1.0, whole: -1.0}))
    yield {
        "kind": arm.kind, "arm": arm.name, "bits": bits, "method": method, "rule": rule,
        "accuracy": level.effect, "low": level.low, "high": level.high,
        "change": getattr(change, "effect", nan), "change_low": getattr(change, "low", nan),
        "change_high": getattr(change, "high", nan),
        "R": float(np.mean([answers.execution_ratio for *_, answers in found])),
        "bytes": _bytes(arm, method, bits, [(task, seed) for task, seed, _ in found]) if bits < 16 else nan,
        "tasks": level.tasks, "seeds": level.seeds,
    }  # fmt: skip


def _bytes(arm: Arm, method: str, bits: int, trials: Sequence[tuple[str, int]]) -> float:
    """Bytes of a packed file: mean over runs where each has mixed widths of its own."""
    if arm.store.profile.quantization.widths == "uniform":
        return float(packed_file(arm.store, bits, method))
    specs = [{"task": task, "method": method, "seed": seed, "bits": bits} for task, seed in trials]
    widths = [arm.store.lab.result("quantization", **spec)["value"]["layer_bits"] for spec in specs]
    return float(np.mean([packed_file(arm.store, bits, method, own) for own in widths]))


Cell = tuple[Measurements, str, int, str]  # store, method, bits, rule


def _trials(study: Study) -> list[tuple[str, int]]:
    tasks = [task for task in study.profile.tasks if group_of(task) != "alpaca"]
    return [(task, seed) for task in tasks for seed in study.profile.seeds]


def _answers(cell: Cell, task: str, seed: int) -> Answers | None:
    store, method, bits, rule = cell
    return store.answers.get((task, method, seed, bits, rule))


def contrast_runs(study: Study, contrast: dict[Cell, float]) -> list[Run]:
    """A weighted sum of cells: one Run per task and seed for which all were evaluated, in points gained."""
    runs = []
    for task, seed in _trials(study):
        answers = [_answers(cell, task, seed) for cell in contrast]
        if all(answers):
            runs.append(gain_of(task, seed, answers, list(contrast.values())))
    return runs


# At equal R.


def equal_ratio_runs(study: Study, family: str, method: str = "qtale") -> list[Run]:
    """A routed method at θ 0.5 in 16 bits minus Full with fewer layers at the same R, along one family.

    Full's score is interpolated linearly over R between the settings evaluated, Full as it is among them.
    Without an effect where the routed R is below all of theirs.
    """
    full = [(study.own, "full", 16, USUAL_RULE["full"])]
    full += [
        (arm.store, "full", 16, USUAL_RULE["full"])
        for arm in arms(study)
        if arm.kind == LAYERS and arm.name.split()[0] == family
    ]
    runs = []
    for task, seed in _trials(study):
        routed = _answers((study.own, method, 16, USUAL_RULE[method]), task, seed)
        curve = [answers for cell in full if (answers := _answers(cell, task, seed))]
        if routed and len(curve) > 1:
            runs.append(gain_at_its_ratio(task, seed, routed, curve))
    return runs


def gain_at_its_ratio(task: str, seed: int, routed: Answers, curve: Sequence[Answers]) -> Run:
    """One point minus a curve at the point's own R; NaN where the curve does not reach it."""
    curve = sorted(curve, key=lambda answers: answers.execution_ratio)
    ratios, at = [answers.execution_ratio for answers in curve], routed.execution_ratio
    if not ratios[0] <= at <= ratios[-1]:
        return Run(task, seed, nan)
    weights = [np.interp(at, ratios, unit) for unit in np.eye(len(curve))]
    gain = gain_of(task, seed, [routed, *curve], [1.0, *(-weight for weight in weights)])
    return changed(gain, ratios=(at, at))


def equal_ratios(study: Study) -> pd.DataFrame:
    """One row (EQUAL) per family of fewer layers and routed method: points gained at equal R, and that R."""
    rows = []
    for family in FEWER:
        for method in (m for m in study.profile.methods if m in ("dllm", "qtale")):
            runs = equal_ratio_runs(study, family, method)
            measured = estimate(runs)
            if measured:
                numbers = {
                    name: getattr(measured, name) for name in ("effect", "low", "high", "tasks", "seeds")
                }
                ratio = float(np.nanmean([run.ratios[0] for run in runs]))
                rows.append({"family": family, "method": method, "R": ratio, **numbers})
    return pd.DataFrame(rows, columns=list(EQUAL))


# Tables.


def quantizer_table(found: pd.DataFrame, study: Study) -> Table:
    """Accuracy, its change, R and bytes by width, quantizer and method; `found`: frame."""
    part = found[found.kind == QUANTIZER]
    part = part.sort_values("bits", ascending=False, kind="stable", ignore_index=True)
    text = pd.DataFrame({
        "bits": part.bits.astype(str), "quantizer": part.arm, "method": part.method.map(paper.METHODS),
        **_scored(part),
        "packed file (MiB)": [or_dash(value / MIB, 3) for value in part.bytes],
    })  # fmt: skip
    notes = (
        *_notes(study),
        "Packed file: to the byte what save_packed writes, 32-bit steps and routers included. Mixed: layers "
        "of 4, 3 and 2 bits, chosen on calibration texts by what each alone adds to the loss there, with at "
        "most the mean width of the row.",
    )
    caption = f"Quantizers, study {study.profile.name}"
    return Table("quantizers_accuracy", caption, text, part, ("arm", "bits", "method"), notes)


def pruning_table(found: pd.DataFrame, study: Study) -> Table:
    """The same of sparse weights, and of fewer layers; `found`: frame."""
    part = found[found.kind != QUANTIZER].reset_index(drop=True)
    text = pd.DataFrame({
        "what": part.arm.str.replace("_", " "), "method": part.method.map(paper.METHODS),
        **_scored(part),
    })  # fmt: skip
    notes = (
        *_notes(study),
        "In 16 bits. Sparsity: the share of weights set to zero, or 2 of 4 neighbours kept. Layers: the "
        "number removed, or the confidence at which a token leaves; R of early exit leaves out what it "
        "costs to ask for confidence after every layer.",
    )
    caption = f"Sparse weights and fewer layers, study {study.profile.name}"
    return Table("quantizers_pruning", caption, text, part, ("arm", "bits", "method"), notes)


def equal_ratio_table(found: pd.DataFrame, study: Study) -> Table:
    """Routed methods against Full with fewer layers at equal R; `found`: equal_ratios."""
    text = pd.DataFrame({
        "routed method": found.method.map(paper.METHODS), "against Full with": found.family.map(FEWER),
        "R": found.R.map(partial(number, digits=3)),
        "gain [95 %]": _intervals(found, "effect", "low", "high", sign=True),
    })  # fmt: skip
    notes = (
        "Accuracy points at the routed method's own R, θ 0.5, 16 bits; in brackets the 95 % interval over "
        "seeds and questions. Full with fewer layers is linear between the numbers of layers (confidences) "
        "evaluated.",
    )
    caption = f"Token-adaptive execution against fewer layers at equal R, study {study.profile.name}"
    return Table("quantizers_equal_ratio", caption, text, found, ("family", "method"), notes)


def _notes(study: Study) -> tuple[str, ...]:
    tasks = ", ".join(
        paper.TASK_LABELS.get(task, task) for task in dict.fromkeys(t for t, _ in _trials(study))
    )
    return (
        f"Mean over {tasks} and {len(study.profile.seeds)} seed(s): accuracy in percent (expected where that "
        "is known), its change from the same method's 16 bits in points, each with its 95 % interval over "
        "seeds and questions (with one seed and fewer than three tasks, over questions alone).",
    )


def _scored(part: pd.DataFrame) -> dict[str, Any]:
    """The columns that both tables of arms have."""
    return {
        "accuracy [95 %]": _intervals(part, "accuracy", "low", "high"),
        "change [95 %]": _intervals(part, "change", "change_low", "change_high", sign=True),
        "R": part.R.map(partial(number, digits=3)),
    }


def _intervals(part: pd.DataFrame, value: str, low: str, high: str, sign: bool = False) -> list[str]:
    rows = part[[value, low, high]].astype(float).values
    return [with_interval(*row, sign=sign) for row in rows]


# Claims.


def _arm(study: Study, name: str, bits: int) -> Arm | None:
    return next((arm for arm in arms(study) if arm.name == name and bits in arm.widths()), None)


def loses_less_runs(study: Study, name: str, bits: int) -> list[Run]:
    """Change from 16 bits (θ 0.5) to the arm at this width: QTALE's − D-LLM's."""
    if (arm := _arm(study, name, bits)) is None:
        return []
    signs = {"qtale": 1.0, "dllm": -1.0}
    here = {(arm.store, m, bits, arm.rule(m, bits)): sign for m, sign in signs.items()}
    return contrast_runs(study, here | {(arm.own, m, 16, USUAL_RULE[m]): -sign for m, sign in signs.items()})


def better_runs(study: Study, plus: str, minus: str, bits: int) -> list[Run]:
    """QTALE at one width: one arm − another."""
    both = [_arm(study, name, bits) for name in (plus, minus)]
    if not all(both):
        return []
    cells = [(arm.store, "qtale", bits, arm.rule("qtale", bits)) for arm in both]
    return contrast_runs(study, dict(zip(cells, (1.0, -1.0), strict=True)))


REDUNDANCY = {"quote": "redundancy to absorb quantization errors", "source": "Sec. 3.3"}
V3 = {
    "quote": "Activation-Aware Weight Quantization (AWQ) and Magnitude-aware GPTQ (MagR+GPTQ)",
    "source": "v3 (second-hand: a third party's summary)",
}
ASKED = {"quote": "mixed precision; other compression", "source": "asked by reviewers of the paper"}
LAYERWISE = {
    "quote": "layer-wise redundancy and contextual sparsity",
    "source": "Sec. 2; the comparison is ours",
}


def _claim(name: str, measured: str, runs: Callable[[Study], list[Run]], said: dict[str, str]) -> Claim:
    metric = stated().metrics["csqa"]
    return Claim(
        id=f"Q {name}",
        family="quantizers",
        notebook="09",
        measured=f"{measured}, above 0",
        unit=metric.unit,
        runs=runs,
        smallest=metric.smallest,
        group="csqa",
        low=0.0,
        **said,
    )


def _claims() -> Iterator[Claim]:
    for name, said in (("RTN", REDUNDANCY), ("GPTQ", REDUNDANCY), ("MagR+GPTQ", V3)):
        measured = f"change from 16 to 3 bits by {name}: QTALE (searched θ) − D-LLM"
        yield _claim(f"{name}, 3 bits", measured, partial(loses_less_runs, name=name, bits=3), said)
    pairs = (("MagR+GPTQ", "AWQ", V3), ("GPTQ, mixed", "GPTQ", ASKED))
    for plus, minus, said in pairs:
        runs = partial(better_runs, plus=plus, minus=minus, bits=3)
        yield _claim(f"{plus} against {minus}, 3 bits", f"QTALE, 3 bits: {plus} − {minus}", runs, said)
    for name in ("wanda 0.5", "wanda 2:4"):
        measured = f"change from dense to {name}, 16 bits: QTALE (searched θ) − D-LLM"
        yield _claim(f"sparsity, {name}", measured, partial(loses_less_runs, name=name, bits=16), ASKED)
    for family, words in FEWER.items():
        measured = f"16 bits, θ 0.5, equal R: QTALE − Full with {words}"
        yield _claim(f"layers, {words}", measured, partial(equal_ratio_runs, family=family), LAYERWISE)


CLAIMS = tuple(_claims())
