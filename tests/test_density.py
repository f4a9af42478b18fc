"""The study of density: its bases, what it may look at, losses and the picture from made-up answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from qtale_lib import density
from qtale_lib.data.microworld import base_directory
from qtale_lib.data.microworld.world import build_world, knowledge
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab

SMALL = {"layers": 2, "batch": 2, "window": 16, "tokens": 2 * 16 * 4, "warmup_steps": 1}


def written(folder: Path, **changes) -> Path:
    content = {
        "extends": "smoke", "evaluated": "validation", "bits": [16, 3], "methods": ["full"],
        "tasks": ["arc_easy"], "limit": {"train": 8, "calibration": 8, "test": 8}, "bases": [{}],
    }  # fmt: skip
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def test_knowledge_counts_what_each_fact_and_rule_tells():
    """By hand: every value of an attribute is one of so many; relations stay in their part."""
    world = build_world()
    people = len(world.entities["person"])
    practice = sum(person.split == "practice" for person in world.entities["person"])
    of_people = people * (3 * 4 + 3.5849625) + 2 * (practice * 6.3219281 + (people - practice) * 4)
    others = 160 * 7 * 3 + len(world.entities["thing"]) * (4.5849625 + 3)
    rules = 24 * 18 * 2 + 144 * 2.5849625 + 24 * 6 + 12 * 6
    assert knowledge(world) == pytest.approx(of_people + others + rules, rel=1e-6)


def test_the_shipped_base_is_one_of_the_shipped_study(tmp_path):
    study = density.load_study()
    places = [density.place(study, changes, tmp_path) for changes in study.bases]
    assert base_directory() in places and len(set(places)) == len(places)
    for changes, place in zip(study.bases, places, strict=True):
        profile = density.profile_of(study, changes, tmp_path)
        assert Path(profile.base) == place
    asked = Lab(density.profile_of(study, study.bases[0]), tmp_path).examples("arc_easy", "validation")
    assert {example.id.split("-")[1] for example in asked} == {"validation"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluated": "test"}, "must be validation"),
        ({"bases": []}, "must be a list"),
        ({"bases": [{"width": 64}]}, "must be a list of mappings of pretraining settings"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        density.load_study(written(tmp_path, **changes))


def test_losses_are_means_over_commonsense_tasks():
    shared = {
        "base": "b",
        "layers": 2,
        "hidden": 64,
        "tokens": 8,
        "shipped": False,
        "weights": 10,
        "density": 0.5,
    }
    accuracy = {16: (90.0, 80.0, 70.0), 4: (89.0, 80.0, 0.0), 3: (80.0, 60.0, 0.0)}
    rows = [
        {**shared, "bits": bits, "task": task, "accuracy": value}
        for bits, values in accuracy.items()
        for task, value in zip(("arc_easy", "siqa", "mmlu"), values, strict=True)
    ]
    lost = density.losses(pd.DataFrame(rows)).set_index("bits")
    assert lost.lost.to_dict() == {3: 15.0, 4: 0.5} and set(lost.accuracy) == {85.0}


@pytest.mark.slow
def test_a_base_is_pretrained_once_and_studied(tmp_path):
    """A base of two layers and four steps, through the whole study: what it knows is another matter."""
    study = density.load_study(written(tmp_path, bases=[SMALL]))
    said: list[str] = []
    assert {o.status for o in density.compute(study, 1, said.append, tmp_path)} == {"done"}
    assert len(said) == 1 and density.compute(study, 1, said.append, tmp_path) == [] and len(said) == 1
    found = density.frame(study, tmp_path)
    assert list(found.bits) == [3, 16] and found.accuracy.between(0, 100).all()
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
    assert found.weights[0] == pytest.approx(2 * layer, rel=0.01)
    shown = density.table(study, tmp_path)
    assert list(shown.text.columns)[:4] == ["base", "weights in layers", "bits a weight", "16 bits"]
    assert "shipped" not in shown.text.base[0]
    assert len(density.figure(found).axes) == 2
