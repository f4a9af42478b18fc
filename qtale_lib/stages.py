"""The work behind each result, in a worker: fine-tune; merge, quantize, search θ, evaluate, in this order.

    train → merge LoRA → quantize → search θ on the quantized model → evaluate

A job that was interrupted goes on with its next missing result.
"""

from __future__ import annotations

import functools
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qtale_lib import distributed, token_routes
from qtale_lib.adaptive import set_threshold
from qtale_lib.base import base_directory, device, load_tokenizer
from qtale_lib.calibration import search_threshold
from qtale_lib.data import subset
from qtale_lib.data.prompts import render
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.evaluation import evaluate_choices, perplexity, rows_that_fit
from qtale_lib.generation import Generated, generate, generate_all, prompt_ids
from qtale_lib.harness import evaluate_own_task
from qtale_lib.jobs import WRITTEN, Job, Run, extra_rules, rules
from qtale_lib.lab import Lab, Spec, run_spec
from qtale_lib.pool import Report
from qtale_lib.preflight import gib
from qtale_lib.pruning import prune
from qtale_lib.quantization import apply_search, quantize, save_search
from qtale_lib.quantization.packed_files import RECORD, load_packed
from qtale_lib.quantization.streaming import apply_search_streamed, quantize_streamed
from qtale_lib.store import file_digest
from qtale_lib.streamed_model import StreamedModel
from qtale_lib.threshold_rules import aim
from qtale_lib.trainer import is_router
from qtale_lib.training import finetune, in_use

PACKED = "packed"  # folder of a quantized model, beside its search while it is being made
STREAMED_FROM = 8 * 2**30  # bytes of the base's weights in the profile's dtype


def perform(lab: Lab, job: Job, report: Report) -> None:
    """Compute what is missing of one job; report(share done, where it is)."""
    be_quiet()
    if job.bits is None:
        finetune_run(lab, job.run, report)
    elif job.extra is None:
        evaluate_run(lab, job.run, job.bits, report)
    else:
        read_off(lab, job, report)


def be_quiet() -> None:
    """Libraries' warnings are not for the user of the command line; errors still are."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def finetune_run(lab: Lab, run: Run, report: Report) -> dict[str, Any]:
    """Fine-tune one run into the store; its adapter lies beside its JSON."""

    def compute(directory: Path) -> dict[str, Any]:
        directory.mkdir(parents=True, exist_ok=True)
        profile, wanted = lab.profile, (run.task, run.method, run.seed)
        if profile.compute.processes > 1:
            value = distributed.finetune(profile, *wanted, directory, report)
        else:
            value = finetune(profile, *wanted, directory, report, lab.examples(run.task, "train"))
        return {**value, "adapter_sha256": _adapter_digest(directory)}

    return lab.once("finetune", run_spec(run), compute)


def evaluate_run(lab: Lab, run: Run, bits: int, report: Report) -> None:
    """θ search and evaluation by every rule at one bit width; the model is made at most once."""
    model = _model_once(lab, run, bits, report)
    if run.routed:
        spec = run_spec(run, bits=bits)
        lab.once("threshold", spec, lambda _: find_threshold(lab, spec, *model(), report))
        for aim in lab.profile.theta_aims:
            aimed = {**spec, "theta": aim}
            lab.once("threshold", aimed, functools.partial(_aim, lab, aimed, model))
    wanted = rules(lab.profile, run.method)
    for done, rule in enumerate(wanted):
        spec = run_spec(run, bits=bits, theta=rule)
        tell = functools.partial(_tell, report, 0.5 + 0.5 * done / len(wanted), f"evaluating, θ: {rule}")
        lab.once("evaluation", spec, functools.partial(_evaluate, lab, spec, model, tell))


def _model_once(lab: Lab, run: Run, bits: int, report: Report) -> Callable:
    """What gives `prepared_model`, made when it is first asked for."""

    @functools.cache
    def model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        _tell(report, 0.0, "quantizing" if bits < 16 else "merging LoRA")
        return prepared_model(lab, run, bits)

    return model


def _tell(report: Report, share: float, what: str) -> None:
    report(share, f"{what}, {in_use()}")


def prepared_model(lab: Lab, run: Run, bits: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The run's model, merged and in 16 bit, or quantized further; on this process's device, in eval mode.

    Quantized, a small one is floats on the grid. A large one (`STREAMED_FROM`, on every machine) goes from
    files to files, layer by layer, and is then packed: at no time is it in memory as floats.
    """
    tokenizer = load_tokenizer(base_directory(lab.profile))
    if bits < 16 and lab.model_bytes() >= STREAMED_FROM:
        return streamed_model(lab, run, bits, tokenizer), tokenizer
    model = merged_model(weights_of(lab, run)).to(device())
    if not lab.profile.pruning.is_none():
        pruned(lab, run, model, tokenizer)
    if bits < 16:
        quantized(lab, run_spec(run, bits=bits), model, tokenizer)
    return model.eval(), tokenizer


