"""How much each setting matters, and whether its default holds (notebook 10), on validation questions.

Each value of a factor stands against the study's own settings, fine-tuning by fine-tuning, on the same
questions. θ is 0.5 in 16 bits and the searched one below, for both methods.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.claims import Claim, judged
from qtale_lib.contrasts import stated
from qtale_lib.effects import gain_between
from qtale_lib.measurements import ROUTED_METHODS, Answers, Measurements, group_of
from qtale_lib.statistics import NOT_RUN, SHOWN, Run, estimate
from qtale_lib.studies import Study
from qtale_lib.sweep import Setting
from qtale_lib.tables import Table, number, with_interval

AIMS = "theta_aims"  # rules for θ beside the search; theirs is another question (theta_aims.py)
AWARE = "training.weight_bits"  # judged at the width that was trained for, the others at the fewest bits
COST = "training.rate_target"  # buys accuracy for FLOPs: notebook 08 compares its values, at equal FLOPs
EFFECTS = ("factor", "value", "default", "method", "bits", "R", "loss_R", "R_change",
           "effect", "low", "high", "tasks", "seeds")  # fmt: skip
LABELS = {
    "training.lambda1": "λ1",
    "training.lambda2": "λ2",
    "training.tau": "τ",
    "training.rate_target": "R target",
    "training.rate_loss": "rate loss",
    "training.weight_bits": "bits of weights in training",
    "routing.hidden": "router width",
    "quantization.calibration_texts": "texts of the quantizer",
    "calibration.questions": "questions of the θ search",
    "calibration.tolerance": "tolerance of the θ search",
    "calibration.objective": "objective of the θ search",
}


def label(factor: str) -> str:
    """A factor for readers."""
    return LABELS.get(factor, factor)


def file_name(factor: str) -> str:
    """Of a factor's picture."""
    return "sensitivity_" + factor.replace(".", "_")


def questions(study: Study) -> list[str]:
    """The factors whose values stand against a default."""
    return [factor for factor in study.plan.factors if factor != AIMS]


def rule_at(bits: int) -> str:
    """How θ is set at a bit width."""
    return "argmax" if bits == 16 else "searched"


def effects(study: Study) -> pd.DataFrame:
    """One row (EFFECTS) per factor, value (the default among them, in the order of the values), method and
    bit width that were run.

    effect: points of accuracy against the default, with its 95 % interval over seeds and questions (0, and
    no interval, for the default itself); R and loss_R: means over tasks and seeds; R_change against it.
    """
    rows = []
    for factor in questions(study):
        varied = [(s, store) for s, store in study.measured if s.factor == factor]
        for setting, store in [(None, study.own), *varied]:
            profile = varied[0][1].profile if setting is None else store.profile
            cells = [(m, b) for m in profile.methods if m in ROUTED_METHODS for b in profile.bits]
            rows += [row for cell in cells if (row := _row(study, factor, setting, store, *cell))]
    found = pd.DataFrame(rows, columns=list(EFFECTS))
    order = found.assign(place=found.factor.map(list(study.plan.factors).index), key=found.value.map(_place))
    return order.sort_values(["place", "key"], kind="stable")[list(EFFECTS)].reset_index(drop=True)


def _row(
    study: Study, factor: str, setting: Setting | None, store: Measurements, method: str, bits: int
) -> dict[str, Any] | None:
    """One value at one method and width; None where nothing was run. `setting`: None for the default."""
    own, here = (_answers(one, method, bits) for one in (study.own, store))
    if not here:
        return None
    ratio, loss_ratio = (np.mean([getattr(a, name) for a in here.values()]) for name in RATIOS)
    both = [cell for cell in here if cell in own]
    before = np.mean([own[cell].execution_ratio for cell in both]) if both else nan
    measured = None
    if setting is not None:
        measured = estimate([gain_between(*cell, here[cell], own[cell]) for cell in both])
    held = _value(study.profile if setting is None else setting.profile, factor)
    numbers = {name: getattr(measured, name, nan) for name in ("effect", "low", "high", "tasks", "seeds")}
    numbers |= {"effect": 0.0} if setting is None else {}
    return {
        "factor": factor, "value": held, "default": setting is None, "method": method, "bits": bits,
        "R": ratio, "loss_R": loss_ratio,
        "R_change": np.mean([here[cell].execution_ratio for cell in both]) - before if both else nan,
        **numbers,
    }  # fmt: skip


RATIOS = ("execution_ratio", "loss_ratio")


def _answers(store: Measurements, method: str, bits: int) -> dict[tuple[str, int], Answers]:
    """By task and seed, of the tasks with choices."""
    cells = store.answers.items()
    rule = rule_at(bits)
    return {
        (task, seed): answers
        for (task, m, seed, b, r), answers in cells
        if (m, b, r) == (method, bits, rule) and group_of(task) != "alpaca"
    }


def _value(profile: Any, factor: str) -> str:
    """What a profile has for a factor, for readers: "0.5", "2", "mean"."""
    held = functools.reduce(getattr, factor.split("."), profile)
    return f"{held:g}" if isinstance(held, float) else str(held)


def _place(value: str) -> tuple[float, str]:
    """Numbers by size, words after them."""
    try:
        return float(value), ""
    except ValueError:
        return inf, value


# Claims: that no value tried gains a point on the default.


def claims_of(study: Study) -> list[Claim]:
    """One per value tried, but for COST and AIMS: at judged_bits, mean over the methods that have it."""
    return [
        _claim(study, setting, store)
        for setting, store in study.measured
        if setting.factor not in (None, COST, AIMS)
    ]


