"""Sweeps: each factor alone, validation facts only, and a table that says what was tried."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from qtale_lib import sweep
from qtale_lib.config import load_profile
from qtale_lib.data import data_hash
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run, all_jobs
from qtale_lib.lab import Lab, run_spec


def written(folder: Path, **changes) -> Path:
    content = {
        "extends": "smoke",
        "evaluated": "validation",
        "bits": [16],
        "factors": {"training.lr": [0.5, 0.25], "max_steps": [3]},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def test_each_factor_is_varied_alone(tmp_path):
    loaded = sweep.load_sweep(written(tmp_path))
    own, *others = sweep.settings(loaded)
    assert (own.factor, own.profile.max_steps) == (None, load_profile("smoke").max_steps)
    assert [(s.factor, s.value) for s in others] == [
        ("training.lr", 0.5), ("training.lr", 0.25), ("max_steps", 3)
    ]  # fmt: skip
    for setting in others:
        changed = setting.profile.model_dump()
        held = own.profile.model_dump()
        assert (changed["training"]["lr"], changed["max_steps"]) != (
            held["training"]["lr"],
            held["max_steps"],
        )
        changed["training"]["lr"], changed["max_steps"] = held["training"]["lr"], held["max_steps"]
        assert changed == held


def test_the_own_value_of_a_factor_is_not_tried_twice(tmp_path):
    steps = load_profile("smoke").max_steps
    assert len(sweep.settings(sweep.load_sweep(written(tmp_path, factors={"max_steps": [steps, 7]})))) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluated": "test"}, "must be validation"),
        ({"factors": {"training.speed": [1]}}, "names training.speed, which is no setting"),
        ({"factors": {"training.lr": [-1.0]}}, "gives training.lr the value -1.0, which it cannot have"),
        ({"alongside": {"lora.r": {}}}, "alongside .* names lora.r, which is not varied"),
        ({"factors": {}}, "must be"),
        ({"factors": {"max_steps": 3}}, "must be"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        sweep.settings(sweep.load_sweep(written(tmp_path, **changes)))


def test_the_shipped_sweep_loads_and_looks_at_no_test_question(tmp_path):
    loaded = sweep.load_sweep()
    assert len(sweep.settings(loaded)) == 1 + sum(map(len, loaded.factors.values()))
    lab = Lab(sweep.settings(loaded)[0].profile, tmp_path)
    asked = lab.examples("arc_easy", lab.profile.evaluated)
    assert {example.id.split("-")[1] for example in asked} == {"validation"}


def test_what_is_evaluated_is_part_of_the_key(tmp_path):
    test, validation = (
        Lab(load_profile("smoke", evaluated=split), tmp_path) for split in ("test", "validation")
    )
    assert data_hash(test.examples("arc_easy", "test")) != data_hash(
        validation.examples("arc_easy", "validation")
    )
    run = Run("arc_easy", "full", 0)
    assert test.address("finetune", run_spec(run)) == validation.address("finetune", run_spec(run))


def test_the_table_marks_the_best_setting_of_each_method(tmp_path, monkeypatch):
    """Over made-up results: accuracy by learning rate and method."""
    loaded = sweep.load_sweep(written(tmp_path, tasks=["arc_easy"], factors={"training.lr": [0.5, 0.25]}))
    scores = {0.5: {"full": 0.9, "dllm": 0.2, "qtale": 0.3}, 0.25: {"full": 0.1, "dllm": 0.6, "qtale": 0.25}}
    own = {"full": 0.5, "dllm": 0.5, "qtale": 0.2}

    def evaluations(lab):
        by_method = scores.get(lab.profile.training.lr, own)
        shared = {"task": "arc_easy", "acc": 0.0, "open_acc": 0.0, "nll": 1.0}
        rules = {"full": ("none",), "dllm": ("argmax", "zero"), "qtale": ("argmax",)}
        return pd.DataFrame([
            {**shared, "method": m, "theta_rule": rule, "expected_acc": acc if rule != "zero" else 1.0,
             "loss_ratio": 1.0 if m == "full" else 0.5}
            for m, acc in by_method.items() for rule in rules[m]
        ])  # fmt: skip

    monkeypatch.setattr(Lab, "evaluations", evaluations)
    table = sweep.table(loaded, tmp_path)
    assert table.text.to_dict("records") == [
        {"setting": "as it is", "Full": "50.0", "D-LLM": "50.0 (0.50)", "QTALE": "20.0 (0.50)"},
        {"setting": "training.lr = 0.5", "Full": "90.0*", "D-LLM": "20.0 (0.50)", "QTALE": "30.0* (0.50)"},
        {"setting": "training.lr = 0.25", "Full": "10.0", "D-LLM": "60.0* (0.50)", "QTALE": "25.0 (0.50)"},
    ]
    assert "3 settings tried" in table.notes[0]


def test_settings_that_a_method_does_not_have_cost_it_nothing(tmp_path, monkeypatch):
    """λ1 is no setting of a full model: its fine-tunings have the same keys under every λ1."""
    factors = {"training.lambda1": [1.0, 2.0]}
    loaded = sweep.load_sweep(written(tmp_path, tasks=["arc_easy"], methods=["full"], factors=factors))
    labs = [Lab(setting.profile, tmp_path) for setting in sweep.settings(loaded)]
    spec = run_spec(Run("arc_easy", "full", 0))
    assert len({lab.address("finetune", spec) for lab in labs}) == 1 and len(labs) == 3
    wanted = []
    monkeypatch.setattr(Lab, "compute", lambda lab, jobs: wanted.extend(jobs) or [])
    assert sweep.compute(loaded, tmp_path) == []
    assert set(wanted) == set(all_jobs(labs[0].profile)) >= {Job(Run("arc_easy", "full", 0))}


def test_tables_say_how_the_recipe_was_chosen():
    tried = len(sweep.settings(sweep.load_sweep()))
    assert f"among {tried} settings" in sweep.chosen(load_profile("tiny"))
    assert f"among {tried} settings" in sweep.chosen(load_profile("tiny-full"))
    for other in (load_profile("smoke"), load_profile("tiny", training={"lr": 0.5}), SimpleNamespace()):
        assert "no sweep of this suite chose it" in sweep.chosen(other)
