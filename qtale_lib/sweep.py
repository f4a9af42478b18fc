"""A sweep of hyperparameters before a recipe is frozen: `python -m qtale_lib sweep`.

A sweep's YAML is a profile with `factors`: each is varied alone, the other settings staying as the profile
has them but for those that `alongside` sets with it. A recipe's must say `evaluated: validation`: what is
chosen by it is tested on facts that the choice has not seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import AfterValidator, Field, ValidationError

from qtale_lib import paper
from qtale_lib.config import Profile, load_profile
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.measurements import USUAL_RULE
from qtale_lib.pool import Outcome
from qtale_lib.profile_files import read_profile, shown
from qtale_lib.tables import Table, number

RECIPE = Path(__file__).parent / "sweeps" / "recipe.yaml"
FROZEN = "tiny"  # the profile that has what the shipped sweep chose
SWEPT = ("base", "max_steps", "training", "lora", "routing")
MEASURES = ("acc", "expected_acc", "open_acc", "nll", "loss_ratio")


def _lists(factors: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(values, list) and values for values in factors.values()):
        raise ValueError("a factor without a list of values")
    return factors


class Sweep(Profile):
    """A profile, and for dotted names of its settings ("training.lr") the values to try beside its own.

    alongside: for some of these names, other settings that hold while it is varied, such as `methods` (those
    that have it) or `theta_sweep`.
    """

    factors: Annotated[
        dict[str, Any],
        AfterValidator(_lists),
        Field(min_length=1, description="a mapping of settings, such as training.lr, to lists of values"),
    ]
    alongside: Annotated[
        dict[str, dict[str, Any]],
        Field(
            default_factory=dict,
            description="a mapping of some of the factors to further settings while they are varied",
        ),
    ]


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: the profile, and by which factor it differs (None: the sweep's own settings)."""

    factor: str | None
    value: Any
    profile: Profile


def load_sweep(path: str | Path = RECIPE) -> Sweep:
    """The sweep of a YAML file; UserError as for profiles, and for a sweep that would look at test facts."""
    sweep, sweep._settings = read_profile(Sweep, path, {})
    if sweep.evaluated == "test":
        raise sweep.refusal("evaluated", "must be validation in a sweep: test facts are for what it chooses")
    return sweep


def settings(sweep: Sweep) -> list[Setting]:
    """The sweep's own settings first, then one Setting per factor and value.

    Raises:
        UserError: for a factor that is no setting, and for a value that it cannot have.
    """
    if strange := set(sweep.alongside) - set(sweep.factors):
        raise sweep.refusal("alongside", f"names {min(strange)}, which is not varied")
    own = sweep.model_dump(mode="json", include=set(Profile.model_fields))
    found = [Setting(None, None, Profile.model_validate(own))]
    for factor, values in sweep.factors.items():
        for value in values:
            changed = _changed(own, factor, value, sweep)
            if changed not in [setting.profile for setting in found]:
                found.append(Setting(factor, value, changed))
    return found


def _changed(own: dict[str, Any], factor: str, value: Any, sweep: Sweep) -> Profile:
    *sections, last = factor.split(".")
    try:
        held = functools.reduce(lambda section, name: section[name], [*sections, last], own)
    except (KeyError, TypeError):
        raise sweep.refusal("factors", f"names {factor}, which is no setting of a profile") from None
    changed = {last: value}
    for name in reversed(sections):
        changed = {name: changed}
    try:
        return Profile.model_validate(_merged(_merged(own, sweep.alongside.get(factor, {})), changed))
    except ValidationError:
        complaint = f"gives {factor} the value {shown(value)}, which it cannot have (it has {shown(held)})"
        raise sweep.refusal("factors", complaint) from None


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    inner = {k: v for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **{k: _merged(old[k], v) for k, v in inner.items()}}


def chosen(profile: Any) -> str:
    """How a profile's recipe was chosen, for readers of its tables."""
    frozen = load_profile(FROZEN)
    if any(getattr(profile, part, None) != getattr(frozen, part) for part in SWEPT):
        return "the profile's own; no sweep of this suite chose it"
    tried = len(settings(load_sweep()))
    return (
        f"for all methods alike, chosen on validation questions among {tried} settings (sweeps/recipe.yaml)"
    )


def compute(sweep: Sweep, root: Path | None = None) -> list[Outcome]:
    """Compute what is missing, setting by setting; all of them share one store, which knows what is equal."""
    outcomes = []
    for setting in settings(sweep):
        outcomes += Lab(setting.profile, root).compute(all_jobs(setting.profile))
    return outcomes


def frame(sweep: Sweep, root: Path | None = None) -> pd.DataFrame:
    """One row per setting and method: factor, value, method, tasks, and the means of MEASURES over tasks and
    seeds at θ = 0.5 in 16 bits (accuracies and ratios as shares).
    """
    rows = []
    for setting in settings(sweep):
        evaluations = Lab(setting.profile, root).evaluations()
        if evaluations.empty:
            continue
        usual = [rule == USUAL_RULE[m] for rule, m in evaluations[["theta_rule", "method"]].values]
        part = evaluations[usual].reindex(columns=["method", "task", *MEASURES])
        for method, own in part.groupby("method", sort=False):
            label = {"factor": setting.factor, "value": shown(setting.value), "method": method}
            means = own[list(MEASURES)].astype(float).mean()
            rows.append({**label, "tasks": own.task.nunique(), **means})
    return pd.DataFrame(rows, columns=["factor", "value", "method", "tasks", *MEASURES])


def table(sweep: Sweep, root: Path | None = None) -> Table:
    """Validation accuracy by setting and method, loss-R in brackets, the best of each method marked."""
    found, tried = frame(sweep, root), settings(sweep)
    held = found.set_index(["factor", "value", "method"])
    best = found.groupby("method").expected_acc.max().to_dict()
    text = pd.DataFrame([_row(held, best, setting, sweep) for setting in tried])
    target = sweep.training.rate_target
    notes = (
        f"{len(tried)} settings tried, each alone against the first row; {', '.join(sweep.tasks)}; "
        f"{len(sweep.seeds)} seed(s); validation questions.",
        "Accuracy in percent, its expectation over the draw of wrong choices, 16 bits, θ = 0.5; in brackets "
        f"loss-R, whose target is {target:g}. * the best of a method.",
    )
    return Table("sweep", f"Sweep {sweep.name}", text, found, ("factor", "value", "method"), notes)


def _row(held: pd.DataFrame, best: dict[str, float], setting: Setting, sweep: Sweep) -> dict[str, str]:
    label = {"setting": f"{setting.factor} = {shown(setting.value)}" if setting.factor else "as it is"}
    cells = {}
    for method in sweep.methods:
        key = (setting.factor, shown(setting.value), method)
        cells[paper.METHODS[method]] = (
            _cell(held.loc[[key]].iloc[0], best[method]) if key in held.index else ""
        )
    return {**label, **cells}


def _cell(row: pd.Series, best: float) -> str:
    ratio = "" if row.loss_ratio == 1 else f" ({number(row.loss_ratio)})"
    return f"{number(100 * row.expected_acc, 1)}{'*' if row.expected_acc == best else ''}{ratio}"
