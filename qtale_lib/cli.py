"""The command line: `python -m qtale_lib run` computes every run, then executes the notebooks.

What a user can cause ends in one sentence on stderr and exit code 2; what failed on the way, in exit code 1.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtale_lib import archive as archives
from qtale_lib import benchmark_report, sweep, tables
from qtale_lib.cluster import compute as compute_on_cluster
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run, all_jobs, needs, rules
from qtale_lib.lab import Lab, run_spec
from qtale_lib.notebooks import AT_ONCE, Executions, as_task, choose
from qtale_lib.pool import Outcome
from qtale_lib.preflight import check
from qtale_lib.progress import Stopclock, span, watcher
from qtale_lib.publishing import cell, committed, sameness
from qtale_lib.publishing import publish as publish_profile
from qtale_lib.store import discard, write_json

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ProfileName = Annotated[str, typer.Option("--profile", help="A shipped profile's name, or a YAML file.")]
DataDirectory = Annotated[Path | None, typer.Option(help="Folder with the benchmarks' original files.")]
TaskName = Annotated[str, typer.Argument(help="Such as arc_easy.")]
MethodName = Annotated[str, typer.Argument(help="full, dllm or qtale.")]
SeedNumber = Annotated[int, typer.Option("--seed", min=0)]
BitWidth = Annotated[int, typer.Option("--bits")]

FRESH = (
    "Compute anew: forget all results and figures of this profile first; with --only, the results alone that "
    "those notebooks show."
)
ANEW = (
    "Forget this run's fine-tuning and its results at this bit width, and compute them anew; if another "
    "adapter comes of it, the run's results at other bit widths count no more."
)
CLUSTER = "Spread the runs over a Ray cluster: local, auto, or its address."
SHOWN = (
    *("theta", "metric", "acc", "expected_acc", "open_acc", "ppl", "stderr", "count", "nll"),
    *("execution_ratio", "loss_ratio"),
)


@app.command()
def run(
    profile: ProfileName = "tiny",
    data_dir: DataDirectory = None,
    only: Annotated[str | None, typer.Option(help="Numbers of the notebooks, such as 03,05.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds 0 … N-1 instead of the profile's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=FRESH)] = False,
    cluster: Annotated[str | None, typer.Option(help=CLUSTER)] = None,
) -> None:
    """Compute what is missing, then execute the notebooks that are not up to date."""
    given = {"data_dir": data_dir and str(data_dir.resolve()), "seeds": seeds}
    overrides = {name: value for name, value in given.items() if value is not None}
    lab, books = Lab(load_profile(profile, **overrides)), choose(only)
    wanted = list(dict.fromkeys(job for book in books for job in needs(lab.profile, book.name)))
    parameters = {name.upper(): value for name, value in {"profile": _portable(profile), **overrides}.items()}
    if fresh:
        _forget(Executions(lab, parameters), wanted, None if only is None else books)
        lab = Lab(lab.profile)
    try:
        clock = Stopclock()
        outcomes = _compute(lab, wanted, clock, cluster)
        outcomes += _execute(Executions(lab, parameters), books, clock)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command{' without --fresh' * fresh} goes on from here.", err=True)
        raise typer.Exit(130) from None
    _finish(lab, outcomes, clock)


def _forget(executions: Executions, wanted: list[Job], only: list[Path] | None) -> None:
    """Remove what is to be made anew: all of the profile, or the jobs and notebooks wanted.

    Raises:
        UserError: for what would fail afterwards, before anything is removed; or if that is impossible.
    """
    lab = executions.lab
    check(lab, wanted, afresh=True)
    with _removing():
        if only is None:
            discard(lab.directory)
            discard(lab.figures)
        else:
            if _shows_bench(only):
                discard(benchmark_report.folder(lab))
            lab.forget(wanted)
            executions.forget(only)


@contextlib.contextmanager
def _removing() -> Iterator[None]:
    """UserError where a file cannot be removed."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be removed ({error.strerror}); allow it, or leave out --fresh."
        ) from None


def _portable(profile: str) -> str:
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


def _execute(executions: Executions, books: list[Path], clock: Stopclock) -> list[Outcome]:
    outcomes = _bench_if_missing(executions.lab, clock) if _shows_bench(books) else []
    stale = executions.stale(books)
    if stale:
        with watcher([as_task(book) for book in stale], AT_ONCE) as watching:
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


def _finish(lab: Lab, outcomes: list[Outcome], clock: Stopclock) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for stage, seconds, note in clock.stages:
        console.print(f"{stage:<10} {span(seconds):>12}   {note}", markup=False)
    console.print(f"tables and executed notebooks: {_short(lab.directory)}", markup=False)
    console.print(f"figures: {_short(lab.figures)}", markup=False)
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    for outcome in failed:
        console.print(f"{outcome.status.upper()} {outcome.name}: {outcome.error}", style="red", markup=False)
    if failed:
        raise _exit(lab, failed)


