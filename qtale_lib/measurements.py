"""Tidy frames of what the run store holds: answers per question, and per-layer probes after every epoch.

Figures, tables and claims read the store through this room alone, so that "which layers", "which tasks" and
"which runs are there" are decided once. A task, method, bit width or seed that was not run is simply absent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from qtale_lib import paper
from qtale_lib.jobs import FIGURE_2_TASKS, ROUTED, probed_task

ROUTED_METHODS = ROUTED
SHOWN_EPOCHS = (0, 3, 6)  # of Fig. 2, 5 and 6; the last epoch is added
LOWEST_LAYERS = 3  # Sec. 3.1: layers 20, 23 and 26 of LLaMA3.1-8B

Cell = tuple[str, str, int, int, str]  # task, method, seed, bits, rule that sets theta


@dataclass(frozen=True)
class Answers:
    """One evaluation, question by question.

    `scores` [questions]: 100 for right and 0 for wrong (where the choices were drawn: 100 x the chance of
    right over that draw), or 100 x the negative log-likelihood of a response; `weights` [questions]: 1, or
    the response's tokens. Their weighted mean is the (expected) accuracy in percent, or 100 x log PPL.
    `shared` [questions, questions]: 1 where two questions share a fact, and 0 elsewhere.
    """

    scores: np.ndarray
    weights: np.ndarray
    shared: csr_array
    execution_ratio: float | None
    loss_ratio: float | None

    @property
    def mean(self) -> float:
        """Accuracy in percent, expected where that is known, or 100 x log PPL."""
        return float(np.average(self.scores, weights=self.weights))


def group_of(task: str) -> str:
    """The paper's grouping: "csqa" for the seven commonsense tasks, else the task itself (mmlu, alpaca)."""
    return "csqa" if task in paper.CSQA else task


def shown_epochs(epochs: Iterable[int]) -> list[int]:
    """Epochs 0, 3, 6 and the last, as far as they were run."""
    present = sorted(set(epochs))
    return sorted({epoch for epoch in SHOWN_EPOCHS if epoch in present} | set(present[-1:]))


def quantized_bits(profile: Any) -> int | None:
    """The profile's width below 16 bits that comes nearest to the paper's 4; None without one."""
    return min((bits for bits in profile.bits if bits < 16), key=lambda bits: abs(bits - 4), default=None)


def compared_bits(profile: Any) -> list[int]:
    """That width, and 16 bits beside it, as far as the profile has them."""
    return [bits for bits in (quantized_bits(profile), 16) if bits in profile.bits]


