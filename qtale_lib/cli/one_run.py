"""Commands about one fine-tuning: train, quantize, calibrate, evaluate, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qtale_lib.cli.common import (
    ProfileName,
    app,
    check_writable,
    ensure,
    one_run_of,
    removing,
    short,
    show,
    show_beside,
)
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, rules
from qtale_lib.lab import run_spec
from qtale_lib.preflight import check
from qtale_lib.publishing import cell, committed, sameness

TaskName = Annotated[str, typer.Argument(help="Such as arc_easy.")]
MethodName = Annotated[str, typer.Argument(help="full, dllm or qtale.")]
SeedNumber = Annotated[int, typer.Option("--seed", min=0)]
BitWidth = Annotated[int, typer.Option("--bits")]

ANEW = (
    "Forget this run's fine-tuning and its results at this bit width, and compute them anew; if another "
    "adapter comes of it, the run's results at other bit widths count no more."
)
SHOWN = (
    *("theta", "metric", "acc", "expected_acc", "open_acc", "ppl", "stderr", "count", "nll"),
    *("execution_ratio", "loss_ratio"),
)


@app.command()
def train(task: TaskName, method: MethodName, profile: ProfileName = "tiny", seed: SeedNumber = 0) -> None:
    """Fine-tune one run, if it is not in the store, and show how it went.

    On several GPUs of this machine: set compute.processes in the profile; they are started from here.
    """
    lab, chosen = one_run_of(profile, task, method, seed)
    ensure(lab, [Job(chosen)])
    value = lab.result("finetune", **run_spec(chosen))["value"]
    last = value["history"][-1]
    show(f"Fine-tuning of {chosen.name}", {**{k: last[k] for k in last}, "rows": value["rows"]})
    typer.echo(f"adapter: {short(lab.files('finetune', run_spec(chosen)))}")


@app.command()
def quantize(
    task: TaskName,
    method: MethodName,
    bits: BitWidth = 4,
    profile: ProfileName = "tiny",
    seed: SeedNumber = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the packed model, for load_packed.")] = None,
) -> None:
    """Merge and quantize one run and show the search's errors."""
    lab, chosen = one_run_of(profile, task, method, seed)
    if bits >= 16:
        raise UserError("A 16-bit model is not quantized; choose --bits 8, 4, 3 or 2.")
    if out is not None:
        check_writable(out / "packed.json")
    ensure(lab, [Job(chosen), Job(chosen, bits)])
    report = lab.result("quantization", **run_spec(chosen, bits=bits))["value"]
    errors = [row["error"] / row["power"] for row in report["linears"] if row.get("power")]
    show(
        f"{report['method']} of {chosen.name} at {bits} bit",
        {
            "linears": len(report["linears"]),
            "group size": report["group_size"],
            "mean error, share of output power": sum(errors) / max(len(errors), 1),
        },
    )
    typer.echo(f"search: {short(lab.files('quantization', run_spec(chosen, bits=bits)))}")
    if out is not None:
        from qtale_lib.stages import write_packed  # loads torch

        write_packed(lab, chosen, bits, out)
        typer.echo(f"packed model: {short(out.resolve())}")


@app.command()
def calibrate(
    task: TaskName,
    method: MethodName,
    bits: BitWidth = 16,
    profile: ProfileName = "tiny",
    seed: SeedNumber = 0,
) -> None:
    """Search θ for one run at one bit width and show both curves."""
    lab, chosen = one_run_of(profile, task, method, seed)
    if not chosen.routed:
        raise UserError("A full model has no routers and so no θ; choose dllm or qtale.")
    ensure(lab, [Job(chosen), Job(chosen, bits)])
    found = lab.result("threshold", **run_spec(chosen, bits=bits))["value"]
    table = Table(
        "θ", "score", "execution ratio", title=f"θ = {found['theta']} for {chosen.name}, {bits} bit"
    )
    for point in sorted((*found["coarse"], *found["fine"]), key=lambda point: point["theta"]):
        table.add_row(f"{point['theta']:.3f}", f"{point['score']:.4f}", f"{point['execution_ratio']:.3f}")
    Console().print(table)


@app.command()
def evaluate(
    task: TaskName,
    method: MethodName,
    bits: BitWidth = 16,
    profile: ProfileName = "tiny",
    seed: SeedNumber = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help=ANEW)] = False,
) -> None:
    """Evaluate one run at one bit width, by every rule for θ, beside what is committed of it."""
    lab, chosen = one_run_of(profile, task, method, seed)
    wanted = [Job(chosen), Job(chosen, bits)]
    if fresh:
        check(lab, wanted, afresh=True)
        with removing():
            lab.forget(wanted)
    ensure(lab, wanted)
    reference = committed(lab.profile.name)
    specs = {rule: run_spec(chosen, bits=bits, theta=rule) for rule in rules(lab.profile, method)}
    compared = []  # a result here, and the committed one
    for rule, spec in specs.items():
        found, title = lab.result("evaluation", **spec), f"{chosen.name}, {bits} bit, θ {rule}"
        values = {name: found["value"][name] for name in SHOWN if found["value"].get(name) is not None}
        other = reference.get(cell("evaluation", spec))
        if other is None:
            show(title, values)
        else:
            show_beside(title, values, other["value"])
            compared.append((found, other))
    if compared:
        trained = run_spec(chosen)
        adapters = lab.result("finetune", **trained), reference[cell("finetune", trained)]
        typer.echo(sameness([adapters, *compared]))
    else:
        typer.echo(
            f"Of this run, results/reference holds nothing at {bits} bit for profile {lab.profile.name}."
        )


@app.command()
def generate(
    task: TaskName,
    method: MethodName,
    prompt: Annotated[str, typer.Option(help="The text to go on from, fed as it stands.")],
    bits: BitWidth = 16,
    theta: Annotated[float | None, typer.Option(help="θ; the searched one if not given.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the text, at most.")] = 100,
    profile: ProfileName = "tiny",
    seed: SeedNumber = 0,
) -> None:
    """Continue a text by one run at one bit width, greedily, skipping what its routers bypass."""
    lab, chosen = one_run_of(profile, task, method, seed)
    if theta is not None and not chosen.routed:
        raise UserError(
            "A full model has no routers and so no θ; leave out --theta, or choose dllm or qtale."
        )
    ensure(lab, [Job(chosen), Job(chosen, bits)])
    from qtale_lib import stages  # loads torch

    made, used = stages.generate_text(lab, chosen, bits, prompt, theta, tokens)
    typer.echo(prompt + made.text)
    ratio = (
        "" if made.execution_ratio is None else f"; execution ratio {made.execution_ratio:.3f} at θ {used}"
    )
    typer.echo(f"{chosen.name}, {bits} bit: {made.tokens} tokens{ratio}", err=True)
