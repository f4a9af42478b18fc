"""Table 3 from the run store: bytes and FLOPs of the model at hand; where the paper's numbers come from."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pandas as pd

from qtale_lib import efficiency, paper
from qtale_lib.effects import paper_rule
from qtale_lib.measurements import ROUTED_METHODS, Measurements, group_of
from qtale_lib.results import ERRORS, quantizer
from qtale_lib.tables import NOT_RUN, Table, beside, number, of_numbers, with_errors

MIB, MEGA = 2**20, 10**6
KEYS = ["bits", "method", "group"]
CELLS = ["R", "R_spread", "runs", "bytes", "layers", "routers", "lm_head", "relative", "with_routers"]
NOTES = (
    "Size: codes, steps (16 bit) and zero points of the decoder linears, embedding, norms and lm_head as "
    "they would be packed, routers in float32.",
    "FLOPs per token: 2 x multiply-accumulates of the decoder layers x R, the executed share measured in "
    "the same passes as the accuracy; in brackets relative to Full. Routers and lm_head (MFLOP per token), "
    "which the paper does not count, stand apart.",
    "Counted FLOPs, not seconds: latency is not measured here.",
)


def shape(store: Measurements) -> SimpleNamespace:
    """The base model's Hugging Face config with attributes, as efficiency.py reads it."""
    config = store.lab.base()["config"]
    defaults = {"tie_word_embeddings": False, "model_type": "llama"}
    return SimpleNamespace(**{**defaults, "num_key_value_heads": config["num_attention_heads"], **config})


def sizes(store: Measurements, bits: int, method: str = "full") -> dict[str, float]:
    """Bytes by part at a bit width; the profile's group size and lm_head, routers if the method has them."""
    profile = store.profile
    head = profile.quantization.lm_head_bits if bits < 16 else 16
    return efficiency.model_bytes(shape(store), bits, profile.group_size, head, _routers(store, method))


def _routers(store: Measurements, method: str) -> Any:
    return store.profile.routing if method in ROUTED_METHODS else None


def efficiency_cells(store: Measurements) -> pd.DataFrame:
    """Tidy: bits, method, group, R (mean over tasks and seeds; R_spread over seeds), bytes, FLOPs by part,
    relative to Full.
    """
    frame = store.evaluations
    if frame.empty:
        return pd.DataFrame(columns=[*KEYS, *CELLS])
    usual = [rule == paper_rule(m, b) for rule, m, b in frame[["theta_rule", "method", "bits"]].values]
    frame = frame[usual].assign(group=lambda f: f.task.map(group_of))
    ratios = frame.groupby(KEYS, sort=False).execution_ratio.agg(R="mean", runs="size")
    seeds = frame.groupby([*KEYS, "seed"]).execution_ratio.mean().groupby(KEYS)
    ratios = ratios.join(seeds.std().rename("R_spread")).reset_index()[[*KEYS, *CELLS[:3]]]
    return pd.DataFrame([_cell(store, row) for row in ratios.to_dict("records")])


def _cell(store: Measurements, cell: dict[str, Any]) -> dict[str, Any]:
    flops = efficiency.flops_per_token(shape(store), cell["R"], _routers(store, cell["method"]))
    full = efficiency.flops_per_token(shape(store))["layers"]
    del flops["total"]
    relative, routers = flops["layers"] / full, flops["routers"] / full
    size = sizes(store, cell["bits"], cell["method"])["total"]
    return {**cell, "bytes": size, **flops, "relative": relative, "with_routers": relative + routers}


def efficiency_table(store: Measurements) -> Table:
    """Ours in the layout of Table 3: size, and FLOPs per token with their relative, per group of tasks."""
    cells = efficiency_cells(store)
    held = cells.set_index(KEYS)
    rows = [(bits, method) for bits in store.profile.bits for method in store.profile.methods]
    text = pd.DataFrame([_row(store, held, bits, method) for bits, method in rows])
    caption = f"Model size and FLOPs per token, profile {store.profile.name}"
    notes = (f"Below 16 bits: {quantizer(store.profile)}.", *NOTES)
    return Table("table_3_efficiency", caption, text, cells, tuple(KEYS), notes)


def _row(store: Measurements, held: pd.DataFrame, bits: int, method: str) -> dict[str, str]:
    row = {"bits": str(bits), "method": paper.METHODS[method]}
    row["size (MiB)"] = number(sizes(store, bits, method)["total"] / MIB)
    for group in paper.GROUPS:
        known = (bits, method, group) in held.index
        row[f"{paper.TASK_LABELS[group]} MFLOP"] = _flops(held.loc[bits, method, group]) if known else NOT_RUN
    fixed = efficiency.flops_per_token(shape(store), 1.0, _routers(store, method))
    return {**row, **{part: number(fixed[part] / MEGA) for part in ("routers", "lm_head")}}


def _flops(cell: pd.Series) -> str:
    return f"{number(cell.layers / MEGA)} ({number(cell.relative)}x)"


