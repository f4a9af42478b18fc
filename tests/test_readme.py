"""The README says what is there: its numbers are the committed ones, and commands, notebooks, files exist."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import typer

from qtale_lib import cli, estimates, workload
from qtale_lib.cli import app
from qtale_lib.config import load_profile
from qtale_lib.efficiency import ON_THE_HUB
from qtale_lib.errors import DamagedError, MachineError, UserError
from qtale_lib.estimates import Speed
from qtale_lib.jobs import Run, all_jobs, needs
from qtale_lib.notebooks import choose
from qtale_lib.profile_files import SHIPPED
from qtale_lib.provenance import ROOT
from qtale_lib.store import read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROFILE = re.search(r"^## What a run of `(.+)` shows$", README, re.M)[1]
METHODS = {"D-LLM": "no", "QTALE": "yes"}  # entropy loss?
GROUPS = {"CSQA": ("csqa", "avg"), "MMLU": ("mmlu", "mmlu"), "Alpaca": ("alpaca", "alpaca_ppl")}


def table(name: str, *keys: str) -> pd.Series:
    folder = ROOT / "results" / "reference" / PROFILE / "tables"
    return pd.read_csv(folder / f"{name}.csv", dtype={"theta": str}).set_index(list(keys)).value


def test_its_results_are_those_of_the_committed_tables():
    accuracy = table("table_1_2_accuracy", "bits", "method", "task")
    ablation = table("table_4_ablation", "bits", "entropy_loss", "theta", "group")
    head, _, *rows = re.search(r"\| \| CSQA, .*?\n\n", README, re.S)[0].strip().splitlines()
    columns = re.findall(r"(CSQA|MMLU|Alpaca)[^|]*, (\d+) → (\d+) bits", head)
    assert len(columns) == 3 and len(rows) >= 3
    for row in rows:
        label, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        method, _, theta = label.partition(", θ ")
        for (name, *widths), cell in zip(columns, cells, strict=True):
            group, task = GROUPS[name]
            for bits, said in zip(map(int, widths), cell.split(" → "), strict=True):
                if method == "Full":
                    value = accuracy[bits, "full", task]
                else:
                    value = ablation[bits, METHODS[method], "adjust" if theta == "searched" else theta, group]
                assert said == f"{value:.{len(said.partition('.')[2])}f}", (label, name, bits)


def test_verdicts_and_minutes_of_notebooks_are_those_of_the_committed_runs():
    reference, tiny = ROOT / "results" / "reference", load_profile("tiny")
    verdicts = pd.read_csv(reference / PROFILE / "tables" / "claims.csv", dtype={"notebook": str})
    results = read_json(reference / "tiny" / "results.json")
    rows = re.findall(r"^\| `(\d\d_\w+)` \|.*\| (.*) \| (\d+) \|$", README, re.M)
    assert sorted(name for name, *_ in rows) == sorted(book.stem for book in choose())
    for name, said, minutes in rows:
        counted = verdicts[verdicts.notebook == name[:2]].verdict.value_counts()
        told = {verdict: int(count) for count, verdict in re.findall(r"(\d+) ([a-z ]+)", said)}
        assert told == {v.removesuffix(" here"): count for v, count in counted.items()}, name
        jobs = needs(tiny, f"{name}.ipynb")
        runs, cells = {job.run for job in jobs}, {(job.run, job.bits) for job in jobs if job.bits}
        seconds = 0.0
        for kind in ("finetune", "threshold", "evaluation"):
            for result in results[kind]:
                spec = result["spec"]
                run = Run(spec["task"], spec["method"], spec["seed"])
                if run in runs if kind == "finetune" else (run, spec["bits"]) in cells:
                    seconds += result["provenance"]["seconds"]
        assert int(minutes) == round(seconds / 2 / 60), name


def test_its_estimates_are_the_estimators():
    """Each row of the profiles' table: time and peak of every stage, disk of results and base."""
    gpu = Speed(400e12, 50e12, 1)  # as its text says
    rows = dict(re.findall(r"^\| `([\w.-]+)` \|(.*) \|$", README, re.M))
    hub_profiles = [
        path.stem for path in SHIPPED.glob("*.yaml") if load_profile(path.stem).base in ON_THE_HUB
    ]
    assert len(hub_profiles) >= 5
    for name in hub_profiles:
        profile = load_profile(name)
        shape, jobs = ON_THE_HUB[profile.base], all_jobs(profile)
        work = [workload.typical(profile, task) for task in profile.tasks]
        found = estimates.stages(profile, shape, work, jobs, "gpu", gpu)
        cells = [f"{estimates.roughly(stage.seconds)}, {stage.peak / 2**30:.0f} GiB" for stage in found]
        disk = estimates.results_bytes(profile, shape, work, jobs), estimates.download_bytes(shape)
        cells.append(" + ".join(f"{size / 2**30:.1f}" for size in disk) + " GiB")
        assert [cell.strip() for cell in rows[profile.name].split("|")] == cells


def test_every_command_that_it_names_is_one():
    commands = set(typer.main.get_command(app).commands)
    named = set(re.findall(r"python -m qtale_lib (\w[\w-]*)", README))
    assert named and named <= commands


def test_it_lists_every_notebook_once_and_no_other():
    named = re.findall(r"^\| `(\d\d_\w+)`", README, re.M)
    assert named == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("place", sorted(set(re.findall(r"\]\(([\w./-]+)\)|src=\"([^\"]+)\"", README))))
def test_every_file_that_it_points_at_is_there(place):
    assert (ROOT / next(filter(None, place))).is_file()


def test_what_is_promised_names_the_exit_codes_and_tests_that_there_are():
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\d+)[\d, ]* \| (.+) \|$", promises, re.M))
    told = dict(re.findall(r"^(\d+)[\d, ]*: ([^;,]+)[;,.]", cli.__doc__, re.M))
    assert listed.keys() == told.keys() | {"0"}
    for error in (UserError, DamagedError, MachineError):
        said = told[str(error.exit_code)].split(":")[0]
        assert said in listed[str(error.exit_code)] and said.lower() in error.__doc__.lower()
    named = set(re.findall(r"`(test_\w+\.py)`", promises))
    assert len(named) > 8 and named <= {path.name for path in (ROOT / "tests").glob("test_*.py")}
