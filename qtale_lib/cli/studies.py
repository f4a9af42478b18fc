"""Commands that compare settings and bases: sweep, study, density, pretrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from qtale_lib import studies, sweep, tables
from qtale_lib.cli.common import ProfileName, app, print_table, short, stop_if_failed
from qtale_lib.cli.reproduction import execute, finish, portable
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.log import logged
from qtale_lib.notebooks import Executions, choose
from qtale_lib.progress import Stopclock


@app.command(name="sweep")
def sweep_recipe(
    path: Annotated[Path, typer.Argument(help="Its YAML; the shipped one if not given.")] = sweep.RECIPE,
) -> None:
    """Vary each factor of a recipe alone, on validation questions, and show what it does."""
    asked = sweep.load_sweep(path)
    outcomes = sweep.compute(asked)
    lab = Lab(sweep.settings(asked)[0].profile)
    print_table(tables.save(sweep.table(asked), lab.tables))
    typer.echo(f"table: {short(lab.tables)}")
    stop_if_failed(lab, outcomes)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A shipped study's name, or a YAML file.")],
) -> None:
    """Compute what is missing of a study, then execute its notebook; the YAML says how long it takes."""
    asked = studies.find(name)
    executions = Executions(asked.labs[0], {"PROFILE": portable(str(asked.path))})
    try:
        with logged(executions.lab.directory) as log:
            clock = Stopclock(log)
            outcomes = asked.compute()
            clock.lap("runs", f"{len(outcomes)} jobs")
            outcomes += execute(executions, choose(asked.plan.notebook), clock)
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    finish(executions.lab, outcomes, clock)


@app.command()
def density(
    path: Annotated[Path | None, typer.Argument(help="Its YAML; the shipped one if not given.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of pretraining.")] = 1,
) -> None:
    """Pretrain bases of several sizes on the embedded world and show what quantization costs each; hours."""
    from qtale_lib import density as room  # loads matplotlib
    from qtale_lib import figures

    study = room.load_study(path or room.STUDY)
    outcomes = room.compute(study, threads, typer.echo)
    lab, table = Lab(room.profile_of(study, study.bases[0])), room.table(study)
    print_table(tables.save(table, lab.tables))
    figures.save(room.figure(table.frame), room.losses(table.frame), "density", lab.figures)
    typer.echo(f"table: {short(lab.tables)}, figure: {short(lab.figures)}")
    stop_if_failed(lab, outcomes)


@app.command()
def judge(
    profile: ProfileName = "tiny",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before what costs money.")] = False,
) -> None:
    """Ask the profile's judge which responses are better (notebook 12); shows first what that will take."""
    from qtale_lib import judges, win_rates

    lab = Lab(profile)
    asked, pairs = judges.judge_of(lab), win_rates.to_judge(lab)
    if not pairs:
        raise UserError(
            f"There are no responses to judge; run `python -m qtale_lib run --profile {profile} --only 12`."
        )
    estimate = asked.estimate(pairs)
    typer.echo(estimate or f"Nothing is left to ask {asked.name}.")
    if not estimate:
        return
    if not yes:
        typer.confirm("Ask?", abort=True)
    with Progress(transient=True) as progress:
        bar = progress.add_task("asking", total=1.0)
        asked.ask(pairs, lambda share: progress.update(bar, completed=share))
    typer.echo(f"judged by {asked.name}; notebook 12 shows it")


@app.command()
def pretrain(
    profile: ProfileName = "tiny",
    tokens: Annotated[int | None, typer.Option(help="Length, if not the whole recipe.")] = None,
    directory: Annotated[Path | None, typer.Option(help="Where to, if not over the shipped base.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Pretrain the embedded base model anew; takes half an hour or more."""
    if load_profile(profile).base != "microworld":
        raise UserError(
            f"Profile {profile} does not use the embedded base; only that one is pretrained here."
        )
    from qtale_lib.data.microworld.pretrain import main as pretrain_base

    pretrain_base(directory, tokens, threads)
