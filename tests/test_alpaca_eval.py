"""AlpacaEval's prompts for the win rates: in their own format, answered by runs of Alpaca; kept apart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_run import profile, save_base

from qtale_lib import stages, win_rates
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import needs
from qtale_lib.lab import Lab
from qtale_lib.preflight import check

DATA = os.environ.get("QTALE_TEST_DATA")
FROM_EVAL = {"generation": {"source": "alpaca_eval"}}
SUBSETS = ("helpful_base", "koala", "vicuna")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Alpaca's file, and AlpacaEval's by the name and with the fields under which it is published."""
    asked = [{"instruction": f"Describe thing {i}.", "input": "", "output": f"It is {i}."} for i in range(60)]
    rows = [
        {"dataset": SUBSETS[i % 3], "instruction": f"Name trade {i}.", "output": f"baker {i}.",
         "generator": "text_davinci_003"}
        for i in range(9)
    ]  # fmt: skip
    for task, name, content in (("alpaca", "train", asked), ("alpaca_eval", "alpaca_eval", rows)):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "data"


def settings(base: Path, folder: Path, **changes):
    fixed = {"tasks": ["alpaca"], "methods": ["dllm", "qtale"], "bits": [16], "data_dir": str(folder)}
    return profile(base, **fixed, judge={"kind": "likelihood"}, **changes)


@pytest.mark.filterwarnings("ignore:.*published file has")
def test_runs_of_alpaca_answer_alpaca_evals_prompts_and_are_paired_on_them(folder, tmp_path):
    base = save_base(tmp_path / "base")
    lab = Lab(settings(base, folder, generation={"source": "alpaca_eval", "prompts": 6, "max_tokens": 4}))
    lab = Lab(lab.profile, tmp_path / "results")
    wanted = needs(lab.profile, "12")
    check(lab, wanted)
    for job in wanted:
        stages.perform(lab, job, lambda *_: None)
    found = lab.result("responses", task="alpaca", method="qtale", seed=0, bits=16, theta="argmax")
    assert len(found["value"]["ids"]) == 6
    assert all(name.startswith("alpaca_eval/test/") for name in found["value"]["ids"])
    assert found["provenance"]["data"]["test"]["file"] == "alpaca_eval.json"
    pairs = win_rates.comparisons(lab, win_rates.MATCHES[0], 0)
    assert [pair.example.fields["instruction"] for pair in pairs] == [
        each.fields["instruction"] for each in lab.prompts("alpaca")
    ]
    assert all(pair.example.response.startswith("baker") for pair in pairs)
    routes = lab.result("token_routes", task="alpaca", method="qtale", seed=0, bits=16, theta="argmax")
    assert routes["provenance"]["made_from"]["test"] == found["provenance"]["made_from"]["test"]


@pytest.mark.filterwarnings("ignore:.*published file has")
def test_the_source_tells_responses_apart_and_nothing_else(folder, tmp_path):
    base, trained = save_base(tmp_path / "base"), {"value": {"adapter_sha256": "a"}}
    spec = {"task": "alpaca", "method": "qtale", "seed": 0}
    asked = {**spec, "bits": 16, "theta": "argmax"}
    keys = {}
    for source in ("own", "alpaca_eval"):
        lab = Lab(settings(base, folder, generation={"source": source}), tmp_path / source)
        lab.find = lambda kind, **spec: trained
        keys[source] = [
            lab.address(kind, {**(spec if kind == "finetune" else asked)})[2]
            for kind in ("finetune", "evaluation", "responses", "token_routes")
        ]
        assert "source" not in lab.settings("responses", asked)
    same = [own == other for own, other in zip(*keys.values(), strict=True)]
    assert same == [True, True, False, False]


def test_the_embedded_world_has_none_of_them(tmp_path):
    lab = Lab(profile(tasks=["alpaca"], group_size=-1, **FROM_EVAL), tmp_path)
    with pytest.raises(UserError, match=r"generation\.source .*is not in the embedded world; set own"):
        check(lab, needs(lab.profile, "12"))
    check(lab, needs(lab.profile, "05"))  # which asks for none


@pytest.mark.skipif(not DATA, reason="QTALE_TEST_DATA names no folder with the benchmarks' files")
def test_the_recipe_of_real_models_takes_all_805():
    real = load_profile("llama3.2-3b", data_dir=DATA)
    lab = Lab(real)
    assert lab.asked("alpaca") == ("alpaca_eval", "test") and len(lab.prompts("alpaca")) == 805
    assert lab.source(*lab.asked("alpaca"))["notes"] == []
