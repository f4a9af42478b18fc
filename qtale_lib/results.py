"""Tables 1 and 2 from the run store, the paper's numbers beside; the setting.

A cell that was not run says so. ± is the sampling error over questions; with two seeds or more the spread
over seeds (trial error) stands in brackets behind it.
"""

from __future__ import annotations

from math import nan, sqrt
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.effects import contrast_runs, gain_sign, paper_rule
from qtale_lib.measurements import Measurements, group_of
from qtale_lib.provenance import device_name, git_commit, versions
from qtale_lib.statistics import estimate
from qtale_lib.sweep import chosen
from qtale_lib.tables import NOT_RUN, Table, beside, number, with_errors

ERRORS = (
    "± is the standard error over questions (sampling error), for PPL over responses. It is lm-eval's, which "
    "takes questions as independent; some share facts, which the intervals of the claims allow for.",
    "In brackets: the standard deviation over seeds (trial error), where there are two or more.",
)
RULES_NOTE = (
    "QTALE stands at its searched θ when quantized and at θ = 0.5 in 16 bits, D-LLM at arg max (θ = 0.5)."
)
NOISY_NOTE = (
    "Full, noisy (a control that the paper lacks): trained with layers bypassed at random as by D-LLM's "
    "routers at their start, quantized and evaluated with every layer run."
)
OTHER_MODEL = (
    "The paper's models are other models: absolute differences say how far apart they are, not who is right."
)


