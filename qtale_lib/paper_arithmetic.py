"""What the paper's printed numbers say of one another: those that others determine, recomputed.

A number of Tables 1-4 may follow from other printed numbers (an average from its columns, a relative from two
GFLOPs, a row of the ablation from the same row of another table), or from a model's public config (bytes and
FLOPs). Each is recomputed and held against what is printed, within what rounding leaves open. Nothing is
measured here, and a difference has no author: our copy of the tables came through text extraction of the PDF.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from qtale_lib import paper
from qtale_lib.efficiency import GIB, GIGA, LLAMA2_7B, LLAMA31_8B, Shape, flops_per_token, model_bytes
from qtale_lib.paper import CSQA, GROUP_SIZE, METHODS, MODELS, TASK_LABELS
from qtale_lib.tables import Table, number, of_numbers

SHAPES = {"LLaMA2-7B": LLAMA2_7B, "LLaMA3.1-8B": LLAMA31_8B}
TABLES = dict(zip(MODELS.values(), ("Table 1", "Table 2"), strict=True))
GAP = 0.5  # points: "the gap to quantization-only models kept below 0.5%" (abstract)
FLOAT = 1e-9  # what adding printed decimals in binary may be off by


PLACE = ("table", "model", "bits", "row", "column")


class Check(NamedTuple):
    """A printed number and the same recomputed; they agree if rounding alone may part them."""

    table: str
    model: str
    bits: int
    row: str
    column: str
    printed: float
    recomputed: float
    agrees: bool
    source: str


def checks() -> pd.DataFrame:
    """Every printed number that others determine: the fields of Check, and difference."""
    parts = (_averages, _sizes, _full_flops, _relatives, _ablation_scores, _ablation_ratios, _gaps)
    frame = pd.DataFrame([check for part in parts for check in part()])
    return frame.assign(difference=frame.recomputed - frame.printed)


def _same(printed: float, recomputed: float, slack: float) -> bool:
    """Whether they are no further apart than `slack`, what the rounding of both leaves open."""
    return bool(abs(recomputed - printed) <= slack + FLOAT)


def _averages() -> Iterator[Check]:
    """Tables 1 and 2: the mean of the seven commonsense columns."""
    keys = ["model", "bits", "method"]
    wide = paper.accuracy().pivot_table(index=keys, columns="task", values="value", sort=False)
    for (model, bits, method), row in wide.iterrows():
        mean = float(row[list(CSQA)].mean())
        yield Check(TABLES[model], model, bits, METHODS[method], "CSQA avg.", row.avg, mean,
                    _same(row.avg, mean, 0.01), "mean of the seven columns")  # fmt: skip


def _sizes() -> Iterator[Check]:
    """Table 3: GiB from the config, counted in the way that comes nearest; printed once for all methods."""
    frame = sizes()
    for (model, bits), ways in frame.groupby(["model", "bits"], sort=False):
        nearest = ways.loc[(ways.recomputed - ways.printed).abs().idxmin()]
        yield Check("Table 3", model, bits, "all methods", "model size", nearest.printed, nearest.recomputed,
                    bool(nearest.agrees), f"config; {nearest.counted}")  # fmt: skip


def _full_flops() -> Iterator[Check]:
    """Table 3: Full's GFLOPs from the config, and its relative of 1."""
    for row in paper.efficiency().query("method == 'full'").itertuples():
        where = ("Table 3", row.model, row.bits, "Full")
        task, counted = TASK_LABELS[row.task], full_gflops(row.model)
        yield Check(*where, f"{task} GFLOPs", row.gflops, counted, _same(row.gflops, counted, 0.05),
                    f"config; {HOW[row.model]}")  # fmt: skip
        yield Check(*where, f"{task} relative", row.relative, 1.0, row.relative == 1, "by itself")


def _relatives() -> Iterator[Check]:
    """Table 3: the other methods' relatives, printed GFLOPs over Full's before rounding."""
    for row in paper.efficiency().query("method != 'full'").itertuples():
        full = full_gflops(row.model)
        agrees = _same(row.relative, row.gflops / full, 0.005 + 0.005 / full)
        yield Check("Table 3", row.model, row.bits, METHODS[row.method], f"{TASK_LABELS[row.task]} relative",
                    row.relative, row.gflops / full, agrees,
                    "printed GFLOPs over Full's before rounding")  # fmt: skip


def _ablation_scores() -> Iterator[Check]:
    """Table 4: D-LLM at θ 0.5 and QTALE at its adjusted θ stand in Tables 1 and 2 too."""
    for row, method in _repeated():
        task = {"csqa": "avg", "alpaca": "alpaca_ppl"}.get(row.task, row.task)
        same = paper.printed(row.model, 4, method, task)
        yield Check("Table 4", row.model, 4, METHODS[method], f"{TASK_LABELS[row.task]} score", row.value,
                    same, same == row.value, TABLES[row.model])  # fmt: skip


def _ablation_ratios() -> Iterator[Check]:
    """Table 4: R_avg of the same rows is their relative FLOPs in Table 3, the layers being all alike."""
    relative = paper.efficiency().query("bits == 4").set_index(["model", "method", "task"]).relative
    for row, method in _repeated():
        same = float(relative[row.model, method, row.task])
        yield Check("Table 4", row.model, 4, METHODS[method], f"{TASK_LABELS[row.task]} R_avg",
                    row.execution_ratio, same, _same(row.execution_ratio, same, 0.01),
                    "relative FLOPs in Table 3")  # fmt: skip


def _repeated() -> Iterator[tuple[NamedTuple, str]]:
    for row in paper.ablation().itertuples():
        method = {("no", "0.5"): "dllm", ("yes", "adjust"): "qtale"}.get((row.entropy_loss, row.theta))
        if method:
            yield row, method


