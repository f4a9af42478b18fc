"""A lab without models: the run store's JSON shapes, filled with numbers whose truth a test chooses."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from qtale_lib import paper
from qtale_lib.data import load_task

ROUTED_RULES = ("argmax", "searched", "zero")
RULES = {"full": ("none",), "dllm": ROUTED_RULES, "qtale": ROUTED_RULES, "noisy_full": ("zero",)}
LAYERS, ALWAYS_RUN, TOKENS, RESERVED = 8, 2, 4000, 400
SEARCHED = 50  # calibration questions of a θ search
USED = {"train": 800, "calibration": SEARCHED}
RISE = {"dllm": 0.3, "qtale": 0.8}  # of the execution ratio, as θ falls from 0.5
THETA = {"none": None, "argmax": 0.5, "searched": 0.2, "zero": 0.0}
CONFIG = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "model_type": "llama",
}  # fmt: skip

# accuracy in percent by (method, bits, rule); what is not named has that of its method at 16 bits
PAPER_LIKE = {
    ("full", 16, "none"): 85.0, ("full", 4, "none"): 83.0, ("full", 3, "none"): 76.0,
    ("full", 2, "none"): 50.0,
    ("dllm", 16, "argmax"): 84.8, ("dllm", 4, "argmax"): 74.0, ("dllm", 3, "argmax"): 60.0,
    ("dllm", 4, "searched"): 80.0, ("qtale", 16, "argmax"): 84.9, ("qtale", 4, "argmax"): 82.0,
    ("qtale", 4, "searched"): 84.0, ("qtale", 3, "argmax"): 73.0, ("qtale", 3, "searched"): 77.0,
}  # fmt: skip


def profile(**changes: Any) -> SimpleNamespace:
    """What notebooks and claims read of a profile."""
    fields = {
        "name": "fake", "tasks": [*paper.CSQA, "mmlu", "alpaca"], "methods": ["full", "dllm", "qtale"],
        "bits": [16, 4, 3, 2], "seeds": [0], "group_size": 128, "base": "microworld", "evaluated": "test",
        "training": SimpleNamespace(rate_target=0.5, epochs=10),
        "quantization": SimpleNamespace(lm_head_bits=16, method="awq", backend="native"),
        "routing": SimpleNamespace(hidden=None, always_run_layers=ALWAYS_RUN, always_run_tokens=2),
        "theta_sweep": [], "data": "microworld", "data_dir": None,
        "judge": SimpleNamespace(kind="exact"), "generation": SimpleNamespace(prompts=20, summaries=True),
        "theta_aims": [], "prompt": "compact",
    }  # fmt: skip
    assert set(changes) <= set(fields)
    return SimpleNamespace(**{**fields, **changes}, digest=lambda *sections: "0" * 16)


class FakeLab:
    """The lab's reading methods over made-up results; `accuracy` as PAPER_LIKE, noise drawn from `seed`."""

    def __init__(
        self, accuracy: dict | None = None, questions: int = 300, seed: int = 0, **changes: Any
    ) -> None:
        self.profile = profile(**changes)
        self.accuracy, self.questions, self.seed = (
            PAPER_LIKE if accuracy is None else accuracy,
            questions,
            seed,
        )
        self.ensured: list[str] = []
        self.values: dict[tuple, dict[str, Any]] = {}

    def ensure(self, notebook_id: str) -> None:
        self.ensured.append(notebook_id)

    def is_small(self) -> bool:
        return True

    def base(self) -> dict[str, Any]:
        parts = {"decoder": LAYERS * 100_000, "embedding": 512 * 128, "lm_head": 0, "norm": 128}
        return {
            "name": "microworld",
            "sha256": "0" * 64,
            "bytes": 4_000_000,
            "config": CONFIG,
            "parameters": {**parts, "total": sum(parts.values())},
        }

    def examples(self, task: str, split: str) -> list[Any]:
        if split == "test":
            return load_task(task, split)[: self.questions]
        return [SimpleNamespace(facts=(f"{task}{i // 3}",)) for i in range(USED[split])]

    def prompts(self, task: str) -> list[Any]:
        return self.examples(task, "test")

    def finetunes(self) -> pd.DataFrame:
        rows = [
            (t, m, s) for t in self.profile.tasks for m in self.profile.methods for s in self.profile.seeds
        ]
        return pd.DataFrame(rows, columns=["task", "method", "seed"])

    def evaluations(self) -> pd.DataFrame:
        runs = self.finetunes().values.tolist()
        cells = [(t, m, s, b, rule) for t, m, s in runs for b in self.profile.bits for rule in self.rules(m)]
        return pd.DataFrame([self.row(*cell) for cell in cells])

    def rules(self, method: str) -> list[str]:
        swept = self.profile.theta_sweep if method in ("dllm", "qtale") else []
        return [*RULES[method], *map(str, swept)]

    def row(self, task: str, method: str, seed: int, bits: int, rule: str) -> dict[str, Any]:
        value = self.value(task, method, seed, bits, rule)
        names = ("metric", "acc", "expected_acc", "ppl", "stderr", "count", "nll", "execution_ratio",
                 "loss_ratio", "theta")  # fmt: skip
        spec = {"task": task, "method": method, "seed": seed, "bits": bits, "theta_rule": rule}
        return {**spec, **{name: value.get(name) for name in names}}

    def find(self, kind: str, **spec: Any) -> dict[str, Any] | None:
        return self.result(kind, **spec)

    def responses(self, method: str, bits: int, rule: str, seed: int, task: str = "alpaca") -> dict[str, Any]:
        """The references, some of them with another last word."""
        asked, noise = self.examples(task, "test"), self.noise("responses", method, bits, rule, seed)
        wrong = noise.random(len(asked)) < (100 - self.accuracy.get((method, bits, rule), 80.0)) / 100
        texts = [
            each.response.rsplit(" ", 1)[0] + " nothing." if bad else each.response
            for each, bad in zip(asked, wrong, strict=True)
        ]
        return {"ids": [each.id for each in asked], "texts": texts, "tokens": [10] * len(asked),
                "execution_ratios": [None if method == "full" else 0.5] * len(asked),
                "generation_seconds": 1.0}  # fmt: skip

    def result(self, kind: str, **spec: Any) -> dict[str, Any]:
        used = USED["calibration" if kind == "threshold" else "train"]
        if kind == "responses":
            value = self.responses(*(spec[name] for name in ("method", "bits", "theta", "seed", "task")))
            return {"schema": 1, "kind": kind, "status": "done", "spec": spec, "value": value}
        if kind == "token_routes":
            groups = [("kind", "name, prompt"), ("surprisal", "0"), ("place", "0"), ("place", "1")]
            value = {
                "groups": [
                    {"by": by, "name": name, "tokens": 9, "executed": [0.5] * LAYERS} for by, name in groups
                ],
                "reserved": [{"tokens": 2, "ppl": 2.0, "execution_ratio": 0.5}],
                "bypassed": [{"layer": layer, "ppl": 3.0} for layer in range(LAYERS)], "ppl": 2.0,
            }  # fmt: skip
            return {"schema": 1, "kind": kind, "status": "done", "spec": spec, "value": value}
        value = {"rows": {"used": used, "dropped": 0, "cut": 0}}
        if kind == "evaluation":
            value = self.value(spec["task"], spec["method"], spec["seed"], spec["bits"], spec["theta"])
        return {"schema": 1, "kind": kind, "status": "done", "spec": spec, "value": value, "provenance": {}}

    def value(self, *cell: Any) -> dict[str, Any]:
        """The evaluation of a cell (task, method, seed, bits, rule), made up once."""
        if cell not in self.values:
            self.values[cell] = self.made_up(*cell)
        return self.values[cell]

    def made_up(self, task: str, method: str, seed: int, bits: int, rule: str) -> dict[str, Any]:
        theta = THETA[rule] if rule in THETA else float(rule)
        ratio = {"none": 1.0, "searched": 0.54, "zero": 1.0}.get(rule) or 0.52 + RISE[method] * (0.5 - theta)
        ratio += 0.0 if rule in ("none", "zero") else self.noise("ratio", task, method, seed).normal(0, 0.01)
        common = {"execution_ratio": ratio, "loss_ratio": min(ratio, 1.0), "theta": theta,
                  "rows": {"used": self.questions, "dropped": 3, "cut": 0},
                  "facts": [[f"fact{i // 2}"] for i in range(self.questions)]}  # fmt: skip
        usual = self.accuracy.get((method, 16, RULES[method][0]), 80.0)
        score = self.accuracy.get((method, bits, rule), usual)
        score += 0.0 if rule in THETA else 20 * (ratio - 0.52)
        score += self.noise("run", task, method, seed).normal(0, 0.3)
        measured = self.perplexity(task, score) if task == "alpaca" else self.choices(task, score)
        return {**common, **measured}

    def choices(self, task: str, score: float) -> dict[str, Any]:
        easiness = self.noise("questions", task).permutation(self.questions) / self.questions
        correct = (easiness < score / 100).astype(int)
        chance = ((score / 100 - easiness) / 0.1 + 0.5).clip(0, 1)  # averages to the score as well
        stderr = float(correct.std() / self.questions**0.5)
        shared = {"metric": "acc", "count": self.questions, "nll": 0.5, "stderr": stderr}
        drawn = task != "boolq"  # its two choices are all there are
        expected = chance if drawn else correct
        return {
            **shared, "acc": float(correct.mean()), "correct": correct.tolist(),
            "expected_acc": float(expected.mean()), "expected_correct": expected.tolist() if drawn else None,
        }  # fmt: skip

    def perplexity(self, task: str, score: float) -> dict[str, Any]:
        noise = self.noise("questions", task)
        tokens = noise.integers(5, 30, self.questions)
        nll = tokens * (2.0 - score / 100 + noise.normal(0, 0.05, self.questions))
        mean = float(nll.sum() / tokens.sum())
        shared = {"metric": "ppl", "count": int(tokens.sum()), "nll": mean, "stderr": 0.01}
        examples = {"example_nll": nll.tolist(), "example_tokens": tokens.tolist()}
        return {**shared, "ppl": float(np.exp(mean)), **examples}

    def noise(self, *key: Any) -> np.random.Generator:
        """A generator of its own for every key, so that no number depends on the order of questions."""
        return np.random.default_rng(zlib.crc32(repr((self.seed, *key)).encode()))

    def probes(self, task: str, method: str, seed: int) -> list[dict[str, Any]]:
        noise = self.noise("layers", task, method, seed)
        slope = np.sort(noise.uniform(0.2, 1.0, LAYERS))[::-1] * (1.0 if method == "dllm" else 0.3)
        return [self.probe(epoch, noise, slope) for epoch in range(self.profile.training.epochs + 1)]

    def probe(self, epoch: int, noise: np.random.Generator, slope: np.ndarray) -> dict[str, Any]:
        done = min(epoch / 4, 1.0) + epoch / 100
        gap = 1.9 - done * 8.0 * slope
        share = 1 / (1 + np.exp(-3 * gap))
        ratio = np.where(
            np.arange(LAYERS) < ALWAYS_RUN, 1.0, (RESERVED + share * (TOKENS - RESERVED)) / TOKENS
        )
        expected = 1 / (1 + np.exp(np.abs(gap)))
        edges = np.linspace(-16, 16, 129)

        def draw(centre: float) -> list[int]:
            values = noise.normal(centre, 1, TOKENS - RESERVED).clip(-16, 16)
            return np.histogram(values, edges)[0].tolist()

        return {
            "epoch": epoch, "ratio": ratio.tolist(), "tokens": TOKENS,
            "flip": routed(expected + noise.normal(0, 0.004, LAYERS)), "flip_expected": routed(expected),
            "gap": routed(gap), "abs_gap": routed(np.abs(gap)),
            "histogram": {"edges": edges.tolist(), "execute": routed([draw(g / 2) for g in gap]),
                          "bypass": routed([draw(-g / 2) for g in gap])},
            "execution_ratio": float(ratio.mean()), "loss_ratio": float(ratio.mean()),
        }  # fmt: skip

    def thresholds(self) -> pd.DataFrame:
        runs = [run for run in self.finetunes().values.tolist() if run[1] != "full"]
        ids = [f"q{index}" for index in range(SEARCHED)]
        rows = [(*run, bits, 0.2, self.coarse(*run, bits), ids) for run in runs for bits in self.profile.bits]
        return pd.DataFrame(rows, columns=["task", "method", "seed", "bits", "theta", "coarse", "ids"])

    def coarse(self, task: str, method: str, seed: int, bits: int) -> list[dict[str, float]]:
        noise = self.noise("theta", task, method, seed, bits)
        best = 3.0 if task == "alpaca" else 0.8
        return [
            {"theta": theta, "score": best + noise.normal(0, 0.01), "execution_ratio": 1.0 - 0.9 * theta}
            for theta in (0.1, 0.2, 0.3, 0.4, 0.5)
        ]


def routed(values: Any) -> list:
    """The list with None on the layers that always run."""
    return [None] * ALWAYS_RUN + list(values)[ALWAYS_RUN:]