class Measurements:
    """What a lab holds, read once: `answers` by cell, `layers` and `evaluations` as tidy frames."""

    def __init__(self, lab: Any) -> None:
        self.lab, self.profile = lab, lab.profile

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row per evaluation (task, method, seed, bits, theta_rule, acc or ppl, ratios ...)."""
        return self.lab.evaluations()

    @cached_property
    def answers(self) -> dict[Cell, Answers]:
        """Answers of every evaluation in the store."""
        keys = ["task", "method", "seed", "bits", "theta_rule"]
        rows = self.evaluations[keys].itertuples(index=False) if len(self.evaluations) else ()
        return {(t, m, int(s), int(b), r): self._answers(t, m, int(s), int(b), r) for t, m, s, b, r in rows}

    def _answers(self, task: str, method: str, seed: int, bits: int, rule: str) -> Answers:
        spec = {"task": task, "method": method, "seed": seed, "bits": bits, "theta": rule}
        value = self.lab.result("evaluation", **spec)["value"]
        scores, weights = _scores(value)
        shared = sharing(tuple(map(tuple, value.get("facts") or [()] * len(scores))))
        return Answers(scores, weights, shared, value.get("execution_ratio"), value.get("loss_ratio"))

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row per task, method, seed, epoch and layer, with the columns PROBED.

        `ratio` is over all tokens; `routed_ratio` leaves out the first tokens of a sequence, which always run
        and alone lift the ratio of short prompts to `floor`. Always-run layers have ratio 1 and the rest NaN.
        """
        frames = [
            _layer_frame(probe).assign(task=task, method=method, seed=seed)
            for task, method, seed in self._trained()
            for probe in self.lab.probes(task, method, seed)
        ]
        columns = ["task", "method", "seed", "epoch", "layer", *PROBED]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def _trained(self) -> list[tuple[str, str, int]]:
        runs = self.lab.finetunes()
        if runs.empty:
            return []
        runs = runs[runs.method.isin(ROUTED_METHODS)].sort_values(["task", "method", "seed"])
        return [(task, method, int(seed)) for task, method, seed in runs[["task", "method", "seed"]].values]

    def ratios_by_layer(self, method: str) -> pd.DataFrame:
        """Fig. 2, tidy: task, epoch, layer, ratio (mean over seeds); epochs and tasks as in the paper."""
        frame = self.layers[self.layers.method == method]
        tasks = [task for task in FIGURE_2_TASKS if task in set(frame.task)] or list(
            dict.fromkeys(frame.task)
        )
        parts = [frame[frame.task == task] for task in tasks]
        parts = [part[part.epoch.isin(shown_epochs(part.epoch))] for part in parts]
        keys = ["task", "epoch", "layer"]
        return pd.concat([frame[:0], *parts]).groupby(keys, sort=False).ratio.mean().reset_index()

    def lowest_by_epoch(self, *methods: str) -> pd.DataFrame:
        """Fig. 3 and 7, tidy: method, layer, epoch and the probed numbers (mean over seeds).

        `<number>_spread` is the standard deviation over seeds, NaN with one. The layers are the lowest under
        D-LLM on the task of these figures; no rows without D-LLM.
        """
        task = self.figure_task()
        layers = self.lowest_layers(task) if task else []
        frame = self.layers
        frame = frame[(frame.task == task) & frame.method.isin(methods) & frame.layer.isin(layers)]
        seeds = frame.groupby(["method", "layer", "epoch"])[list(PROBED)]
        spread = seeds.std()[list(SPREAD)].add_suffix("_spread")
        return seeds.mean().join(spread).reset_index()

    def lowest_layers(self, task: str, method: str = "dllm") -> list[int]:
        """The routed layers with the lowest final ratio (mean over seeds), ascending."""
        frame = self.layers
        frame = frame[(frame.task == task) & (frame.method == method) & frame.flip_expected.notna()]
        frame = frame[frame.epoch == frame.epoch.max()]
        means = frame.groupby("layer").ratio.mean().sort_values(kind="stable")
        return sorted(int(layer) for layer in means.index[:LOWEST_LAYERS])

    def figure_task(self) -> str | None:
        """The task of Fig. 3 and 5-7: ARC-easy as in the paper, else the profile's first task with probes."""
        present = set(self.layers.task)
        first = [probed_task(self.profile), *self.profile.tasks] if present else []
        return next((task for task in first if task in present), None)

    def histograms(self, method: str) -> pd.DataFrame:
        """Fig. 5, 6, tidy: one row per epoch, layer, kind (execute, bypass) and bin, all seeds together.

        count: sum over seeds; low, high: lowest and highest share of a seed's tokens in the bin (percent);
        gap, abs_gap: means over seeds, with `_spread` their standard deviation. low, high and the spreads are
        NaN with one seed. The layers are the lowest under D-LLM on the task of these figures.
        """
        task = self.figure_task()
        layers = self.lowest_layers(task) if task else []
        runs = [run for run in self._trained() if run[:2] == (task, method)]
        frames = [self._histogram(run, layer, kind) for run in runs for layer in layers for kind in KINDS]
        if not frames:
            return pd.DataFrame(columns=HISTOGRAM)
        bins = pd.concat(frames).groupby(list(HISTOGRAM[:5]), sort=False)
        frame = bins.agg(
            count=("count", "sum"),
            low=("share", "min"),
            high=("share", "max"),
            **{name: (name, "mean") for name in ("gap", "abs_gap")},
            **{f"{name}_spread": (name, "std") for name in ("gap", "abs_gap")},
        )
        if len(runs) == 1:
            frame[["low", "high"]] = np.nan
        return frame.reset_index()[list(HISTOGRAM)]

    def _histogram(self, run: tuple[str, str, int], layer: int, kind: str) -> pd.DataFrame:
        probes = self.lab.probes(*run)
        wanted = shown_epochs(probe["epoch"] for probe in probes)
        return pd.concat([_histogram_frame(p, layer, kind) for p in probes if p["epoch"] in wanted])

    def theta_curves(self) -> pd.DataFrame:
        """The coarse phase of the θ searches (Sec. 3.4).

        Columns: group, method, bits, theta, score, execution_ratio, stderr.
        At the bits compared; means over tasks and seeds on calibration questions; scores are accuracies in
        percent, or PPL. stderr is the score's over questions, which all seeds of a task share (NaN for PPL).
        """
        columns = ["group", "method", "bits", "theta", "score", "execution_ratio", "stderr"]
        parts = [
            _theta_curve(search)
            for search in self.lab.thresholds().itertuples()
            if search.bits in compared_bits(self.profile)
        ]
        if not parts:
            return pd.DataFrame(columns=columns)
        by_task = pd.concat(parts).groupby([*columns[:4], "task"]).mean()
        frame = by_task.groupby(columns[:4]).agg(
            score=("score", "mean"),
            execution_ratio=("execution_ratio", "mean"),
            stderr=("variance", lambda tasks: np.sqrt(tasks.sum(skipna=False)) / len(tasks)),
        )
        return frame.reset_index()