def judged_bits(setting: Setting) -> int:
    """The width at which a value is judged: what it was trained for (AWARE), else the fewest bits."""
    return setting.value if setting.factor == AWARE else min(setting.profile.bits)


def _claim(study: Study, setting: Setting, store: Measurements) -> Claim:
    metric, bits = stated().metrics["csqa"], judged_bits(setting)
    methods = [method for method in store.profile.methods if method in ROUTED_METHODS]
    names, own = " and ".join(paper.METHODS[m] for m in methods), _value(study.profile, setting.factor)
    tried = f"{label(setting.factor)} {_value(setting.profile, setting.factor)} for {own}"
    return Claim(
        id=f"S {label(setting.factor)} {_value(setting.profile, setting.factor)}",
        family="sensitivity",
        notebook="10",
        quote=f"{label(setting.factor)} = {own}",
        source=f"the default of profile {study.profile.extends}, ours",
        measured=f"{bits} bits, {names}: gain from {tried}, below {metric.smallest:g}",
        unit=metric.unit,
        runs=_runs(store, methods, bits),
        smallest=metric.smallest,
        group="csqa",
        high=metric.smallest,
    )


def _runs(store: Measurements, methods: list[str], bits: int) -> Callable[[Study], list[Run]]:
    """Gains over the default, one Run per task and seed: the mean over the methods."""

    def runs(study: Study) -> list[Run]:
        pairs = [(_answers(store, m, bits), _answers(study.own, m, bits)) for m in methods]
        cells = [cell for cell in pairs[0][0] if all(cell in side for pair in pairs for side in pair)]
        return [_mean([gain_between(*cell, here[cell], own[cell]) for here, own in pairs]) for cell in cells]

    return runs


def _mean(gains: list[Run]) -> Run:
    """The mean of gains of one task and seed on the same questions."""
    differences = np.mean([gain.differences for gain in gains], axis=0)
    return Run(gains[0].task, gains[0].seed, float(differences.mean()), differences, gains[0].shared)


def verdicts(study: Study, others: Sequence[Claim] = ()) -> pd.DataFrame:
    """One row per claim of claims_of, and of the family's others, judged as one family."""
    return judged(study, [*claims_of(study), *others])


# Tables.


def defaults_table(study: Study, found: pd.DataFrame) -> Table:
    """Which defaults the verdicts justify: a row per factor; `found`: verdicts, claims_of's first."""
    tried = [setting for setting, _ in study.measured if setting.factor not in (None, COST, AIMS)]
    frame = found.head(len(tried)).assign(
        factor=[setting.factor for setting in tried],
        value=[_value(setting.profile, setting.factor) for setting in tried],
    )
    frame = frame[frame.verdict != NOT_RUN]
    text = pd.DataFrame([
        {"setting": label(factor), "default": _value(study.profile, factor),
         "tried": ", ".join(part.value), "largest gain [95 %]": _largest(part), "the default is": _word(part)}
        for factor, part in frame.groupby("factor", sort=False)
    ])  # fmt: skip
    smallest = stated().metrics["csqa"].smallest
    notes = (
        f"Justified: of every value tried it is shown that it gains less than {smallest:g} point of accuracy "
        "(corrected over the family). Beaten: a value's interval lies wholly above that. Otherwise open.",
        "A gain may have been bought with a higher R: the table of effects has its change. The R target is "
        "judged in notebook 08, at equal FLOPs.",
    )
    columns = ["factor", "value", "effect", "low", "high", "p", "corrected", "power", "verdict"]
    caption = f"Defaults that the study justifies, study {study.profile.name}"
    return Table("sensitivity_defaults", caption, text, frame[columns], ("factor", "value"), notes)


def _largest(part: pd.DataFrame) -> str:
    known = part.dropna(subset="effect")
    if known.empty:
        return "–"
    row = known.loc[known.effect.idxmax()]
    return f"{row.value}: {with_interval(row.effect, row.low, row.high, sign=True)}"


def _word(part: pd.DataFrame) -> str:
    smallest = stated().metrics["csqa"].smallest
    better = part[(part.low > smallest) & part.p.notna()]
    if len(better):
        return f"beaten by {better.value[better.effect.idxmax()]}"
    return "justified" if (part.verdict == SHOWN).all() else "open"


def effects_table(study: Study, found: pd.DataFrame) -> Table:
    """Every value at every method and width, against the default; `found`: effects."""
    part = found[~found.default.astype(bool)]
    text = pd.DataFrame({
        "setting": part.factor.map(label), "value": part.value, "method": part.method.map(paper.METHODS),
        "bits": part.bits.astype(str),
        "gain [95 %]": [
            f"{number(r.effect, 1, sign=True)} [{number(r.low, 1)}, {number(r.high, 1)}]"
            for r in part.itertuples()
        ],
        "R": part.R.map(lambda value: number(value, 3)),
        "change of R": part.R_change.map(lambda value: number(value, 3, sign=True)),
    })  # fmt: skip
    notes = (
        f"Points of accuracy against the default, mean over {', '.join(study.profile.tasks)} and "
        f"{len(study.profile.seeds)} seed(s), on validation questions; in brackets the 95 % interval over "
        "seeds and questions. θ: 0.5 in 16 bits, the searched one below.",
    )
    keys = ("factor", "value", "method", "bits")
    caption = f"Each setting alone against the default, study {study.profile.name}"
    return Table("sensitivity_effects", caption, text, part, keys, notes)
