"""Studies past the paper: sweeps that notebooks show, each computed into one store by one command.

A study's YAML (sweeps/) is a profile with `factors` and the number of its `notebook`. All of its settings
share the store of the study's name, whose keys know what is equal: what a factor leaves alone is not computed
again. Reading needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, all_jobs, expected_seconds
from qtale_lib.lab import Lab, run_spec
from qtale_lib.measurements import Measurements
from qtale_lib.pool import Outcome, workers_kept
from qtale_lib.profile_files import read_profile, sets
from qtale_lib.provenance import ROOT
from qtale_lib.store import Store, digest
from qtale_lib.sweep import RECIPE, Setting, Sweep, settings
from qtale_lib.tables import Table, save

SHIPPED = RECIPE.parent
NAMES = {"08": "execution_ratio", "09": "quantizers", "10": "sensitivity"}  # of the shipped ones, by notebook
SMALL = 300.0  # core-seconds: a study that takes no longer is computed along with its notebook


class Plan(Sweep):
    """A study's YAML: a sweep, and the notebook that shows it."""

    notebook: Annotated[str, Field(pattern="^(08|09|10)$", description="08, 09 or 10, in quotes")]


@dataclass(frozen=True)
class Committed:
    """A table of the committed reference, as it was printed."""

    text: str

    def _repr_markdown_(self) -> str:
        return self.text


class Study:
    """A plan and what of it is in the store; `profile`: its own settings, with no factor changed."""

    def __init__(self, path: Path, root: Path | None = None, **overrides: Any) -> None:
        self.plan, self.plan._settings = read_profile(Plan, path, overrides)
        self.path, self.root = path, root
        self.settings = settings(self.plan)
        self.profile = self.settings[0].profile

    @cached_property
    def labs(self) -> list[Lab]:
        """A lab for each setting, the study's own first; all have one store."""
        first = Lab(self.profile, self.root)
        return [
            first,
            *(Lab(setting.profile, self.root).reading_with(first) for setting in self.settings[1:]),
        ]

    @cached_property
    def measured(self) -> list[tuple[Setting, Measurements]]:
        """What is in the store of each setting."""
        return [(s, Measurements(lab)) for s, lab in zip(self.settings, self.labs, strict=True)]

    @property
    def own(self) -> Measurements:
        """What is in the store of the study's own settings."""
        return self.measured[0][1]

    def jobs(self) -> list[tuple[Lab, list[Job]]]:
        """What is to be computed, in order: seed by seed, and in each of them setting by setting."""
        return [
            (lab, [job for job in all_jobs(lab.profile) if job.run.seed == seed])
            for seed in self.profile.seeds
            for lab in self.labs
        ]

    def borrow(self) -> None:
        """Take from the store of the profile that the study extends what fine-tunings it has of the study's:
        those of equal keys.
        """
        there = Store(self.labs[0].directory.parent / Path(self.plan.extends or "").stem / "store")
        for lab, run in {(lab, job.run) for lab, wanted in self.jobs() for job in wanted}:
            parcel = there.parcel(*lab.address("finetune", run_spec(run)))
            if parcel and parcel.files:  # without weights, as from an archive, it is of no use
                lab.store.take(parcel)

    def compute(self) -> list[Outcome]:
        """Compute what is missing; failures are among the outcomes."""
        self.borrow()
        with workers_kept(self.labs[0].is_small()):
            return [outcome for lab, wanted in self.jobs() for outcome in lab.compute(wanted)]

    def missing(self) -> list[tuple[Lab, Job]]:
        """The jobs without all their results; of those that settings have in common, each setting's."""
        return [(lab, job) for lab, wanted in self.jobs() for job in wanted if not lab.is_done(job)]

    def is_small(self) -> bool:
        """Whether what is missing takes less than SMALL, by a rough estimate."""
        return sum(expected_seconds(lab.profile, job) for lab, job in self.missing()) < SMALL

    def fingerprint(self) -> str:
        """Equal while the results, and what is asked for, are the same."""
        return digest(*([lab.fingerprint(job) for job in wanted] for lab, wanted in self.jobs()))

    def state(self) -> str:
        """In a sentence: how much is there, and the command that computes the rest."""
        everything, missing = sum(len(wanted) for _, wanted in self.jobs()), len(self.missing())
        done = f"Study {self.profile.name}: {everything - missing} of {everything} jobs are done"
        name = self.profile.name if self.path.parent == SHIPPED else self.path
        return f"{done}; `python -m qtale_lib study {name}` computes the others." if missing else f"{done}."

    def keep(self, table: Table, folder: Path, root: Path = ROOT) -> Table | Committed:
        """The table, saved; where it holds no number, the committed reference's, or a sentence."""
        if len(table.frame):
            return save(table, folder)
        reference = root / "results" / "reference" / self.profile.name / "tables" / f"{table.name}.md"
        if reference.is_file():
            note = "*The committed reference run's; here nothing of the study is computed.*\n\n"
            return Committed(note + reference.read_text(encoding="utf-8"))
        return Committed(f"**{table.caption}**\n\n*{self.state()}*\n")

    def picture(self, name: str, drawn: Path, root: Path = ROOT) -> Path:
        """The PNG to show: the one drawn, or the committed reference's while nothing is computed."""
        reference = root / "figures" / "reference" / self.profile.name / f"{name}.png"
        return reference if self.own.evaluations.empty and reference.is_file() else drawn


def study_of(notebook: str, profile: str = "tiny", root: Path | None = None, **overrides: Any) -> Study:
    """The study that a notebook shows: the one that `profile` is the path of, else the shipped one at the
    size of the profile (sweeps/<study>.<profile>.yaml), else the shipped one.

    Raises:
        UserError: as for profiles; also for a study's YAML that another notebook shows.
    """
    if is_study(profile):
        study = Study(Path(profile), root, **overrides)
        if study.plan.notebook != notebook:
            raise study.plan.refusal("notebook", f"is not {notebook}, which was asked to show this study")
        return study
    small = SHIPPED / f"{NAMES[notebook]}.{profile}.yaml"
    return Study(small if small.is_file() else SHIPPED / f"{NAMES[notebook]}.yaml", root, **overrides)


def is_study(name: str) -> bool:
    """Whether this is the path of a YAML that is a study (or extends one), and no plain profile."""
    return str(name).endswith((".yaml", ".yml")) and sets(name, "notebook")


def find(name: str, root: Path | None = None) -> Study:
    """A study by the name of a shipped one, or by its path.

    Raises:
        UserError: if there is none, or it is no study.
    """
    if str(name).endswith((".yaml", ".yml")):
        return Study(Path(name), root)
    there = sorted(path.stem for path in SHIPPED.glob("*.yaml") if sets(path, "notebook"))
    if name not in there:
        raise UserError(f"{name} is no study's name; there are {', '.join(there)}, and your own by its path.")
    return Study(SHIPPED / f"{name}.yaml", root)


def labs(name: str) -> list[Lab]:
    """The labs of a study, by name or path; of a profile, its own."""
    shipped = SHIPPED / f"{name}.yaml"
    if is_study(name) or (shipped.is_file() and is_study(str(shipped))):
        return find(name).labs
    return [Lab(name)]
