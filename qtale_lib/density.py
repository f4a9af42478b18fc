"""How densely a base must hold the embedded world for quantization to cost it something: `… density`.

The study's YAML is a profile with `bases`: recipes of pretraining, each the shipped one but for what it
names. Every base is pretrained on the same text, fine-tuned (`full`), quantized and asked validation
questions; what it loses stands against the bits of knowledge that each of its weights has to hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field

from qtale_lib.config import CSQA, Profile
from qtale_lib.figures import BLUE, COLUMN, CROSS, DOT, RED, SQUARE, canvas, empty
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab, results_root
from qtale_lib.pool import Outcome
from qtale_lib.profile_files import read_profile
from qtale_lib.tables import Table, number

if TYPE_CHECKING:
    from qtale_lib.data.microworld.pretrain import Recipe

STUDY = Path(__file__).parent / "sweeps" / "density.yaml"
COLUMNS = ("base", "layers", "hidden", "tokens", "shipped", "weights", "density", "bits", "task", "accuracy")


def _recipes(bases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for base in bases:
        _recipe(base)
    return bases


def _recipe(changes: dict[str, Any]) -> Recipe:
    from qtale_lib.data.microworld.pretrain import Recipe  # loads torch

    try:
        return Recipe(**changes)
    except TypeError as error:
        raise ValueError(str(error)) from None


class Study(Profile):
    """A profile, and the recipes of pretraining whose bases it compares."""

    bases: Annotated[
        list[dict[str, Any]],
        AfterValidator(_recipes),
        Field(min_length=1, description="a list of mappings of pretraining settings, such as hidden: 64"),
    ]


def load_study(path: str | Path = STUDY) -> Study:
    """The study of a YAML file; UserError as for profiles, and for one that would look at test facts."""
    study, study._settings = read_profile(Study, path, {})
    if study.evaluated == "test":
        raise study.refusal(
            "evaluated", "must be validation in a study: it chooses, and test facts are for later"
        )
    return study


def place(study: Study, changes: dict[str, Any], root: Path | None = None) -> Path:
    """Where a base of the study lies: the shipped one's folder, or one under the study's results."""
    from qtale_lib.data.microworld import base_directory
    from qtale_lib.data.microworld.pretrain import Recipe

    if _recipe(changes) == Recipe():
        return base_directory()
    name = "_".join(f"{key}-{value}" for key, value in changes.items())
    return (root or results_root()) / study.name / "bases" / name


def profile_of(study: Study, changes: dict[str, Any], root: Path | None = None) -> Profile:
    """The study's settings on one of its bases."""
    own = study.model_dump(mode="json", exclude={"bases"})
    return Profile.model_validate({**own, "base": str(place(study, changes, root))})


def compute(
    study: Study, threads: int, say: Callable[[str], None], root: Path | None = None
) -> list[Outcome]:
    """Pretrain what is missing, base by base, then fine-tune, quantize and evaluate what is missing."""
    from qtale_lib.data.microworld.pretrain import pretrain

    outcomes = []
    for changes in study.bases:
        directory = place(study, changes, root)
        if not (directory / "pretraining.json").is_file():
            say(f"pretraining {directory.name}")
            pretrain(_recipe(changes), directory, threads)
        profile = profile_of(study, changes, root)
        outcomes += Lab(profile, root).compute(all_jobs(profile))
    return outcomes


