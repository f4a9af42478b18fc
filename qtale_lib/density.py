"""How densely a base must hold the embedded world for quantization to cost it something: `… density`.

The study's YAML is a profile with `bases`: recipes of pretraining, each the shipped one but for what it
names. Every base is pretrained on the same text, fine-tuned (`full`), quantized and asked validation
questions; what it loses stands against the bits of knowledge that each of its weights has to hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
from matplotlib.figure import Figure
from pydantic import AfterValidator, Field, model_validator

from qtale_lib.config import CSQA, CountOrNull, Profile, Section
from qtale_lib.data.microworld import base_directory
from qtale_lib.figures import BLUE, COLUMN, CROSS, DOT, RED, SQUARE, canvas, empty
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab, results_root
from qtale_lib.pool import Outcome
from qtale_lib.profile_files import EMBEDDED, read_profile
from qtale_lib.tables import Table, number

if TYPE_CHECKING:
    from qtale_lib.data.microworld.pretrain import Recipe

STUDY = Path(__file__).parent / "sweeps" / "density.yaml"
COLUMNS = ("base", "hidden", "tokens", "shipped", "weights", "density", "bits", "task", "accuracy")
LOOKS = {4: {"color": BLUE, "linestyle": "--", **SQUARE}, 3: {"color": RED, "linestyle": "-", **DOT}}

Width = Annotated[
    int | None, Field(strict=True, ge=8, multiple_of=8, description="a multiple of 8, at least 8")
]
Window = Annotated[int | None, Field(strict=True, ge=2, le=256, description="a whole number from 2 to 256")]


BASES = "a list of at least one, none twice, of mappings such as hidden: 64, with tokens for a step at least"


class Base(Section):
    """A recipe of pretraining: the shipped one but for what is named here."""

    layers: CountOrNull = None
    hidden: Width = None
    intermediate: Width = None
    window: Window = None
    batch: CountOrNull = None
    tokens: CountOrNull = None
    warmup_steps: CountOrNull = None

    @model_validator(mode="after")
    def _has_steps(self) -> Base:
        if not self.recipe().steps:
            raise ValueError("fewer tokens than a step takes")
        return self

    def recipe(self) -> Recipe:
        """All of the recipe."""
        from qtale_lib.data.microworld.pretrain import Recipe  # loads torch

        return replace(Recipe(), **self.model_dump(exclude_none=True))

    def changes(self) -> dict[str, int]:
        """What differs from the shipped recipe; nothing for the shipped base."""
        own, shipped = asdict(self.recipe()), asdict(Base().recipe())
        return {name: value for name, value in own.items() if value != shipped[name]}

    def label(self) -> str:
        """What differs, for readers."""
        return ", ".join(f"{name} {value:,}" for name, value in self.changes().items()) or "shipped"


def _unlike(bases: tuple[Base, ...]) -> tuple[Base, ...]:
    if len({base.label() for base in bases}) < len(bases):
        raise ValueError("a base stands there twice")
    return bases


class Study(Profile):
    """A profile, and the recipes of pretraining whose bases it compares."""

    bases: Annotated[
        tuple[Base, ...],
        AfterValidator(_unlike),
        Field(min_length=1, description=BASES),
    ]


def load_study(path: str | Path = STUDY) -> Study:
    """The study of a YAML file.

    Raises:
        UserError: as for profiles; and for one that asks test facts, another world, methods with routers, or
            nothing that could be lost.
    """
    study, study._settings = read_profile(Study, path, {})
    widths = {w for base in study.bases for w in (base.recipe().hidden, base.recipe().intermediate)}
    for key, is_right, needed in (
        ("evaluated", study.evaluated != "test", "validation: test facts are for the base that it chooses"),
        ("base", study.base == EMBEDDED, f"{EMBEDDED}: its bases are pretrained on that"),
        ("data", study.data == EMBEDDED, f"{EMBEDDED}: its bases know nothing else"),
        ("data_dir", study.data_dir is None, "null: its questions are the embedded world's"),
        ("methods", study.methods == ("full",), "[full]"),
        ("bits", 16 in study.bits and len(study.bits) > 1, "16 and others"),
        ("tasks", set(CSQA) & set(study.tasks), "some of the commonsense tasks"),
        ("group_size", not any(w % study.group_size for w in widths), "-1, or divide every base's widths"),
    ):
        if not is_right:
            raise study.refusal(key, f"must be {needed}, in a study of density")
    return study


def place(study: Study, base: Base, root: Path | None = None) -> Path:
    """Where a base of the study lies: the shipped one's folder, or one under the study's results, whose name
    tells the recipe and the text apart from others.
    """
    from qtale_lib.data.microworld.pretrain import digest

    if not base.changes():
        return base_directory()
    name = "_".join(f"{key}-{value}" for key, value in base.changes().items())
    return (root or results_root()) / study.name / "bases" / f"{name}.{digest(base.recipe())[:8]}"


def profile_of(study: Study, base: Base, root: Path | None = None) -> Profile:
    """The study's settings on one of its bases."""
    own = study.model_dump(mode="json", exclude={"bases"})
    return Profile.model_validate({**own, "base": str(place(study, base, root))})


