"""Commands about a whole profile: run, doctor, status."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qtale_lib import benchmark_report, report_stamp, studies
from qtale_lib.cli.common import DataDirectory, ProfileName, app, failure, removing, short
from qtale_lib.cluster import compute as compute_on_cluster
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, wanted_by
from qtale_lib.lab import Lab
from qtale_lib.log import logged, path_in
from qtale_lib.notebooks import AT_ONCE, Executions, as_task, choose
from qtale_lib.pool import Outcome, workers_kept
from qtale_lib.preflight import check
from qtale_lib.progress import Stopclock, span, watcher
from qtale_lib.status import describe as describe_status
from qtale_lib.store import discard, locked

FRESH = (
    "Compute anew: forget all results and figures of this profile first; with --only, the results alone that "
    "those notebooks show."
)
CLUSTER = "Spread the runs over a Ray cluster: local, auto, or its address."


@app.command()
def run(
    profile: ProfileName = "tiny",
    data_dir: DataDirectory = None,
    only: Annotated[str | None, typer.Option(help="Numbers of the notebooks, such as 03,05.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds 0 … N-1 instead of the profile's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=FRESH)] = False,
    cluster: Annotated[str | None, typer.Option(help=CLUSTER)] = None,
) -> None:
    """Compute what is missing, execute the notebooks that are not up to date, write their report."""
    given = {"data_dir": data_dir and str(data_dir.resolve()), "seeds": seeds}
    overrides = {name: value for name, value in given.items() if value is not None}
    lab, books = Lab(load_profile(profile, **overrides)), choose(only)
    wanted = wanted_by(lab.profile, [book.name for book in books])
    parameters = {name.upper(): value for name, value in {"profile": portable(profile), **overrides}.items()}
    if fresh:
        _forget(Executions(lab, parameters), wanted, None if only is None else books)
        lab = Lab(lab.profile)
    try:
        with logged(lab.directory) as log:
            clock = Stopclock(log)
            outcomes = _compute(lab, wanted, clock, cluster)
            executions = Executions(lab, parameters)
            outcomes += _compute_studies(executions, books, clock)
            outcomes += execute(executions, books, clock)
            outcomes += _write_report(lab, clock)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command{' without --fresh' * fresh} goes on from here.", err=True)
        raise typer.Exit(130) from None
    finish(lab, outcomes, clock)


def _forget(executions: Executions, wanted: list[Job], only: list[Path] | None) -> None:
    """Remove what is to be made anew: all of the profile, or the jobs and notebooks wanted.

    Raises:
        UserError: for what would fail afterwards, before anything is removed; or if that is impossible.
    """
    lab = executions.lab
    check(lab, wanted, afresh=True)
    with removing():
        if only is None:
            discard(lab.directory)
            discard(lab.figures)
        else:
            if _shows_bench(only):
                discard(benchmark_report.folder(lab))
            lab.forget(wanted)
            executions.forget(only)


def portable(profile: str) -> str:
    """A profile as a notebook may be given it, whose folder is another."""
    return str(Path(profile).resolve()) if profile.endswith((".yaml", ".yml")) else profile


def _compute(lab: Lab, jobs: list[Job], clock: Stopclock, address: str | None) -> list[Outcome]:
    outcomes = lab.compute(jobs) if address is None else compute_on_cluster(lab, jobs, address)
    trained = sum(outcome.seconds for outcome in outcomes if outcome.name.startswith("fine-tune"))
    rest = sum(outcome.seconds for outcome in outcomes) - trained
    note = f"{len(outcomes)} jobs, {len(jobs) - len(outcomes)} there already"
    if outcomes:
        note += f"; summed over workers: fine-tuning {span(trained)}, quantization to evaluation {span(rest)}"
    clock.lap("runs", note)
    return outcomes


def _compute_studies(executions: Executions, books: list[Path], clock: Stopclock) -> list[Outcome]:
    """Those of the notebooks' studies that take minutes; for the others there is a command, study."""
    shown = {study.profile.name: study for book in books for study in executions.studies(book)}
    with workers_kept(executions.lab.is_small()):
        outcomes = [outcome for study in shown.values() if study.is_small() for outcome in study.compute()]
    if outcomes:
        clock.lap("studies", f"{len(outcomes)} jobs; longer ones by `python -m qtale_lib study`")
    return outcomes


