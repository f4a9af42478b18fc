"""Commands about what a profile leaves: export, report, show, publish, archive, restore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qtale_lib import archive as archives
from qtale_lib import studies
from qtale_lib.cli.common import ProfileName, app, short
from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs, computing
from qtale_lib.publishing import publish as publish_profile


@app.command()
def export(
    profile: ProfileName = "tiny",
    figure: Annotated[str | None, typer.Option(help="Its number, or its file's name.")] = None,
    table: Annotated[str | None, typer.Option(help="Its number, or its file's name.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="pdf, png, svg or pgf; latex, markdown or csv.")
    ] = None,
    width: Annotated[str | None, typer.Option(help="Of a figure, such as 3.25in or 8.25cm.")] = None,
    font: Annotated[str | None, typer.Option(help="Of a figure: an installed family.")] = None,
    size: Annotated[float | None, typer.Option(help="Of a figure's smallest text, in points.")] = None,
    palette: Annotated[
        str | None, typer.Option(help="okabe-ito, tol, grey, or five colours with commas between them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
) -> None:
    """Draw a figure for a paper, or copy a table out, from a profile's results or the committed ones."""
    if (figure is None) == (table is None):
        raise UserError("Name one to export: --figure 3, or --table 1.")
    from qtale_lib import exporting  # loads matplotlib

    lab = studies.labs(profile)[0]
    if figure is not None:
        look = exporting.Look(width and exporting.inches(width), font, size, palette)
        written = exporting.export_figures(lab, figure, form or "pdf", look, out)
    else:
        written = exporting.export_tables(lab, table, form or "latex", out)
    for path in written:
        typer.echo(str(path))


@app.command()
def report(profile: ProfileName = "tiny") -> None:
    """Write a static page of what the executed notebooks of a profile show, under a scoreboard."""
    from qtale_lib.report import build  # loads matplotlib and nbconvert

    typer.echo(f"report: {short(build(studies.labs(profile)[0]))}")


@app.command(name="show")
def show_origin(
    name: Annotated[list[str], typer.Argument(help="Such as table 1, figure_7_flips, or a result's key.")],
    profile: ProfileName = "tiny",
) -> None:
    """Tell where a result, a table or a figure comes from: its settings, data, commit, machine, versions."""
    from qtale_lib import origins  # loads matplotlib

    console = Console(highlight=False, soft_wrap=True)
    for origin in origins.find(studies.labs(profile), " ".join(name)):
        console.print(origin.title, style="bold", markup=False)
        for label, text in origin.facts.items():
            console.print(f"  {label:<14} {text}", markup=False)
        for result in origin.made_from:
            console.print(f"  {'from':<14} {result}", markup=False)


@app.command()
def publish(profile: str) -> None:
    """Copy a finished profile's results, tables and figures to results/reference and figures/reference.

    Of a study, by name or path: its tables and figures, and the results of its own settings.
    """
    lab, *others = studies.labs(profile)
    for path in publish_profile(lab, others=others):
        typer.echo(short(path))


@app.command()
def archive(profile: str) -> None:
    """Write the results of a profile's or study's finished seeds, without weights, to results/archive."""
    lab, *others = studies.labs(profile)
    for path in archives.archive(lab, others=others):
        typer.echo(f"{short(path)}  {path.stat().st_size / 2**20:.1f} MiB")


@app.command()
def restore(profile: str) -> None:
    """Put what results/archive holds of a profile, or of a study, into its store."""
    lab, *others = studies.labs(profile)
    typer.echo(f"{archives.restore(lab)} results restored to {short(lab.store.root)}")
    done = [own.is_done(job) for own in (lab, *others) for job in all_jobs(own.profile)]
    typer.echo(f"{sum(done)} of {len(done)} jobs of profile {lab.profile.name} are done")
    if not any(done):
        typer.echo(
            "The archive was made from another base, with other settings or by an older version: "
            f"`{computing(profile, is_study=bool(others))}` will compute its results again."
        )
