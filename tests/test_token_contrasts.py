"""Which tokens skip, judged: effects of known truth, and those of a model counted token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_lab import ALWAYS_RUN, LAYERS, FakeLab
from small_models import TOKENIZER, responses, routed_llama

from qtale_lib import jobs
from qtale_lib.adaptive import record_routes, set_threshold
from qtale_lib.claims import TOKEN_CLAIMS, verdicts
from qtale_lib.data.encoding import response_pairs
from qtale_lib.measurements import Measurements
from qtale_lib.statistics import NOT_RUN, NOT_SHOWN, NOT_TESTABLE, SHOWN
from qtale_lib.token_contrasts import CONTRASTS, contrast_runs
from qtale_lib.token_routes import read_routes

NAMED = {contrast.id: contrast for contrast in CONTRASTS}
# tokens and share of the routed layers; of those that always run (places 0 and 1) and of layers that do: all
GROUPS = {
    ("surprisal", "0"): (30, 0.40), ("surprisal", "1"): (10, 0.80), ("surprisal", "2"): (50, 0.99),
    ("surprisal", "3"): (10, 0.60), ("surprisal", "4"): (10, 0.80),
    ("kind", "name, prompt"): (10, 0.30), ("kind", "name, response"): (30, 0.50),
    ("kind", "function word, prompt"): (20, 0.50), ("kind", "word, response"): (10, 0.90),
    ("place", "0"): (9, 1.0), ("place", "1"): (9, 1.0), ("place", "2"): (9, 0.60),
    ("place", "7"): (9, 0.70), ("place", "8"): (9, 0.35), ("place", "32"): (18, 0.20),
}  # fmt: skip
EFFECTS = {
    "surprising": 70 - 50,
    "names": 45 - 50,
    "responses": 60 - 100 * (3 + 10) / 30,
    "beginning": 65 - 25,
}


class Lab(FakeLab):
    """Every run's groups are GROUPS, but for a spread of tenths of a point over methods and seeds."""

    def result(self, kind: str, **spec: Any) -> dict[str, Any]:
        found = super().result(kind, **spec)
        if kind == "token_routes":
            noise = self.noise("tokens", spec["method"], spec["seed"])
            found["value"]["groups"] = [
                {"by": by, "name": name, "tokens": tokens,
                 "executed": [1.0] * ALWAYS_RUN + [share + noise.normal(0, 0.002)] * (LAYERS - ALWAYS_RUN)}
                for (by, name), (tokens, share) in GROUPS.items()
            ]  # fmt: skip
        return found


@pytest.mark.parametrize("name", EFFECTS)
def test_effects_are_shares_of_the_routed_layers_weighed_by_tokens(name):
    store = Measurements(Lab(seeds=[0, 1, 2]))
    for method in ("dllm", "qtale"):
        runs = contrast_runs(store, NAMED[name], method)
        assert [run.seed for run in runs] == [0, 1, 2]
        assert [run.effect for run in runs] == pytest.approx([EFFECTS[name]] * 3, abs=1.5)


def test_what_is_there_is_shown_and_its_opposite_is_not():
    judged = verdicts(Measurements(Lab(seeds=[0, 1, 2])), "12").set_index("id")
    words = {claim.id: judged.loc[claim.id, "verdict"] for claim in TOKEN_CLAIMS}
    for method in ("D-LLM", "QTALE"):
        assert words[f"K surprising, {method}"] == words[f"K beginning, {method}"] == SHOWN
        assert words[f"K names, {method}"] == NOT_SHOWN
    assert judged.loc["K names, QTALE", "high"] < 0
    assert set(judged[judged.family == "tokens"].index) == set(words)


def test_one_fine_tuning_shows_nothing_and_none_is_not_run():
    one = verdicts(Measurements(Lab()), "12")
    assert set(one[one.family == "tokens"].verdict) == {NOT_TESTABLE}
    none = verdicts(Measurements(Lab(tasks=["arc_easy"])), "12")
    assert set(none.verdict) == {NOT_RUN}


def test_every_routed_run_in_sixteen_bits_is_read():
    profile = Lab(seeds=[0, 1]).profile
    read = {(job.run.method, job.run.seed, job.bits) for job in jobs.token_jobs(profile)}
    assert read == {(method, seed, 16) for method in ("dllm", "qtale") for seed in (0, 1)}


def test_effects_of_a_model_are_those_counted_token_by_token(monkeypatch):
    model, examples = routed_llama(), responses(20)
    set_threshold(model, 0.5)
    fitting = {"style": "compact", "batch_size": 4, "max_length": 64, "overlong": "drop"}
    edges = (1.0, 2.5, 4.0, 5.0)  # a random model is as sure of nothing as SURPRISAL has it
    monkeypatch.setattr("qtale_lib.token_routes.SURPRISAL", edges)
    value = read_routes(model, TOKENIZER, examples, **fitting)
    monkeypatch.setattr("qtale_lib.token_tables.held_of_seeds", lambda store: {("qtale", 0): value})
    store = SimpleNamespace(
        profile=SimpleNamespace(routing=SimpleNamespace(always_run_layers=2, always_run_tokens=2))
    )

    sides = {name: ([], []) for name in ("surprising", "responses", "beginning")}
    for prompt, response in response_pairs(examples, TOKENIZER, "compact"):
        ids = torch.tensor([prompt + response])
        with record_routes(model) as routes, torch.no_grad():
            likely = torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1)
        for place in range(2, ids.shape[1]):
            ran = float(routes.executed[2:, 0, place].float().mean())
            nats = -float(likely[place - 1, ids[0, place]])
            sides["responses"][place < len(prompt)].append(ran)
            sides["beginning"][place >= 8].append(ran)
            if nats > edges[2] or nats < edges[1]:
                sides["surprising"][nats < edges[1]].append(ran)
    for name, (plus, minus) in sides.items():
        (run,) = contrast_runs(store, NAMED[name], "qtale")
        assert run.effect == pytest.approx(100 * (np.mean(plus) - np.mean(minus)), abs=1e-3)
        assert contrast_runs(store, NAMED[name], "dllm") == []