def _exit(lab: Lab, failed: list[Outcome]) -> typer.Exit:
    """The exit of a run with failures, their errors kept: code 2 if all that failed was refused."""
    _keep_details(lab, failed)
    refused = all(outcome.refused for outcome in failed if outcome.status == "failed")
    return typer.Exit(UserError.exit_code if refused else 1)


def _keep_details(lab: Lab, failed: list[Outcome]) -> None:
    text = "\n\n".join(f"{outcome.name}\n{outcome.detail or outcome.error}" for outcome in failed)
    path = lab.directory / "failures.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    typer.echo(f"{len(failed)} failed; the full errors are in {_short(path)}", err=True)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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
    """What of a profile is in the store."""
    lab = Lab(profile)
    jobs = all_jobs(lab.profile)
    for label, chosen in (
        ("fine-tunings", [job for job in jobs if job.bits is None]),
        *((f"results at {bits} bit", [job for job in jobs if job.bits == bits]) for bits in lab.profile.bits),
    ):
        typer.echo(f"{label:<20} {sum(map(lab.is_done, chosen))} of {len(chosen)}")
    typer.echo(f"store: {_short(lab.store.root)}")


@app.command()
def train(task: TaskName, method: MethodName, profile: ProfileName = "tiny", seed: SeedNumber = 0) -> None:
    """Fine-tune one run, if it is not in the store, and show how it went.

    On several GPUs of this machine: set compute.processes in the profile; they are started from here.
    """
    lab, chosen = _one(profile, task, method, seed)
    _ensure(lab, [Job(chosen)])
    value = lab.result("finetune", **run_spec(chosen))["value"]
    last = value["history"][-1]
    _show(f"Fine-tuning of {chosen.name}", {**{k: last[k] for k in last}, "rows": value["rows"]})
    typer.echo(f"adapter: {_short(lab.files('finetune', run_spec(chosen)))}")


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
    lab, chosen = _one(profile, task, method, seed)
    if bits >= 16:
        raise UserError("A 16-bit model is not quantized; choose --bits 8, 4, 3 or 2.")
    if out is not None:
        _check_writable(out / "packed.json")
    _ensure(lab, [Job(chosen), Job(chosen, bits)])
    report = lab.result("quantization", **run_spec(chosen, bits=bits))["value"]
    errors = [row["error"] / row["power"] for row in report["linears"] if row.get("power")]
    _show(
        f"{report['method']} of {chosen.name} at {bits} bit",
        {
            "linears": len(report["linears"]),
            "group size": report["group_size"],
            "mean error, share of output power": sum(errors) / max(len(errors), 1),
        },
    )
    typer.echo(f"search: {_short(lab.files('quantization', run_spec(chosen, bits=bits)))}")
    if out is not None:
        from qtale_lib.stages import write_packed  # loads torch

        write_packed(lab, chosen, bits, out)
        typer.echo(f"packed model: {_short(out.resolve())}")


@app.command()
def calibrate(
    task: TaskName,
    method: MethodName,
    bits: BitWidth = 16,
    profile: ProfileName = "tiny",
    seed: SeedNumber = 0,
) -> None:
    """Search θ for one run at one bit width and show both curves."""
    lab, chosen = _one(profile, task, method, seed)
    if not chosen.routed:
        raise UserError("A full model has no routers and so no θ; choose dllm or qtale.")
    _ensure(lab, [Job(chosen), Job(chosen, bits)])
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
    lab, chosen = _one(profile, task, method, seed)
    wanted = [Job(chosen), Job(chosen, bits)]
    if fresh:
        check(lab, wanted, afresh=True)
        with _removing():
            lab.forget(wanted)
    _ensure(lab, wanted)
    reference = committed(lab.profile.name)
    specs = {rule: run_spec(chosen, bits=bits, theta=rule) for rule in rules(lab.profile, method)}
    compared = []  # a result here, and the committed one
    for rule, spec in specs.items():
        found, title = lab.result("evaluation", **spec), f"{chosen.name}, {bits} bit, θ {rule}"
        values = {name: found["value"][name] for name in SHOWN if found["value"].get(name) is not None}
        other = reference.get(cell("evaluation", spec))
        if other is None:
            _show(title, values)
        else:
            _show_beside(title, values, other["value"])
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
    lab, chosen = _one(profile, task, method, seed)
    if theta is not None and not chosen.routed:
        raise UserError(
            "A full model has no routers and so no θ; leave out --theta, or choose dllm or qtale."
        )
    _ensure(lab, [Job(chosen), Job(chosen, bits)])
    from qtale_lib import stages  # loads torch

    made, used = stages.generate_text(lab, chosen, bits, prompt, theta, tokens)
    typer.echo(prompt + made.text)
    ratio = (
        "" if made.execution_ratio is None else f"; execution ratio {made.execution_ratio:.3f} at θ {used}"
    )
    typer.echo(f"{chosen.name}, {bits} bit: {made.tokens} tokens{ratio}", err=True)