def _theta_curve(search: Any) -> pd.DataFrame:
    """One θ search's coarse curve; variance: of an accuracy in percent, over its questions."""
    curve, group = pd.DataFrame(search.coarse)[["theta", "score", "execution_ratio"]], group_of(search.task)
    curve = curve.assign(group=group, task=search.task, method=search.method, bits=search.bits)
    if group == "alpaca":
        return curve.assign(variance=np.nan)
    spread = 100**2 * curve.score * (1 - curve.score) / len(search.ids)
    return curve.assign(score=100 * curve.score, variance=spread)


LISTED = ("ratio", "flip", "flip_expected", "gap", "abs_gap")
PROBED = (*LISTED, "routed_ratio", "floor")
SPREAD = ("ratio", "routed_ratio", "flip")  # of which figures and tables show the spread over seeds
KINDS = ("execute", "bypass")
HISTOGRAM = ("epoch", "layer", "kind", "left", "right", "count", "low", "high",
             "gap", "abs_gap", "gap_spread", "abs_gap_spread")  # fmt: skip


def _layer_frame(probe: dict[str, Any]) -> pd.DataFrame:
    values = {name: np.array(probe[name], dtype=float) for name in LISTED}  # null becomes NaN
    decided = [np.nan if counts is None else sum(counts) for counts in probe["histogram"]["execute"]]
    share = np.array(decided) / probe["tokens"]  # of the tokens fed, those that the layer's router decides on
    values["floor"] = 1 - share
    values["routed_ratio"] = (values["ratio"] - values["floor"]) / share
    return pd.DataFrame({"epoch": probe["epoch"], "layer": range(len(share)), **values})


def _histogram_frame(probe: dict[str, Any], layer: int, kind: str) -> pd.DataFrame:
    edges = np.asarray(probe["histogram"]["edges"], dtype=float)
    counts = np.asarray(probe["histogram"][kind][layer], dtype=float)
    return pd.DataFrame({
        "epoch": probe["epoch"], "layer": layer, "kind": kind, "left": edges[:-1], "right": edges[1:],
        "count": counts, "share": 100 * counts / max(counts.sum(), 1),
        "gap": probe["gap"][layer], "abs_gap": probe["abs_gap"][layer],
    })  # fmt: skip


def _scores(value: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and weights per question: (expected) correctness in percent, or 100 x nats per token."""
    if value["metric"] == "acc":
        scores = 100.0 * np.asarray(value.get("expected_correct") or value["correct"], dtype=float)
        return scores, np.ones_like(scores)
    tokens = np.asarray(value["example_tokens"], dtype=float)
    return 100.0 * np.asarray(value["example_nll"], dtype=float) / tokens, tokens


@lru_cache(maxsize=32)  # all evaluations of a task are on the same questions
def sharing(facts: tuple[tuple[str, ...], ...]) -> csr_array:
    """Which questions share a fact, [questions, questions] of 1 and 0, given the facts of each.

    A question without facts stands alone.
    """
    held = [(index, name) for index, names in enumerate(facts) for name in names or (f"#{index}",)]
    questions, names = zip(*held, strict=True)
    columns = np.unique(names, return_inverse=True)[1]
    incidence = csr_array((np.ones(len(held)), (questions, columns)))
    return (incidence @ incidence.T > 0).astype(float)
