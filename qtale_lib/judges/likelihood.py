"""Likelihood under a reference model: the response whose tokens it finds likelier, on average, is better.

The mean over tokens, end of text included, keeps short responses from winning by being short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qtale_lib.data.prompts import render
from qtale_lib.judges import Comparison, better
from qtale_lib.provenance import Stopwatch
from qtale_lib.store import digest

if TYPE_CHECKING:
    from qtale_lib.lab import Lab

KIND = "likelihood"  # in the store
EMPTY = -1e4  # of a response without a token: below any other


class LikelihoodJudge:
    """Scores of all first, and of all second, responses are one result each in the store."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.model = lab, lab.profile.judge.model or lab.profile.base
        self.name = f"likelihood under {self.model}"

    def preferences(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """By the stored scores; None for all while one of the two sides has none."""
        sides = [self._stored(side) for side in self._sides(comparisons)]
        if None in sides:
            return [None] * len(comparisons)
        return [better(*pair) for pair in zip(*sides, strict=True)]

    def estimate(self, comparisons: Sequence[Comparison]) -> str:
        """How many responses are to be scored."""
        left = sum(len(side) for side in self._sides(comparisons) if self._stored(side) is None)
        return f"{left} responses to score by {self.model}, on this machine." if left else ""

    def ask(self, comparisons: Sequence[Comparison], report: Callable[[float], None]) -> None:
        """Score both sides."""
        for done, side in enumerate(self._sides(comparisons), start=1):
            if self._stored(side) is None:
                watch, spec = Stopwatch(), {"judge": "likelihood", "model": self.model}
                value = {"scores": mean_log_likelihoods(self.lab, self.model, side)}
                parts = {"spec": spec, "value": value, "provenance": watch.provenance()}
                self.lab.store.put(KIND, "responses", self._key(side), **parts)
            report(done / 2)

    def _sides(self, comparisons: Sequence[Comparison]) -> list[list[tuple[str, str]]]:
        """(prompt, response) of all first responses, and of all second ones."""
        prompts = [render(pair.example, self.lab.profile.prompt).prompt for pair in comparisons]
        texts = [[pair.first for pair in comparisons], [pair.second for pair in comparisons]]
        return [list(zip(prompts, side, strict=True)) for side in texts]

    def _key(self, side: list[tuple[str, str]]) -> str:
        profile = self.lab.profile
        revision = None if profile.judge.model else [self.lab.base()["sha256"]]
        return digest(self.model, revision, profile.dtype, side)

    def _stored(self, side: list[tuple[str, str]]) -> list[float] | None:
        found = self.lab.store.get(KIND, "responses", self._key(side))
        return found and found["value"]["scores"]


def mean_log_likelihoods(lab: Lab, name: str, side: list[tuple[str, str]]) -> list[float]:
    """Mean log-probability of the tokens of each (prompt, response), end of text included."""
    import torch
    from transformers import AutoModelForCausalLM

    from qtale_lib.base import device, find_base, load_tokenizer
    from qtale_lib.data.encoding import encode_pairs
    from qtale_lib.evaluation import score

    folder = find_base(name, None if lab.profile.judge.model else lab.profile.revision)
    tokenizer, dtype = load_tokenizer(folder), getattr(torch, lab.profile.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    ).to(device())
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pairs = encode_pairs(tokenizer, [(prompt, f" {text}") for prompt, text in side])
    pairs = [(prompt, response + ending) for prompt, response in pairs]
    found = score(model, pairs, lab.profile.training.eval_batch_size).log_probabilities
    return [float(values.mean()) if len(values) else EMPTY for values in found]


def judge_of(lab: Lab) -> LikelihoodJudge:
    """The judge by the profile's `judge.model`, or its base."""
    return LikelihoodJudge(lab)