def setting(store: Measurements) -> Table:
    """Versions, device, git commit and hashes: the first output of every notebook."""
    base = store.lab.base()
    rows = {
        "profile": f"{store.profile.name} (config {store.profile.digest()})",
        "base model": f"{base['name']} (sha256 {base['sha256'][:16]})",
        "parameters": f"{base['parameters']['total']:,}",
        "tasks": ", ".join(store.profile.tasks),
        "methods; bits; seeds": "; ".join(
            _listed(store.profile, name) for name in ("methods", "bits", "seeds")
        ),
        "quantizer": quantizer(store.profile),
        "recipe": chosen(store.profile),
        "git commit": git_commit() or "no checkout",
        "device": device_name(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    text = pd.DataFrame(rows.items(), columns=["setting", "value"])
    return Table("setting", "Setting", text, text, ("setting",))


def quantizer(profile: Any) -> str:
    """What quantizes, and in which groups: "AWQ (native), 128 weights a group" as in the paper, or so."""
    how, size = profile.quantization, profile.group_size
    groups = f"{size} weights a group" if size > 0 else "one group per row"
    paper_has = "" if size == paper.GROUP_SIZE else f" (the paper: {paper.GROUP_SIZE} weights)"
    return f"{how.method.upper()} ({how.backend}), {groups}{paper_has}"


def _listed(profile: Any, name: str) -> str:
    return ", ".join(map(str, getattr(profile, name)))


# Tables 1 and 2.


def accuracy_cells(store: Measurements) -> pd.DataFrame:
    """Tidy: bits, method, task (or "avg" over the CSQA tasks run), value, sampling, spread, seeds.

    Accuracies in percent. `sampling` is the standard error over questions, `spread` the deviation over seeds.
    """
    frame = store.evaluations
    if frame.empty:
        return pd.DataFrame(columns=["bits", "method", "task", "value", "sampling", "spread", "seeds"])
    frame = in_percent(frame[_by_paper_rule(frame)])
    csqa = frame[frame.task.map(group_of) == "csqa"]
    keys = ["bits", "method", "seed"]
    average = (
        csqa.groupby(keys).agg(value=("value", "mean"), sampling=("sampling", error_of_mean)).reset_index()
    )
    frame = pd.concat([frame, average.assign(task="avg")])
    frame["task"] = frame.task.replace({"alpaca": "alpaca_ppl"})
    return over_seeds(frame, ["bits", "method", "task"])


def _by_paper_rule(frame: pd.DataFrame) -> np.ndarray:
    """Which evaluations, bool [rows], have θ set as in Tables 1 and 2."""
    cells = frame[["theta_rule", "method", "bits"]].values
    return np.array([rule == paper_rule(method, bits) for rule, method, bits in cells], dtype=bool)


def in_percent(frame: pd.DataFrame) -> pd.DataFrame:
    """`value` and `sampling`: accuracy in percent or PPL, and its standard error."""
    scale = np.where(frame.metric == "acc", 100.0, 1.0)
    values = np.where(frame.metric == "acc", frame.get("acc", np.nan), frame.get("ppl", np.nan)).astype(float)
    return frame.assign(value=values * scale, sampling=frame.stderr.astype(float) * scale)


def error_of_mean(errors: pd.Series) -> float:
    """Standard error of a mean of independent values with these standard errors."""
    return sqrt(float((errors**2).sum())) / len(errors)


def over_seeds(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean over seeds; the sampling error is a seed's (all seeds answer the same questions)."""
    grouped = frame.groupby(keys, sort=False)
    return grouped.agg(
        value=("value", "mean"),
        sampling=("sampling", "mean"),
        spread=("value", "std"),
        seeds=("value", "size"),
    ).reset_index()


def accuracy_table(store: Measurements) -> Table:
    """Ours in the layout of Tables 1 and 2: rows bits x method, columns tasks."""
    cells = accuracy_cells(store)
    held = cells.set_index(["bits", "method", "task"])
    rows = [(bits, method) for bits in store.profile.bits for method in store.profile.methods]
    text = pd.DataFrame([_accuracy_row(held, bits, method) for bits, method in rows])
    caption = f"Accuracy (%) and PPL, profile {store.profile.name}"
    return Table(
        "table_1_2_accuracy",
        caption,
        text,
        cells,
        ("bits", "method", "task"),
        (
            f"Below 16 bits: {quantizer(store.profile)}. Recipe: {chosen(store.profile)}.",
            *ERRORS,
            RULES_NOTE,
            *((NOISY_NOTE,) if "noisy_full" in store.profile.methods else ()),
            *_partial(store),
        ),
    )


def _accuracy_row(held: pd.DataFrame, bits: int, method: str) -> dict[str, str]:
    row = {"bits": str(bits), "method": paper.METHODS[method], "θ": _theta_text(paper_rule(method, bits))}
    cells = {paper.TASK_LABELS[task]: cell_text(held, bits, method, task) for task in paper.ACCURACY_COLUMNS}
    return {**row, **cells}


def cell_text(held: pd.DataFrame, *key: Any) -> str:
    """The value at a key with its errors; accuracies with one decimal, as these allow, PPL with two."""
    if key not in held.index:
        return NOT_RUN
    digits = 2 if str(key[-1]).startswith("alpaca") else 1
    return with_errors(*held.loc[key, ["value", "sampling", "spread"]], digits=digits)


def _theta_text(rule: str) -> str:
    return {"none": "–", "argmax": "0.5", "searched": "searched", "zero": "→ 0"}[rule]


def _partial(store: Measurements) -> tuple[str, ...]:
    missing = [paper.TASK_LABELS[task] for task in paper.CSQA if task not in store.profile.tasks]
    note = f"Our CSQA average is over the tasks run; not run in this profile: {', '.join(missing)}."
    return (note,) if missing else ()


def accuracy_beside_paper(store: Measurements, table: str) -> Table:
    """The paper's Table 1 or 2 ("table1", "table2"); the frame: printed | ours | errors | difference."""
    printed = paper.accuracy().query("table == @table").rename(columns={"value": "paper"})
    both = printed.merge(accuracy_cells(store), "left", on=["bits", "method", "task"])
    both = both.rename(columns={"value": "ours"}).assign(difference=lambda f: f.ours - f.paper)
    both = both.drop(columns=["table", "model"])
    wide = {paper.TASK_LABELS[task]: beside(part) for task, part in both.groupby("task", sort=False)}
    rows = both[both.task == "avg"]
    labels = {"bits": rows.bits.astype(str).values, "method": rows.method.map(paper.METHODS).values}
    caption = f"Table {table[-1]} of the paper ({paper.MODELS[table]}), in brackets ours − the paper's"
    return Table(
        {"table1": "table_1_beside", "table2": "table_2_beside"}[table],
        caption,
        pd.DataFrame({**labels, **wide}),
        both,
        ("bits", "method", "task"),
        (paper.SOURCE, OTHER_MODEL, "Ours with their errors: table_1_2_accuracy.", *_partial(store)),
    )


METRICS = {
    "acc": "sampled",
    "expected_acc": "expected",
    "open_acc": "open",
    "nll": "NLL of the choices",
}


def metrics_table(store: Measurements) -> Table:
    """Accuracy measured in further ways (CSQA: mean over the tasks run): rows bits x tasks x method."""
    means = metrics(store)
    text = pd.DataFrame([
        {"bits": str(row.bits), "tasks": paper.TASK_LABELS[row.group], "method": paper.METHODS[row.method],
         "θ": _theta_text(paper_rule(row.method, row.bits)),
         **{label: with_errors(row[name], None, row[f"{name}_spread"], 2 if name == "nll" else 1)
            for name, label in METRICS.items()}}
        for _, row in means.iterrows()
    ])  # fmt: skip
    notes = (
        "Sampled: against the choices that the question came with. Expected: its expectation over that draw. "
        "Open: against every value that a choice could have been. NLL: −log of the right choice's share.",
        "Expected and open leave out the luck of the draw; they are known where the choices were drawn.",
        ERRORS[1],
        RULES_NOTE,
    )
    caption = "Accuracy (%; CSQA: mean over the tasks run) in further ways"
    return Table("table_1_2_metrics", caption, text, means, ("bits", "group", "method"), notes)


def metrics(store: Measurements) -> pd.DataFrame:
    """Tidy: bits, group (csqa, mmlu), method, METRICS (means over tasks and seeds), each with `_spread`."""
    frame = store.evaluations.reindex(columns=["bits", "task", "method", "seed", "theta_rule", *METRICS])
    frame = frame[_by_paper_rule(frame)].assign(group=lambda f: f.task.map(group_of))
    frame = frame[frame.group != "alpaca"]
    values = frame[list(METRICS)].astype(float) * [1.0 if name == "nll" else 100.0 for name in METRICS]
    frame = frame.assign(**values)
    keys = ["bits", "group", "method"]
    seeds = frame.groupby([*keys, "seed"], sort=False)[list(METRICS)].mean().groupby(keys, sort=False)
    both = seeds.mean().join(seeds.std().add_suffix("_spread")).reset_index()
    return both.sort_values(["bits", "group"], ascending=[False, True], kind="stable", ignore_index=True)


def changes_table(store: Measurements) -> Table:
    """What quantization changes from a method's own 16-bit value, ours beside both of the paper's models."""
    printed = paper.accuracy()
    sources = {"ours": changes(store), **{m: _printed_changes(part) for m, part in printed.groupby("model")}}
    frame = pd.concat([part.assign(source=name) for name, part in sources.items()])
    held = frame.set_index(["source", "bits", "method", "task"])
    rows = [
        (b, t, m)
        for b in (4, 3, 2)
        for t in CHANGED
        for m in paper.METHODS
        if ("ours", b, m, t) in held.index
    ]
    text = pd.DataFrame([
        {"bits": str(bits), "task": paper.TASK_LABELS[task], "method": paper.METHODS[method],
         **{source: _change_text(held, source, bits, method, task) for source in sources}}
        for bits, task, method in rows
    ])  # fmt: skip
    notes = (
        "Accuracy points; for PPL the change in percent (100 x difference of log PPL). Ours: of the expected "
        "accuracy where that is known, as in the claims.",
        "± is the standard error over questions (sampling error) from answers paired question by question, "
        "those that share facts moving together.",
        ERRORS[1],
        RULES_NOTE,
    )
    caption = "Change from 16 bits, ours beside the paper's models"
    keys = ("source", "bits", "method", "task")
    return Table("table_1_2_changes", caption, text, frame, keys, notes)


def _change_text(held: pd.DataFrame, *key: Any) -> str:
    return with_errors(*held.loc[key, CHANGE], sign=True) if key in held.index else "–"


def signed(value: float | None) -> str:
    """A difference for readers; a dash where there is none."""
    return "–" if value is None else number(value, sign=True)


CHANGED = {"avg": "csqa", "mmlu": "mmlu", "alpaca_ppl": "alpaca"}
CHANGE = ["change", "change_sampling", "change_spread"]


def changes(store: Measurements) -> pd.DataFrame:
    """Ours, tidy: bits, method, task, change (mean over tasks and seeds), change_sampling, change_spread."""
    cells = [(b, m, t) for b in store.profile.bits if b < 16 for m in store.profile.methods for t in CHANGED]
    rows = [(*cell, *_change(store, *cell)) for cell in cells]
    return pd.DataFrame(rows, columns=["bits", "method", "task", *CHANGE]).dropna(subset="change")


def _change(store: Measurements, bits: int, method: str, task: str) -> tuple[float, float, float]:
    contrast = {(method, bits, paper_rule(method, bits)): 1.0, (method, 16, paper_rule(method, 16)): -1.0}
    runs = contrast_runs(store, contrast, CHANGED[task], "score")
    if not runs:
        return nan, nan, nan
    gain, seeds = estimate(runs), pd.Series([run.effect for run in runs]).groupby([run.seed for run in runs])
    sign = gain_sign(CHANGED[task])
    return sign * gain.effect, gain.sampling_error, seeds.mean().std()


def _printed_changes(cells: pd.DataFrame) -> pd.DataFrame:
    cells = cells[cells.task.isin(CHANGED)]
    ppl = cells.task == "alpaca_ppl"
    cells = cells.assign(value=np.where(ppl, 100 * np.log(cells.value), cells.value))
    whole = cells[cells.bits == 16].set_index(["method", "task"]).value.rename("whole")
    cells = cells[cells.bits < 16].join(whole, on=["method", "task"])
    return cells.assign(change=cells.value - cells.whole)[["bits", "method", "task", "change"]]


def rows_table(store: Measurements) -> Table:
    """How many rows of each split were used, and how many over-long ones left out or cut."""
    rows = [*_train_rows(store), *_search_rows(store), *_test_rows(store)]
    frame = pd.DataFrame(rows, columns=["task", "split", *ROWS, "facts"])
    text = frame.map(
        lambda value: "–" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
    )
    text["task"] = frame.task.map(paper.TASK_LABELS)
    notes = (
        "Dropped, cut: too long for the profile's max_length. Facts: distinct facts that the rows rest on.",
    )
    return Table("rows", "Rows by split", text, frame, ("task", "split"), notes)


ROWS = ("used", "dropped", "cut")


def _train_rows(store: Measurements) -> list[dict[str, Any]]:
    runs = store.lab.finetunes()
    runs = runs.drop_duplicates("task") if len(runs) else runs
    specs = [{"task": run.task, "method": run.method, "seed": run.seed} for run in runs.itertuples()]
    values = [store.lab.result("finetune", **spec)["value"] for spec in specs]
    return [
        {"task": spec["task"], "split": "train", **_rows_and_facts(store, spec["task"], "train", value)}
        for spec, value in zip(specs, values, strict=True)
    ]


def _search_rows(store: Measurements) -> list[dict[str, Any]]:
    specs = store.lab.thresholds()
    if specs.empty:
        return []
    specs = specs.drop_duplicates("task")[["task", "method", "seed", "bits"]].to_dict("records")
    values = [store.lab.result("threshold", **spec)["value"] for spec in specs]
    return [
        {"task": spec["task"], "split": "θ search",
         **_rows_and_facts(store, spec["task"], "calibration", value)}
        for spec, value in zip(specs, values, strict=True)
    ]  # fmt: skip


def _rows_and_facts(store: Measurements, task: str, split: str, value: dict[str, Any]) -> dict[str, Any]:
    """A result's counts of rows, and of their facts: None without any, or where rows were left out."""
    facts = {fact for example in store.lab.examples(task, split) for fact in example.facts}
    return {**value["rows"], "facts": None if value["rows"]["dropped"] else len(facts) or None}


def _test_rows(store: Measurements) -> list[dict[str, Any]]:
    cells = {cell[0]: cell for cell in store.answers}
    rows = []
    for task, (_, method, seed, bits, rule) in cells.items():
        spec = {"task": task, "method": method, "seed": seed, "bits": bits, "theta": rule}
        value = store.lab.result("evaluation", **spec)["value"]
        facts = len({fact for names in value["facts"] for fact in names})
        rows.append({"task": task, "split": store.profile.evaluated, **value["rows"], "facts": facts or None})
    return rows