def weights_of(lab: Lab, run: Run) -> Path:
    """The folder of a fine-tuned run.

    Raises:
        UserError: if its result came without.
        DamagedError: if what lies there is not what was trained.
    """
    weights = lab.files("finetune", run_spec(run))
    if not weights.is_dir():
        raise UserError(
            f"The weights of {run.name} are not here, as its results were restored from an archive; "
            f"delete {weights}.json and run again, which fine-tunes it anew."
        )
    if _adapter_digest(weights) != lab.result("finetune", **run_spec(run))["value"]["adapter_sha256"]:
        raise DamagedError(
            f"The weights of {run.name} in {weights} are not those that were trained (sha256); "
            f"delete {weights}.json and run again, which fine-tunes it anew."
        )
    return weights


def _adapter_digest(weights: Path) -> str:
    return file_digest(*weights.glob("*.safetensors"))


def merged_model(directory: Path) -> PreTrainedModel:
    """A saved run with LoRA merged and every weight but the routers' rounded to bfloat16: the "16-bit" model.

    On a CPU the rounded values are computed with in float32.
    """
    return StreamedModel(directory).whole()


def streamed_model(lab: Lab, run: Run, bits: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The run's model, quantized from files to files: by the search in the store, else by a new one."""
    spec = run_spec(run, bits=bits)

    def compute(directory: Path) -> dict[str, Any]:
        texts, settings = calibration_texts(lab, run.task), quantizer_settings(lab, bits)
        if settings.pop("backend") != "native":
            raise UserError(
                f"quantization.backend of profile {lab.profile.name} must be native: a base of "
                f"{gib(lab.model_bytes())} is quantized layer by layer, which autoawq cannot."
            )
        if settings.pop("widths") != "uniform":
            raise UserError(
                f"quantization.widths of profile {lab.profile.name} must be uniform: a base of "
                f"{gib(lab.model_bytes())} is quantized layer by layer, and mixed widths need all of it."
            )
        report = quantize_streamed(streamed(), directory / PACKED, tokenizer, texts, **settings)
        save_search(report, directory)
        return report.as_dict()

    def streamed() -> StreamedModel:
        model = StreamedModel(weights_of(lab, run), device())
        set_threshold_if_routed(model.model, calibration_theta(run.method))
        return model

    lab.once("quantization", spec, compute)
    search = lab.files("quantization", spec)
    if not (search / PACKED / RECORD).is_file():
        apply_search_streamed(streamed(), search, search / PACKED, tokenizer)
    model = load_packed(search / PACKED, device())
    shutil.rmtree(search / PACKED)  # the search gives it again in minutes
    return model


def write_packed(lab: Lab, run: Run, bits: int, directory: Path) -> None:
    """Write a run that is quantized for `load_packed`, at its own θ: the searched one, if there is one."""
    be_quiet()
    model = StreamedModel(weights_of(lab, run), device())
    rule = "searched" if run.routed else rules(lab.profile, run.method)[0]
    set_threshold_if_routed(model.model, lab.theta(run_spec(run, bits=bits, theta=rule)))
    tokenizer = load_tokenizer(base_directory(lab.profile))
    apply_search_streamed(model, lab.files("quantization", run_spec(run, bits=bits)), directory, tokenizer)


def quantized(lab: Lab, spec: Spec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Quantize the model in place: by the search in the store, else by a new one that is kept."""
    set_threshold_if_routed(model, calibration_theta(spec["method"]))
    fresh = []

    def compute(directory: Path) -> dict[str, Any]:
        texts = calibration_texts(lab, spec["task"])
        quantize(model, tokenizer, texts, **quantizer_settings(lab, spec["bits"]))
        save_search(model.quantization, directory)
        fresh.append(True)
        return model.quantization.as_dict()

    lab.once("quantization", spec, compute)
    if not fresh:
        apply_search(model, lab.files("quantization", spec))


def pruned(lab: Lab, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prune the model in place, as the profile says."""
    set_threshold_if_routed(model, calibration_theta(run.method))
    how = lab.profile.pruning.model_dump()
    prune(model, tokenizer, calibration_texts(lab, run.task), max_length=lab.profile.max_length, **how)


def calibration_theta(method: str) -> float:
    """θ while the quantizer sees its texts."""
    return 0.0 if method == "noisy_full" else 0.5


def quantizer_settings(lab: Lab, bits: int) -> dict[str, Any]:
    """Arguments of `quantize` by the profile."""
    settings = lab.profile.quantization
    return {
        "method": settings.method,
        "bits": bits,
        "group_size": lab.profile.group_size,
        "backend": settings.backend,
        "lm_head_bits": settings.lm_head_bits,
        "widths": settings.widths,
        "max_length": lab.profile.max_length,
    }


def calibration_texts(lab: Lab, task: str) -> list[str]:
    """Training texts, prompt and response, that quantizers and pruners see; never a test or θ question."""
    chosen = subset(lab.examples(task, "train"), lab.profile.quantization.calibration_texts)
    rendered = [render(example, lab.profile.prompt) for example in chosen]
    return [f"{text.prompt} {text.target}" for text in rendered]


def find_threshold(
    lab: Lab, spec: Spec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Report
) -> dict[str, Any]:
    """The two-phase search of Sec. 3.4 on the calibration questions: theta, both curves, tolerance; and which
    questions (ids, rows {used, dropped, cut}).
    """
    _tell(report, 0.2, "searching θ")
    steps = lab.profile.calibration
    examples = lab.examples(spec["task"], "calibration")
    search = search_threshold(
        model,
        tokenizer,
        examples,
        coarse_step=steps.coarse_step,
        fine_step=steps.fine_step,
        tolerance=steps.tolerance,
        objective=steps.objective,
        **fitting(lab),
    )
    settings = fitting(lab)
    del settings["batch_size"]
    return {**search.as_dict(), **rows_that_fit(examples, tokenizer, **settings)}


def _aim(lab: Lab, spec: Spec, model: Callable, _: Path) -> dict[str, Any]:
    """The θ of a rule that aims at a cost (threshold_rules.py)."""
    prepared, tokenizer = model()
    examples = lab.examples(spec["task"], "calibration")
    return aim(prepared, tokenizer, examples, spec["theta"], **fitting(lab)).as_dict()


def _evaluate(lab: Lab, spec: Spec, model: Callable, tell: Callable[[], None], _: Path) -> dict[str, Any]:
    prepared, tokenizer = model()
    tell()
    theta = lab.theta(spec)
    set_threshold_if_routed(prepared, theta)
    done = {"pruning": prepared.pruning} if hasattr(prepared, "pruning") else {}
    return {**measure(lab, spec["task"], prepared, tokenizer), "theta": theta, **done}


def measure(
    lab: Lab, task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The task's metric on the examples that are evaluated: accuracy by lm-eval, or the responses' PPL."""
    examples = lab.examples(task, lab.profile.evaluated)
    if task in WRITTEN:
        return {"metric": "ppl", **perplexity(model, tokenizer, examples, **fitting(lab))}
    if lab.profile.protocol == "lm_eval":
        settings = {name: fitting(lab)[name] for name in ("batch_size", "max_length")}
        return {"metric": "acc", **evaluate_own_task(model, tokenizer, examples, task, **settings)}
    return {"metric": "acc", **evaluate_choices(model, tokenizer, examples, task, **fitting(lab))}


def fitting(lab: Lab) -> dict[str, Any]:
    """How the profile turns examples into batches, for every function that scores them."""
    profile = lab.profile
    return {
        "style": profile.prompt,
        "batch_size": profile.training.eval_batch_size,
        "max_length": profile.max_length,
        "overlong": profile.overlong,
    }


def generate_text(
    lab: Lab, run: Run, bits: int, prompt: str, theta: float | None = None, max_tokens: int = 100
) -> tuple[Generated, float | None]:
    """A prompt continued by a run at one bit width, at θ (None: the searched one); and the θ used, None for a
    model without routers. Its results must be in the store.
    """
    be_quiet()
    if theta is None:
        theta = lab.theta(run_spec(run, bits=bits, theta="searched")) if run.routed else None
    model, tokenizer = prepared_model(lab, run, bits)
    if run.routed:
        set_threshold(model, theta)
    return generate(model, tokenizer, prompt, max_tokens), theta


def read_off(lab: Lab, job: Job, report: Report) -> None:
    """A job's extra: responses of a run to prompts of the evaluated split, or its routes token by token."""
    model = _model_once(lab, job.run, job.bits, report)
    wanted, work = extra_rules(job), {"responses": _respond, "token_routes": _read_routes}[job.extra]
    for done, rule in enumerate(wanted):
        spec = run_spec(job.run, bits=job.bits, theta=rule)
        tell = functools.partial(_tell, report, done / len(wanted), f"θ: {rule}")
        lab.once(job.extra, spec, functools.partial(work, lab, spec, model, tell))


def _respond(lab: Lab, spec: Spec, model: Callable, tell: Callable[[], None], _: Path) -> dict[str, Any]:
    """ids, facts, texts, tokens, execution_ratios of every response, the seconds that all took, and rows."""
    prepared, tokenizer = model()
    tell()
    profile, theta = lab.profile, lab.theta(spec)
    set_threshold_if_routed(prepared, theta)
    asked = lab.prompts(spec["task"])
    prompts = [render(example, profile.prompt).prompt for example in asked]
    room = profile.max_length - profile.generation.max_tokens
    fits = [len(ids) <= room for ids in prompt_ids(tokenizer, prompts)]
    kept = [example for example, own in zip(asked, fits, strict=True) if own]
    if not kept:
        raise UserError(f"No prompt fits {room} tokens; raise max_length, or lower generation.max_tokens.")
    started = time.monotonic()
    made = generate_all(
        prepared,
        tokenizer,
        [prompt for prompt, own in zip(prompts, fits, strict=True) if own],
        profile.generation.max_tokens,
        profile.training.eval_batch_size,
    )
    return {
        "theta": theta,
        "ids": [example.id for example in kept],
        "facts": [list(example.facts) for example in kept],
        "texts": [each.text.strip() for each in made],
        "tokens": [each.tokens for each in made],
        "execution_ratios": [each.execution_ratio for each in made],
        "generation_seconds": time.monotonic() - started,
        "rows": {"used": len(kept), "dropped": len(asked) - len(kept), "cut": 0},
    }


def _read_routes(lab: Lab, spec: Spec, model: Callable, tell: Callable[[], None], _: Path) -> dict[str, Any]:
    prepared, tokenizer = model()
    tell()
    set_threshold(prepared, lab.theta(spec))
    asked = lab.prompts(spec["task"])
    routes = token_routes.read_routes(prepared, tokenizer, asked, **fitting(lab))
    return {**routes, **token_routes.worth(prepared, tokenizer, asked, **fitting(lab))}


def set_threshold_if_routed(model: nn.Module, theta: float | None) -> None:
    """Set θ; a model without routers has none."""
    if any(is_router(name) for name, _ in model.named_parameters()):
        set_threshold(model, theta)