def compute(
    study: Study, threads: int, say: Callable[[str], None], root: Path | None = None
) -> list[Outcome]:
    """Pretrain what is missing, base by base, then fine-tune, quantize and evaluate what is missing."""
    from qtale_lib.data.microworld.pretrain import pretrain

    outcomes = []
    for base in study.bases:
        if not _is_pretrained(study, base, root):
            say(f"pretraining a base ({base.label()})")
            pretrain(base.recipe(), place(study, base, root), threads)
        profile = profile_of(study, base, root)
        outcomes += Lab(profile, root).compute(all_jobs(profile))
    return outcomes


def _is_pretrained(study: Study, base: Base, root: Path | None) -> bool:
    return (place(study, base, root) / "pretraining.json").is_file()


def frame(study: Study, root: Path | None = None) -> pd.DataFrame:
    """One row per base, bit width and task: COLUMNS. `weights`: those of the decoder layers; `density`: bits
    of the world's facts and rules for each of them; `accuracy`: percent, mean over seeds.
    """
    from qtale_lib.data.microworld.world import build_world, knowledge

    bits, rows = knowledge(build_world()), []
    for base in study.bases:
        if not _is_pretrained(study, base, root):
            continue
        lab, recipe = Lab(profile_of(study, base, root), root), base.recipe()
        evaluations = lab.evaluations()
        if evaluations.empty:
            continue
        weights = lab.base()["parameters"]["decoder"]
        label = {
            "base": base.label(), "hidden": recipe.hidden, "tokens": recipe.tokens,
            "shipped": not base.changes(), "weights": weights, "density": bits / weights,
        }  # fmt: skip
        expected = evaluations.expected_acc.fillna(evaluations.acc)
        means = evaluations.assign(accuracy=100 * expected).groupby(["bits", "task"]).accuracy.mean()
        rows += [{**label, **row} for row in means.reset_index().to_dict("records")]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def losses(found: pd.DataFrame) -> pd.DataFrame:
    """One row per base and width below 16 bits: COLUMNS without task, `lost` = points of accuracy that the
    width costs, and `accuracy` in 16 bits; means over the commonsense tasks evaluated at every width.
    """
    keys = [name for name in COLUMNS if name not in ("bits", "task", "accuracy")]
    wide = found[found.task.isin(CSQA)].pivot(index=[*keys, "task"], columns="bits", values="accuracy")
    means = wide.dropna().groupby(keys, sort=False).mean()
    if 16 not in means:
        return pd.DataFrame(columns=[*keys, "bits", "lost", "accuracy"])
    lost = means.drop(columns=16).rsub(means[16], axis=0).melt(ignore_index=False, value_name="lost")
    return lost.reset_index().merge(means[16].rename("accuracy").reset_index(), on=keys)


def table(study: Study, root: Path | None = None) -> Table:
    """A row per base: what it has to hold, its accuracy in 16 bits, and the change at fewer."""
    found = frame(study, root)
    lost = losses(found)
    rows = []
    for base in dict.fromkeys(found.base):
        own = lost[lost.base == base].sort_values("bits", ascending=False)
        if own.empty:
            continue
        first = own.iloc[0]
        changes = {f"{row.bits} bits": number(-row.lost, 1, sign=True) for row in own.itertuples()}
        rows.append({
            "base": base,
            "weights in layers": f"{first.weights:,}",
            "knowledge (bits per weight)": number(first.density, 3),
            "16 bits": number(first.accuracy, 1),
            **changes,
        })  # fmt: skip
    questions = f"{study.limit.test} validation questions a task at most"
    notes = (
        f"{', '.join(study.tasks)}; {len(study.seeds)} seed(s); {questions}; Full, fine-tuned on each task.",
        "Accuracy in percent (its expectation over the draw of wrong choices) and its change in points, "
        "means over the commonsense tasks. Knowledge: what it takes at most to write down the world's facts "
        "and rules, for each weight of the decoder layers.",
    )
    return Table("density", f"Study {study.name}", pd.DataFrame(rows), found, ("base", "bits", "task"), notes)


def figure(found: pd.DataFrame) -> Figure:
    """Points lost at each width against knowledge per weight, above; accuracy in 16 bits, below. Lines join
    bases of the shipped one's training length. `found`: frame.
    """
    lost = losses(found).sort_values("density")
    if lost.empty:
        return empty()
    drawn, axes = canvas(COLUMN, 3.4, 2, 1, sharex=True)
    upper, lower = axes[:, 0]
    for bits, own in lost.groupby("bits", sort=False):
        _points(upper, own, "lost", LOOKS.get(bits, CROSS), f"{bits} bits")
    upper.axhline(0, color="0.6", linewidth=0.6)
    upper.set_ylabel("points lost")
    upper.legend(loc="upper left")
    bases = lost.drop_duplicates("base")
    _points(lower, bases, "accuracy", {"color": "black", "linestyle": "-", **CROSS})
    for row in bases.itertuples():
        lower.annotate(row.base, (row.density, row.accuracy), (0, 5), textcoords="offset points", ha="center")
    lower.margins(x=0.15, y=0.25)
    lower.set(ylabel="accuracy, 16 bits (%)", xlabel="knowledge (bits per weight)")
    return drawn


def _points(axis: Any, frame: pd.DataFrame, column: str, look: dict, label: str | None = None) -> None:
    usual = frame.tokens == _shipped_tokens()
    axis.plot(frame.density[usual], frame[column][usual], label=label, **look)
    axis.plot(frame.density[~usual], frame[column][~usual], **{**look, "linestyle": "none"})


def _shipped_tokens() -> int:
    return Base().recipe().tokens
