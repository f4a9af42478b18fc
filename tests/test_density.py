"""The study of density: its bases, what it may look at, losses and the picture from made-up answers."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from qtale_lib import density
from qtale_lib.data.microworld import base_directory
from qtale_lib.data.microworld.world import build_world, knowledge
from qtale_lib.density import Base
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab

SMALL = {"layers": 3, "batch": 2, "window": 16, "tokens": 2 * 16 * 4, "warmup_steps": 1}


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
    places = [density.place(study, base, tmp_path) for base in study.bases]
    assert base_directory() in places and len(set(places)) == len(places)
    for base, place in zip(study.bases, places, strict=True):
        assert Path(density.profile_of(study, base, tmp_path).base) == place
    asked = Lab(density.profile_of(study, study.bases[0]), tmp_path).examples("arc_easy", "validation")
    assert {example.id.split("-")[1] for example in asked} == {"validation"}


def test_a_base_is_known_by_what_differs_from_the_shipped_one(tmp_path):
    study = density.load_study()
    width = Base().recipe().hidden
    assert Base().label() == Base(hidden=width).label() == "shipped"
    assert Base(tokens=3_000_000, hidden=32).label() == "hidden 32, tokens 3,000,000"
    places = {density.place(study, base, tmp_path) for base in (Base(hidden=32), Base(hidden=32, batch=16))}
    assert len(places) == 1 and places.pop().parent == tmp_path / "density" / "bases"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluated": "test"}, "must be validation"),
        ({"base": "somewhere"}, "base .* must be microworld"),
        ({"data": "hub"}, "data .* must be microworld"),
        ({"data_dir": "."}, "data_dir .* must be null"),
        ({"methods": ["full", "dllm"]}, r"must be \[full\]"),
        ({"bits": [4, 3]}, "must be 16 and others"),
        ({"bits": [16]}, "must be 16 and others"),
        ({"tasks": ["alpaca"]}, "must be some of the commonsense tasks"),
        ({"group_size": 128}, "must be -1, or divide every base's widths"),
        ({"bases": []}, "must be a list"),
        ({"bases": [{}, {}]}, "must be a list of at least one, none twice"),
        ({"bases": [{}, {"hidden": 48}]}, "none twice"),
        ({"bases": [{"width": 64}]}, "width"),
        ({"bases": [{"hidden": 63}]}, "must be a multiple of 8"),
        ({"bases": [{"hidden": "x"}]}, "must be a multiple of 8"),
        ({"bases": [{"layers": 0}]}, "must be a whole number of at least 1"),
        ({"bases": [{"window": 512}]}, "must be a whole number from 2 to 256"),
        ({"bases": [{"tokens": 2047}]}, "with tokens for a step at least"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=said) as refused:
        density.load_study(written(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def made_up(base: str = "b", **changes) -> list[dict]:
    shared = {
        "base": base,
        "hidden": 64,
        "tokens": 16_000_000,
        "shipped": False,
        "weights": 10,
        "density": 0.5,
    }
    accuracy = {16: (90.0, 80.0, 70.0), 4: (89.0, 80.0, 0.0), 3: (80.0, 60.0, 0.0)}
    return [
        {**shared, **changes, "bits": bits, "task": task, "accuracy": value}
        for bits, values in accuracy.items()
        for task, value in zip(("arc_easy", "siqa", "mmlu"), values, strict=True)
    ]


def test_losses_are_means_over_commonsense_tasks():
    lost = density.losses(pd.DataFrame(made_up())).set_index("bits")
    assert lost.lost.to_dict() == {3: 15.0, 4: 0.5} and set(lost.accuracy) == {85.0}


def test_a_task_that_misses_a_width_is_left_out_of_all():
    rows = [row for row in made_up() if (row["bits"], row["task"]) != (3, "siqa")]
    lost = density.losses(pd.DataFrame(rows)).set_index("bits")
    assert lost.lost.to_dict() == {3: 10.0, 4: 1.0} and set(lost.accuracy) == {90.0}
    assert density.losses(pd.DataFrame(made_up())[:0]).empty


def test_bases_of_one_size_stay_apart_and_lines_join_those_of_the_usual_length():
    rows = made_up() + made_up("c", tokens=8_000_000) + made_up("d", density=0.2)
    assert density.losses(pd.DataFrame(rows)).groupby("base").size().to_dict() == {"b": 2, "c": 2, "d": 2}
    _, lower = density.figure(pd.DataFrame(rows)).axes
    assert [len(line.get_xdata()) for line in lower.lines] == [2, 1]
    assert lower.lines[1].get_linestyle() == "None"
    assert {text.get_text() for text in lower.texts} == {"b", "c", "d"}


@pytest.mark.slow
def test_a_base_is_pretrained_once_and_studied(tmp_path):
    """A base of three layers and four steps, through the whole study: what it knows is another matter."""
    study = density.load_study(written(tmp_path, bases=[SMALL]))
    said: list[str] = []
    assert {o.status for o in density.compute(study, 1, said.append, tmp_path)} == {"done"}
    assert len(said) == 1 and density.compute(study, 1, said.append, tmp_path) == [] and len(said) == 1
    found = density.frame(study, tmp_path)
    assert list(found.bits) == [3, 16] and found.accuracy.between(0, 100).all()
    layer = 48 * 48 * 2 + 2 * 48 * 24 + 3 * 48 * 128
    assert found.weights[0] == pytest.approx(3 * layer, rel=0.01)
    shown = density.table(study, tmp_path)
    assert list(shown.text.columns) == [
        "base", "weights in layers", "knowledge (bits per weight)", "16 bits", "3 bits"
    ]  # fmt: skip
    assert "layers 3" in shown.text.base[0]
