"""Table 4 from the run store: entropy loss x θ, the controls that the paper lacks, and the θ sweep."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.jobs import ROUTED, ablated_bits, fixed_theta, is_found
from qtale_lib.measurements import Measurements, group_of
from qtale_lib.results import ERRORS, OTHER_MODEL, cell_text, error_of_mean, in_percent, over_seeds, signed
from qtale_lib.tables import Table, number, with_errors

ABLATION_METHODS = {"dllm": "no", "qtale": "yes"}  # entropy loss?
ABLATION_RULES = {"argmax": "0.5", "searched": "adjust", "zero": "→ 0"}
ABLATION_NUMBERS = ("value", "sampling", "spread", "execution_ratio", "theta_value",
                    "execution_ratio_spread", "theta_value_spread")  # fmt: skip


def ablation_cells(store: Measurements, bits: Iterable[int]) -> pd.DataFrame:
    """Tidy: bits, entropy_loss, theta, group, value, its errors, execution_ratio and theta_value (means).

    The θ of a sweep are no part of it: they have no name among ABLATION_RULES.
    """
    frame, keys = store.evaluations, ["bits", "entropy_loss", "theta", "group"]
    if frame.empty:
        return pd.DataFrame(columns=[*keys, *ABLATION_NUMBERS])
    frame = in_percent(frame[frame.method.isin(ABLATION_METHODS) & frame.bits.isin(list(bits))])
    frame = frame.assign(
        entropy_loss=frame.method.map(ABLATION_METHODS),
        theta_value=frame.theta.astype(float),
        theta=frame.theta_rule.map(ABLATION_RULES),
        group=frame.task.map(group_of),
    )
    means = {name: (name, "mean") for name in ("value", "execution_ratio", "theta_value")}
    per_seed = frame.groupby([*keys, "seed"]).agg(**means, sampling=("sampling", error_of_mean)).reset_index()
    seeds = per_seed.groupby(keys)[["execution_ratio", "theta_value"]]
    ratios = seeds.mean().join(seeds.std().add_suffix("_spread")).reset_index()
    return over_seeds(per_seed, keys).merge(ratios, on=keys)[[*keys, *ABLATION_NUMBERS]]


def ablation_table(store: Measurements) -> Table:
    """Table 4 in its layout (entropy x theta), with the controls theta -> 0, 16 and 3 bits."""
    widths = ablated_bits(store.profile)
    cells = ablation_cells(store, widths)
    held = cells.set_index(["bits", "entropy_loss", "theta", "group"])
    text = pd.DataFrame([
        _ablation_row(held, bits, entropy, theta)
        for bits in widths for entropy in ABLATION_METHODS.values() for theta in ABLATION_RULES.values()
    ])  # fmt: skip
    notes = (
        *ERRORS,
        "R: executed share of all (token, layer) pairs. 4 bits with θ 0.5 and adjust: as in the paper. "
        "Controls that it lacks: 16 bits (θ adjusted without quantization; QTALE without quantization), "
        "θ → 0 (every layer runs), and all of it at 3 bits (D-LLM with its θ adjusted: no entropy, adjust).",
        "Adjusted θ: mean over tasks of the θ searched on calibration questions.",
    )
    keys = ("bits", "entropy_loss", "theta", "group")
    return Table("table_4_ablation", f"Ablation, profile {store.profile.name}", text, cells, keys, notes)


def _ablation_row(held: pd.DataFrame, bits: int, entropy: str, theta: str) -> dict[str, str]:
    row, adjusted = {"bits": str(bits), "entropy loss": entropy, "θ": theta}, []
    for group in paper.GROUPS:
        key = (bits, entropy, theta, group)
        ratio, used = held.loc[key, ["execution_ratio", "theta_value"]] if key in held.index else (None, None)
        label, metric = paper.TASK_LABELS[group], "PPL" if group == "alpaca" else "acc."
        row |= {f"{label} {metric}": cell_text(held, *key), f"{label} R": number(ratio)}
        adjusted.append(number(used))
    return {**row, "adjusted θ": " / ".join(adjusted) if theta == "adjust" else "–"}


def sweep_table(store: Measurements) -> Table:
    """The profile's θ sweep on test questions: score and R by method, bits and θ; no rows without a sweep."""
    frame = _sweep_frame(store) if store.profile.theta_sweep else pd.DataFrame(columns=SWEEP)
    text = pd.DataFrame({
        "bits": frame.bits.astype(str), "method": frame.method.map(paper.METHODS),
        "θ": frame.theta.map("{:g}".format), "task": frame.group.map(paper.TASK_LABELS),
        "score": [with_errors(row.score, None, row.score_spread) for row in frame.itertuples()],
        "R": [with_errors(row.R, None, row.R_spread, digits=3) for row in frame.itertuples()],
    })  # fmt: skip
    notes = (
        "Mean over tasks and seeds on test questions: (expected) accuracy in percent, or PPL. In brackets: "
        "the standard deviation over seeds.",
        "The comparison at equal R interpolates these between θ = 0.5 and the lowest θ of the sweep.",
        *(() if store.profile.theta_sweep else ("This profile has no sweep (theta_sweep).",)),
    )
    keys = ("bits", "method", "group", "theta")
    return Table("table_4_sweep", f"θ sweep, profile {store.profile.name}", text, frame, keys, notes)


SWEEP = ("bits", "method", "group", "theta", "score", "score_spread", "R", "R_spread")


def _sweep_frame(store: Measurements) -> pd.DataFrame:
    rows = [
        {"bits": bits, "method": method, "group": group_of(task), "theta": fixed_theta(rule), "task": task,
         "seed": seed, "score": answer.mean, "R": answer.execution_ratio}
        for (task, method, seed, bits, rule), answer in store.answers.items()
        if method in ROUTED and rule != "zero" and not is_found(rule) and bits in ablated_bits(store.profile)
    ]  # fmt: skip
    keys = list(SWEEP[:4])
    frame = pd.DataFrame(rows, columns=[*keys, "task", "seed", "score", "R"])
    ppl = frame.group == "alpaca"
    frame["score"] = frame.score.where(~ppl, np.exp(frame.score.astype(float) / 100))
    per_seed = frame.groupby([*keys, "seed"])[["score", "R"]].mean().groupby(keys)
    spread = per_seed.std().add_suffix("_spread")
    return per_seed.mean().join(spread).reset_index()[list(SWEEP)]


def ablation_beside_paper(store: Measurements) -> Table:
    """Table 4: ours | the paper's two models | difference, for accuracy or PPL and for R."""
    ours = ablation_cells(store, [4])[["entropy_loss", "theta", "group", "value", "execution_ratio"]]
    printed = paper.ablation().rename(columns={"task": "group", "execution_ratio": "R", "value": "paper"})
    both = printed.merge(ours, "left", on=["entropy_loss", "theta", "group"])
    both = both.assign(difference=both.value - both.paper, R_difference=both.execution_ratio - both.R)
    text = pd.DataFrame({
        "model": both.model, "entropy loss": both.entropy_loss, "θ": both.theta,
        "task": both.group.map(paper.TASK_LABELS), "paper": both.paper.map(number),
        "ours": both.value.map(number), "difference": both.difference.map(signed),
        "paper's R": both.R.map(number), "our R": both.execution_ratio.map(number),
        "difference in R": both.R_difference.map(signed),
    })  # fmt: skip
    keys = ("model", "entropy_loss", "theta", "group")
    notes = (paper.SOURCE, OTHER_MODEL, "Ours with errors: table_4_ablation.")
    return Table("table_4_beside", "Table 4 of the paper (4 bits) beside ours", text, both, keys, notes)
