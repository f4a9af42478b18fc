"""The command bench."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qtale_lib import benchmark_report
from qtale_lib.cli.common import ProfileName, app, check_writable, print_table, short
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.store import write_json


@app.command()
def bench(
    shape: Annotated[
        str, typer.Option(help="tinyllama-1.1b, llama-3.1-8b (GPU) or tiny.")
    ] = "tinyllama-1.1b",
    parts: Annotated[str, typer.Option(help="What to time.")] = "passes,training,search,evaluation",
    prefill: Annotated[str | None, typer.Option(help="Prompt lengths, such as 32,512; or none.")] = None,
    decode: Annotated[str | None, typer.Option(help="Batches, such as 1,16; or none.")] = None,
    formats: Annotated[str, typer.Option(help="Of the weights.")] = "bf16,int4,int4-head",
    ratios: Annotated[str, typer.Option(help="Shares of the routed layers that run.")] = "0.25,0.5,0.75,1",
    repeats: Annotated[int | None, typer.Option(help="Rounds over all variants.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens before the first decoded one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch; its own choice if not given.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Leave out rounds, but one, and searches to end in about so long.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, if not the shape's own.")] = None,
    profile: ProfileName = "tiny",
    out: Annotated[Path | None, typer.Option(help="The JSON, if not in the profile's results.")] = None,
) -> None:
    """Time skipping and packed weights beside the plain model and one with layers removed; a training step,
    the AWQ search and scoring beside what they are held against.
    """
    from qtale_lib.benchmark import Settings
    from qtale_lib.benchmark import bench as measure  # loads torch

    numbers = {"prefill": _listed("prefill", prefill, int), "decode": _listed("decode", decode, int)}
    settings = Settings(
        shape, _listed("parts", parts, str), **numbers,
        formats=_listed("formats", formats, str), ratios=_listed("ratios", ratios, float),
        repeats=repeats, context=context, threads=threads, seconds=seconds, device=device,
    ).complete()  # fmt: skip
    lab = Lab(profile)
    path = out or benchmark_report.folder(lab) / f"{shape}.json"
    check_writable(path)
    unfinished = benchmark_report.unfinished(path)
    typer.echo(f"what is measured is kept, until all is, in {short(unfinished.resolve())}")
    result = measure(settings, typer.echo, partial(write_json, unfinished), lab)
    write_json(path, result)
    unfinished.unlink(missing_ok=True)
    for table in benchmark_report.printed(result):
        print_table(table)
    typer.echo(f"result: {short(path.resolve())}")


def _listed(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    """Values with commas between them; none is no value, and None stays it."""
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        raise UserError(f'--{option} (= "{text}") must be numbers with commas between them.') from None