def _gaps() -> Iterator[Check]:
    """Abstract: at 4 bits, Full's printed average less QTALE's lies below GAP."""
    for model in MODELS.values():
        gap = round(paper.printed(model, 4, "full", "avg") - paper.printed(model, 4, "qtale", "avg"), 2)
        yield Check("abstract", model, 4, "Full − QTALE", "CSQA avg.", GAP, gap, gap < GAP,
                    f"{TABLES[model]}; “kept below 0.5%”")  # fmt: skip


# From the configs, in several ways.


HOW = {"LLaMA2-7B": "decoder layers", "LLaMA3.1-8B": "decoder layers, k and v as if d×d"}


def full_gflops(model: str) -> float:
    """GFLOPs a token of all decoder layers as the paper seems to count: grouped-query attention ignored."""
    return flops_per_token(_ungrouped(SHAPES[model]))["layers"] / GIGA


def _ungrouped(shape: Shape) -> Shape:
    return replace(shape, num_key_value_heads=shape.num_attention_heads)


def flops() -> pd.DataFrame:
    """Full's GFLOPs a token in Table 3, counted in several ways: WAYS."""
    rows = []
    for model, shape in SHAPES.items():
        counted = flops_per_token(shape)
        ways = {"decoder layers": counted["layers"], "decoder layers and lm_head": counted["total"]}
        if _ungrouped(shape) != shape:
            ways["decoder layers, k and v as if d×d"] = flops_per_token(_ungrouped(shape))["layers"]
        printed = _printed(model, 16, "gflops")
        rows += [(model, "GFLOP per token", 16, how, value / GIGA, printed) for how, value in ways.items()]
    return _ways(rows)


def sizes() -> pd.DataFrame:
    """The sizes in Table 3 (GiB), counted in several ways: WAYS."""
    rows = []
    for model, shape in SHAPES.items():
        for bits in (16, 4, 3):
            heads = sorted({16, bits}, reverse=True)
            counted = {head: model_bytes(shape, bits, GROUP_SIZE, head) for head in heads}
            ways = {f"lm_head in {head} bits": parts["total"] for head, parts in counted.items()}
            if bits < 16:
                bare = counted[16]["total"] - counted[16]["groups"]
                ways["lm_head in 16 bits, no steps or zeros"] = bare
            printed = _printed(model, bits, "model_gb")
            rows += [(model, "GiB", bits, how, value / GIB, printed) for how, value in ways.items()]
    return _ways(rows)


WAYS = ("model", "quantity", "bits", "counted", "recomputed", "printed")


def _ways(rows: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(WAYS))
    same = [f"{row.recomputed:.1f}" == f"{row.printed:.1f}" for row in frame.itertuples()]
    return frame.assign(agrees=same)


def _printed(model: str, bits: int, column: str) -> float:
    return paper.efficiency().query("model == @model and bits == @bits and method == 'full'")[column].iloc[0]


# Tables.


def tally_table() -> Table:
    """How many numbers each table prints, how many of them others determine, and how many of these agree."""
    frame = checks()
    counts = frame[frame.table != "abstract"].groupby("table").agrees.agg(determined="size", agree="sum")
    printed = pd.Series(PRINTED, name="printed")
    counts = printed.to_frame().join(counts).rename_axis("table").reset_index()
    counts["differ"] = counts.determined - counts.agree
    notes = ("Printed: numbers of the table's body; in Table 3 a size is printed once for three methods.",)
    return of_numbers("paper_tally", "Printed numbers that others determine", counts, ("table",), notes)


def _count_printed() -> dict[str, int]:
    accuracy, efficiency, ablation = paper.accuracy(), paper.efficiency(), paper.ablation()
    counts = {TABLES[model]: len(part) for model, part in accuracy.groupby("model", sort=False)}
    sizes = len(efficiency.drop_duplicates(["model", "bits"]))
    return {**counts, "Table 3": sizes + 2 * len(efficiency), "Table 4": 2 * len(ablation)}


PRINTED = _count_printed()
CAVEAT = (
    f"{paper.SOURCE} A difference may be a slip of the print, of the extraction or of the copy, or a way of "
    "counting that is not stated: these tables do not say which."
)


def difference_table() -> Table:
    """The numbers that do not agree with what others give."""
    frame = checks()
    caption = f"Printed numbers that others do not give ({(~frame.agrees).sum()} of {len(frame)})"
    return _shown("paper_differences", caption, frame[~frame.agrees])


def check_table() -> Table:
    """All numbers that others determine."""
    return _shown("paper_checks", "Printed numbers that others determine, all of them", checks())


def _shown(name: str, caption: str, frame: pd.DataFrame) -> Table:
    text = frame.assign(
        **{column: frame[column].map(number) for column in ("printed", "recomputed")},
        difference=frame.difference.map(lambda value: number(value, sign=True)),
        agrees=frame.agrees.map({True: "yes", False: "no"}),
    )
    order = [*PLACE, "printed", "recomputed", "difference", "agrees", "source"]
    text = text[order].rename(columns={"source": "recomputed from"})
    return Table(name, caption, text, frame, PLACE, (CAVEAT,))


def ways_table() -> Table:
    """Table 3's sizes and Full FLOPs from the public configs of both models, counted in several ways."""
    frame = pd.concat([flops(), sizes()], ignore_index=True)
    notes = (paper.SOURCE, "From the public configs; no weights are needed. GiB are 2³⁰ bytes.")
    table = of_numbers("paper_ways", "Table 3 from the models' shapes", frame, WAYS[:4], notes)
    table.text["agrees"] = frame.agrees.map({True: "yes", False: "no"})
    return table