def execute(executions: Executions, books: list[Path], clock: Stopclock) -> list[Outcome]:
    """Execute the notebooks that are not up to date."""
    outcomes = _bench_if_missing(executions.lab, clock) if _shows_bench(books) else []
    stale = executions.stale(books)
    if stale:
        with watcher([as_task(book) for book in stale], AT_ONCE, executions.lab.directory) as watching:
            outcomes += executions.execute(stale, watching)
    clock.lap("notebooks", f"{len(stale)} executed, {len(books) - len(stale)} up to date")
    return outcomes


def _shows_bench(books: list[Path]) -> bool:
    return any(book.name[:2] == benchmark_report.NOTEBOOK for book in books)


def _bench_if_missing(lab: Lab, clock: Stopclock) -> list[Outcome]:
    """Before the notebooks, which take the cores: a short benchmark of the shape tiny, if there is none."""
    if benchmark_report.stored(lab) is not None:
        return []
    try:
        benchmark_report.of_profile(lab)
    except UserError as error:
        return [Outcome("bench", "failed", error=str(error))]
    finally:
        clock.lap("benchmark", "of the shape tiny; others by `python -m qtale_lib bench`")
    return []


def _write_report(lab: Lab, clock: Stopclock) -> list[Outcome]:
    """Of all the profile's executed notebooks; alone at it, where several reproductions share results."""
    started, note = time.monotonic(), "not written"
    try:
        with locked(lab.store.root / "locks" / "report"):
            if report_stamp.is_current(lab):
                note = f"up to date: {short(report_stamp.folder(lab) / 'index.html')}"
            else:
                from qtale_lib import report  # loads matplotlib and nbconvert

                note = short(report.build(lab))
        return []
    except UserError as error:
        return [Outcome("report", "failed", time.monotonic() - started, str(error), refused=error.exit_code)]
    except Exception as error:  # what is computed stands, and is told of
        reason = f"{type(error).__name__}: {error}"
        return [Outcome("report", "failed", time.monotonic() - started, reason, traceback.format_exc())]
    finally:
        clock.lap("report", note)


def finish(lab: Lab, outcomes: list[Outcome], clock: Stopclock) -> None:
    """Say what was done and where it lies; typer.Exit if something failed."""
    console = Console(highlight=False, soft_wrap=True)
    for stage, seconds, note in clock.stages:
        console.print(f"{stage:<10} {span(seconds):>12}   {note}", markup=False)
    console.print(f"tables and executed notebooks: {short(lab.directory)}", markup=False)
    console.print(f"figures: {short(lab.figures)}", markup=False)
    console.print(f"log: {short(path_in(lab.directory))}", markup=False)
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    for outcome in failed:
        console.print(f"{outcome.status.upper()} {outcome.name}: {outcome.error}", style="red", markup=False)
    if failed:
        raise failure(lab, failed)


@app.command()
def doctor(profile: ProfileName = "tiny", data_dir: DataDirectory = None) -> None:
    """Look at all that a profile needs here, and estimate its time, memory and disk; nothing is computed."""
    from qtale_lib.doctor import examine

    overrides = {} if data_dir is None else {"data_dir": str(data_dir.resolve())}
    lines = examine(Lab(load_profile(profile, **overrides)))
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        style = {"ok": "green", "warning": "yellow", "refusal": "red"}[line.status]
        console.print(f"[{style}]{line.status:<8}[/] {line.subject:<20} {escape(line.text)}")
    if any(line.status == "refusal" for line in lines):
        raise typer.Exit(UserError.exit_code)


@app.command()
def status(profile: ProfileName = "tiny") -> None:
    """How far a profile or study is, what runs now or ran last, and where its results lie."""
    for line in describe_status(studies.labs(profile)):
        typer.echo(line)