def _one(profile: str, task: str, method: str, seed: int) -> tuple[Lab, Run]:
    """The lab and the run; a value that no profile could have is refused as one in a profile is."""
    chosen = load_profile(profile, tasks=[task], methods=[method], seeds=[seed])
    return Lab(chosen), Run(task, method, seed)


def _ensure(lab: Lab, jobs: list[Job]) -> None:
    _stop_if_failed(lab, lab.compute(jobs))


def _stop_if_failed(lab: Lab, outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    if failed:
        raise _exit(lab, failed)


def _show(title: str, values: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        table.add_row(name, _text(value))
    Console().print(table)


def _show_beside(title: str, values: dict[str, Any], others: dict[str, Any]) -> None:
    table = Table("", "here", "committed", "difference", title=title)
    for name, value in values.items():
        other = others.get(name)
        numbers = all(isinstance(number, int | float) for number in (value, other))
        table.add_row(name, _text(value), _text(other), _text(value - other) if numbers else "")
    Console().print(table)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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

    lab = Lab(profile)
    if figure is not None:
        look = exporting.Look(width and exporting.inches(width), font, size, palette)
        written = exporting.export_figures(lab, figure, form or "pdf", look, out)
    else:
        written = exporting.export_tables(lab, table, form or "latex", out)
    for path in written:
        typer.echo(str(path))


@app.command()
def publish(profile: str) -> None:
    """Copy a finished profile's results, tables and figures to results/reference and figures/reference."""
    for path in publish_profile(Lab(profile)):
        typer.echo(_short(path))


@app.command()
def archive(profile: str) -> None:
    """Write the results of a profile's finished seeds, without weights, to results/archive."""
    for path in archives.archive(Lab(profile)):
        typer.echo(f"{_short(path)}  {path.stat().st_size / 2**20:.1f} MiB")


@app.command()
def restore(profile: str) -> None:
    """Put what results/archive holds of a profile into its store."""
    lab = Lab(profile)
    typer.echo(f"{archives.restore(lab)} results restored to {_short(lab.store.root)}")
    jobs = all_jobs(lab.profile)
    done = sum(map(lab.is_done, jobs))
    typer.echo(f"{done} of {len(jobs)} jobs of profile {lab.profile.name} are done")
    if not done:
        typer.echo(
            "The archive was made from another base, with other settings or by an older version: "
            f"`python -m qtale_lib run --profile {profile}` will compute its results again."
        )


@app.command(name="sweep")
def sweep_recipe(
    path: Annotated[Path, typer.Argument(help="Its YAML; the shipped one if not given.")] = sweep.RECIPE,
) -> None:
    """Vary each factor of a recipe alone, on validation questions, and show what it does."""
    asked = sweep.load_sweep(path)
    outcomes = sweep.compute(asked)
    lab = Lab(sweep.settings(asked)[0].profile)
    _print(tables.save(sweep.table(asked), lab.tables))
    typer.echo(f"table: {_short(lab.tables)}")
    _stop_if_failed(lab, outcomes)


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
    _print(tables.save(table, lab.tables))
    figures.save(room.figure(table.frame), room.losses(table.frame), "density", lab.figures)
    typer.echo(f"table: {_short(lab.tables)}, figure: {_short(lab.figures)}")
    _stop_if_failed(lab, outcomes)


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
    _check_writable(path)
    unfinished = benchmark_report.unfinished(path)
    typer.echo(f"what is measured is kept, until all is, in {_short(unfinished.resolve())}")
    result = measure(settings, typer.echo, partial(write_json, unfinished), lab)
    write_json(path, result)
    unfinished.unlink(missing_ok=True)
    for table in benchmark_report.printed(result):
        _print(table)
    typer.echo(f"result: {_short(path.resolve())}")


def _listed(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    """Values with commas between them; none is no value, and None stays it."""
    if text is None or text == "none":
        return None if text is None else ()
    try:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        raise UserError(f'--{option} (= "{text}") must be numbers with commas between them.') from None


def _check_writable(path: Path) -> None:
    """UserError before the work, for what would fail after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out (= {path}) cannot be written ({error.strerror}).") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--out (= {path}) cannot be written; name a file in a folder of yours.")


def _print(table: tables.Table) -> None:
    shown = Table(*map(str, table.text.columns), title=table.caption)
    for row in table.text.astype(str).values.tolist():
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)


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


def main() -> None:
    """Entry point of `python -m qtale_lib`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except UserError as error:
        typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
