"""The app, the options that commands share, and how they print."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qtale_lib import tables
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run
from qtale_lib.lab import Lab
from qtale_lib.pool import Outcome
from qtale_lib.progress import short
from qtale_lib.store import replaced

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

ProfileName = Annotated[str, typer.Option("--profile", help="A shipped profile's name, or a YAML file.")]
DataDirectory = Annotated[Path | None, typer.Option(help="Folder with the benchmarks' original files.")]


def one_run_of(profile: str, task: str, method: str, seed: int) -> tuple[Lab, Run]:
    """The lab and the run; a value that no profile could have is refused as one in a profile is."""
    chosen = load_profile(profile, tasks=[task], methods=[method], seeds=[seed])
    return Lab(chosen), Run(task, method, seed)


def ensure(lab: Lab, jobs: list[Job]) -> None:
    stop_if_failed(lab, lab.compute(jobs))


def stop_if_failed(lab: Lab, outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    if failed:
        raise failure(lab, failed)


@contextlib.contextmanager
def removing() -> Iterator[None]:
    """UserError where a file cannot be removed."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be removed ({error.strerror}); allow it, or leave out --fresh."
        ) from None


def check_writable(path: Path) -> None:
    """UserError before the work, for what would fail after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out (= {path}) cannot be written ({error.strerror}).") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out (= {path}) cannot be written; name a file in a folder of yours.")


def print_table(table: tables.Table) -> None:
    shown = Table(*map(str, table.text.columns), title=table.caption)
    for row in table.text.astype(str).values.tolist():
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)


def show(title: str, values: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        table.add_row(name, _text(value))
    Console().print(table)


def show_beside(title: str, values: dict[str, Any], others: dict[str, Any]) -> None:
    table = Table("", "here", "committed", "difference", title=title)
    for name, value in values.items():
        other = others.get(name)
        numbers = all(isinstance(number, int | float) for number in (value, other))
        table.add_row(name, _text(value), _text(other), _text(value - other) if numbers else "")
    Console().print(table)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def failure(lab: Lab, failed: list[Outcome]) -> typer.Exit:
    """The exit of a run with failures, their errors kept: a refusal's if all that failed was refused."""
    _keep_details(lab, failed)
    codes = [outcome.refused for outcome in failed if outcome.status == "failed"]
    return typer.Exit(max(codes) if all(codes) else 1)


def _keep_details(lab: Lab, failed: list[Outcome]) -> None:
    text = "\n\n".join(f"{outcome.name}\n{outcome.detail or outcome.error}" for outcome in failed)
    path = lab.directory / "failures.txt"
    try:
        with replaced(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError:  # a full disk may be why they failed
        typer.echo(f"{len(failed)} failed; the first, {failed[0].name}: {failed[0].error}", err=True)
    else:
        typer.echo(f"{len(failed)} failed; the full errors are in {short(path)}", err=True)