def frame(study: Study, root: Path | None = None) -> pd.DataFrame:
    """One row per base, bit width and task: COLUMNS. `weights`: those of the decoder layers; `density`: bits
    of the world's facts and rules for each of them; `accuracy`: percent, mean over seeds.
    """
    from qtale_lib.data.microworld.pretrain import Recipe
    from qtale_lib.data.microworld.world import build_world, knowledge

    bits, rows = knowledge(build_world()), []
    for changes in study.bases:
        lab, recipe = Lab(profile_of(study, changes, root), root), _recipe(changes)
        evaluations = lab.evaluations()
        if evaluations.empty:
            continue
        weights = lab.base()["parameters"]["decoder"]
        label = {
            "base": f"{recipe.hidden} wide, {recipe.tokens / 1e6:g} M", "layers": recipe.layers,
            "hidden": recipe.hidden, "tokens": recipe.tokens, "shipped": recipe == Recipe(),
            "weights": weights, "density": bits / weights,
        }  # fmt: skip
        expected = evaluations.expected_acc.fillna(evaluations.acc)
        means = evaluations.assign(accuracy=100 * expected).groupby(["bits", "task"]).accuracy.mean()
        rows += [{**label, **row} for row in means.reset_index().to_dict("records")]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def losses(found: pd.DataFrame) -> pd.DataFrame:
    """One row per base and width below 16 bits: COLUMNS without task, `lost` = points of accuracy that the
    width costs, and `accuracy` in 16 bits; means over the commonsense tasks.
    """
    csqa = found[found.task.isin(CSQA)]
    keys = [name for name in COLUMNS if name not in ("bits", "task", "accuracy")]
    means = csqa.pivot_table(index=keys, columns="bits", values="accuracy", sort=False)
    if 16 not in means:
        return pd.DataFrame(columns=[*keys, "accuracy", "bits", "lost"])
    lost = means.drop(columns=16).rsub(means[16], axis=0).melt(ignore_index=False, value_name="lost")
    return lost.reset_index().merge(means[16].rename("accuracy").reset_index(), on=keys)


def table(study: Study, root: Path | None = None) -> Table:
    """A row per base: what it has to hold, its accuracy in 16 bits, and the change at fewer."""
    found = frame(study, root)
    rows = []
    for _, own in losses(found).groupby("base", sort=False):
        first = own.iloc[0]
        changes = {f"{row.bits} bits": number(-row.lost, 1, sign=True) for row in own.itertuples()}
        rows.append({
            "base": first.base + (" (shipped)" if first.shipped else ""),
            "weights in layers": f"{first.weights:,}",
            "bits a weight": number(first.density, 3),
            "16 bits": number(first.accuracy, 1),
            **changes,
        })  # fmt: skip
    questions = f"{study.limit.test} validation questions a task at most"
    notes = (
        f"{', '.join(study.tasks)}; {len(study.seeds)} seed(s); {questions}; Full, fine-tuned on each task.",
        "Accuracy in percent (its expectation over the draw of wrong choices) and its change in points, "
        "means over the commonsense tasks. Bits a weight: what it takes to write down the world's facts and "
        "rules, for each weight of the decoder layers.",
    )
    return Table("density", f"Study {study.name}", pd.DataFrame(rows), found, ("base", "bits", "task"), notes)


LOOKS = {4: {"color": BLUE, "linestyle": "--", **SQUARE}, 3: {"color": RED, "linestyle": "-", **DOT}}


def figure(found: pd.DataFrame) -> Figure:
    """Points lost at each width against bits a weight, above; accuracy in 16 bits, below. `found`: frame."""
    lost = losses(found).sort_values("density")
    if lost.empty:
        return empty()
    canvas_, axes = canvas(COLUMN, 3.4, 2, 1, sharex=True)
    upper, lower = axes[:, 0]
    for bits, own in lost.groupby("bits", sort=False):
        upper.plot(own.density, own.lost, label=f"{bits} bits", **LOOKS.get(bits, CROSS))
    upper.axhline(0, color="0.6", linewidth=0.6)
    upper.set_ylabel("points lost")
    upper.legend(loc="upper left")
    bases = lost.drop_duplicates("base")
    lower.plot(bases.density, bases.accuracy, color="black", **CROSS)
    for row in bases.itertuples():
        lower.annotate(f"{row.hidden}" + "*" * row.shipped, (row.density, row.accuracy), (0, 5),
                       textcoords="offset points", ha="center")  # fmt: skip
    lower.margins(y=0.25)
    lower.set(ylabel="accuracy, 16 bits (%)", xlabel="bits of knowledge a weight (numbers: width, * shipped)")
    return canvas_