def efficiency_beside_paper(store: Measurements) -> Table:
    """Relative FLOPs of the routed methods: ours, and printed with the difference, for both models."""
    ours = efficiency_cells(store)[[*KEYS, "relative"]].rename(columns={"relative": "ours"})
    printed = (
        paper.efficiency().query("method != 'full'").rename(columns={"task": "group", "relative": "paper"})
    )
    frame = printed.merge(ours, "left", on=KEYS).assign(difference=lambda f: f.ours - f.paper)
    frame = frame[["model", *KEYS, "paper", "ours", "difference"]]
    parts = {model: part.reset_index(drop=True) for model, part in frame.groupby("model", sort=False)}
    first = next(iter(parts.values()))
    text = (
        first[KEYS]
        .astype(str)
        .assign(ours=first.ours.map(number), **{m: beside(p) for m, p in parts.items()})
    )
    notes = (
        paper.SOURCE,
        "Relative to Full at the same bit width, decoder layers only; in brackets ours − the paper's.",
    )
    caption = "Relative FLOPs of Table 3 beside ours"
    return _labelled(Table("table_3_beside", caption, text, frame, ("model", *KEYS), notes))


def _labelled(table: Table) -> Table:
    table.text["method"] = table.text.method.map(paper.METHODS)
    table.text["group"] = table.text.group.map(paper.TASK_LABELS)
    return table


def loss_ratios(store: Measurements) -> pd.DataFrame:
    """Loss-R in 16 bits at θ 0.5, one row a task of the profile: `dllm`, `qtale`, their `difference` (each a
    mean over seeds with its `_spread`), and how far above the target (`_off_target`) the methods' lie.
    """
    frame = store.evaluations.reindex(columns=["task", "method", "seed", "bits", "theta_rule", "loss_ratio"])
    frame = frame[(frame.bits == 16) & (frame.theta_rule == "argmax")]
    runs = frame.pivot(index=["task", "seed"], columns="method", values="loss_ratio")
    runs = runs.reindex(columns=ROUTED_METHODS).astype(float)
    seeds = runs.assign(difference=runs.qtale - runs.dllm).groupby("task")
    means = seeds.mean().reindex(store.profile.tasks)
    off = (means[list(ROUTED_METHODS)] - store.profile.training.rate_target).add_suffix("_off_target")
    return means.join([seeds.std().add_suffix("_spread"), off]).rename_axis("task").reset_index()


def loss_ratio_table(store: Measurements) -> Table:
    """Whether D-LLM and QTALE come to the same execution ratio, and to the target; the largest gaps last."""
    frame = loss_ratios(store)
    text = pd.DataFrame({"task": frame.task.map(paper.TASK_LABELS)})
    for name, label in {**RATIOS, **GAPS}.items():
        spreads = frame[f"{name}_spread"] if f"{name}_spread" in frame else [None] * len(frame)
        text[label] = [with_errors(v, None, s, 3) for v, s in zip(frame[name], spreads, strict=True)]
    largest = {label: number(frame[name].abs().max(), 3) for name, label in GAPS.items()}
    text.loc[len(text)] = {"task": "largest, + or −", **dict.fromkeys(RATIOS.values(), "–"), **largest}
    notes = (
        "Loss-R: the executed share of the (token, layer) pairs that the rate loss counts, on the "
        f"{store.profile.evaluated} questions, with θ = 0.5 in 16 bits; training aims at "
        f"{store.profile.training.rate_target}.",
        ERRORS[1],
        "The claims ask for a difference within 0.03, and for the target within 0.1.",
    )
    caption = f"Execution ratio as the rate loss counts it (loss-R), profile {store.profile.name}"
    return Table("loss_ratio", caption, text, frame, ("task",), notes)


RATIOS = {method: paper.METHODS[method] for method in ROUTED_METHODS}
GAPS = {
    "difference": "QTALE − D-LLM",
    "dllm_off_target": "D-LLM − target",
    "qtale_off_target": "QTALE − target",
}


def file_table(store: Measurements) -> Table:
    """Real bytes of the base model's file and of packed ones beside the formula at the file's precision."""
    base = store.lab.base()
    precision = str(base["config"].get("dtype") or base["config"].get("torch_dtype") or "unknown")
    formula = sizes(store, 16)["total"] * (2 if precision == "float32" else 1)
    rows = [("its safetensors file", precision, base["bytes"]), ("formula", precision, formula)]
    for bits in (bits for bits in store.profile.bits if bits < 16):
        rows.append((f"packed file, {bits} bits", "packed", packed_file(store, bits)))
        rows.append((f"formula, {bits} bits", "packed", sizes(store, bits)["total"]))
    frame = pd.DataFrame(rows, columns=["base model", "precision", "MiB"])
    frame["MiB"] /= MIB
    notes = (
        "Packed file: what save_packed writes for the base, everything that is not packed in bfloat16; known "
        "from its shape, to the byte. Its steps take 32 bits, so that packed weights are exactly the "
        "evaluated ones; the formula counts 16, as the paper's sizes do.",
    )
    return of_numbers("table_3_files", "Bytes, real and by formula", frame, ("base model",), notes, digits=3)


def packed_file(store: Measurements, bits: int, method: str = "full", layer_bits: Sequence[int] = ()) -> int:
    """Bytes of a packed file at a bit width (`layer_bits`: by layer, if they differ), with routers if the
    method has them; needs torch, but no weights.
    """
    with warnings.catch_warnings():  # in a notebook, tqdm's import asks for widgets that nothing here draws
        warnings.filterwarnings("ignore", message="IProgress not found")
        from qtale_lib.adaptive import RouterConfig
        from qtale_lib.quantization.packed_size import packed_file_bytes

    profile, routing = store.profile, _routers(store, method)
    routers = routing and RouterConfig(hidden=routing.hidden, always_run_layers=routing.always_run_layers)
    head = profile.quantization.lm_head_bits
    config, group = store.lab.base()["config"], profile.group_size
    return packed_file_bytes(config, bits, group, head, routers, layer_bits=layer_bits)["total"]
