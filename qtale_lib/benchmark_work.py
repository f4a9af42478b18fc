"""Times of other work: a training step by plain LoRA's, the AWQ search by autoawq's, scoring by skipping."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from qtale_lib import jobs
from qtale_lib.adaptive import set_execution, set_threshold
from qtale_lib.benchmark_budget import Deadline, OutOfTime, rounds
from qtale_lib.benchmark_models import group_size, median_and_quartiles, random_model, twin
from qtale_lib.config import load_profile
from qtale_lib.data.encoding import collate
from qtale_lib.errors import UserError
from qtale_lib.evaluation import evaluate_choices
from qtale_lib.lab import Lab, run_spec
from qtale_lib.quantization.apply import search_model
from qtale_lib.quantization.report import QuantizationReport
from qtale_lib.training import make_trainer, prepare_model

METHODS = {"plain": "full", "routed": "qtale"}
# A search goes layer by layer: its time is proportional to their number. autoawq tries clips on every token,
# or on 512 to 1023 of more, ours on second moments: few tokens favour autoawq. So many are a minute or one
# and a half for either at tinyllama-1.1b on 2 cores.
SEARCHED_LAYERS, SEARCHED_TOKENS = 1, 256
SCORED = 200  # questions
BITS = 4
NARROW = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64,
}  # fmt: skip
RECIPE = "tiny"


def training_times(
    model: PreTrainedModel, tokens: int, repeats: int, clock: Callable, end: float
) -> dict[str, Any]:
    """Seconds of a training step on one row of so many tokens: "plain" (LoRA alone) and "routed" (QTALE).

    model: bfloat16; its tensors are shared and stay as they are.
    clock(work): seconds that a call of `work` takes; end: when the rounds should end, by time.monotonic.
    """
    profile = load_profile(RECIPE, max_steps=1)
    ids = torch.randint(model.config.vocab_size, (tokens,)).tolist()
    row = {"input_ids": ids, "labels": ids}
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name, method in METHODS.items():
            adapted = prepare_model(twin(model).train(), profile, method, seed=0)
            tokenizer = SimpleNamespace(pad_token_id=0)
            trainer = make_trainer(adapted, tokenizer, [row], profile, method, 0, Path(folder), [])
            trainer.create_optimizer()
            trainer.state.max_steps = 1
            steps[name] = partial(_step, trainer, collate([row], 0))
        return {"tokens": tokens, **_interleaved(steps, repeats, clock, end)}


def _step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    batches, counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], counts)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def _interleaved(
    works: dict[str, Callable], repeats: int, clock: Callable, end: float
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each, in rounds of a random order; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    draw = random.Random(0)
    for work in works.values():
        work()
    for _ in rounds(repeats, end):
        for name in draw.sample(list(works), len(works)):
            taken[name].append(clock(works[name]))
    return {name: median_and_quartiles(times) for name, times in taken.items()}


def search_times(config: dict[str, Any], clock: Callable, end: float) -> dict[str, Any]:
    """Seconds of a 4-bit AWQ search, "native" and "autoawq", over SEARCHED_LAYERS of the shape in float32 on
    one row of SEARCHED_TOKENS random tokens; each once, after one on a narrow model.

    A search that has not ended by `end` (of time.monotonic), or cannot be made, is None; "left_out" holds the
    reason by its name.
    """
    narrow, model = (
        random_model({**config, **changes, "num_hidden_layers": SEARCHED_LAYERS}, "cpu").float()
        for changes in (NARROW, {})
    )
    rows = torch.randint(config["vocab_size"], (1, SEARCHED_TOKENS)).tolist()
    found: dict[str, Any] = {"layers": SEARCHED_LAYERS, "tokens": SEARCHED_TOKENS, "left_out": {}}
    for name, search in SEARCHES.items():
        found[name] = None
        try:
            with Deadline(end):
                search(narrow, rows)
                found[name] = median_and_quartiles([clock(partial(search, model, rows))])
        except (OutOfTime, UserError, ImportError) as reason:
            found["left_out"][name] = str(reason)
    return found


def evaluation_times(lab: Lab, repeats: int, clock: Callable, end: float) -> dict[str, Any]:
    """Seconds of scoring SCORED test questions by a trained run of the profile in 16 bits at θ 0.5, "dense"
    and "skip": with learned routes. "run" names it, "execution_ratio" is R.

    Without a trained run, and for a task without choices, both are None, and "left_out" says why.
    """
    from qtale_lib import stages

    found: dict[str, Any] = {"dense": None, "skip": None, "run": None, "left_out": None}
    trained = [run for run in jobs.runs(lab.profile) if run.routed and run.task != "alpaca"]
    trained = [run for run in trained if lab.find("finetune", **run_spec(run))]
    trained = [run for run in trained if lab.files("finetune", run_spec(run)).is_dir()]
    if not trained:
        return {**found, "left_out": f"no trained run with choices of profile {lab.profile.name} is here"}
    run = min(trained, key=lambda run: run.task != jobs.probed_task(lab.profile))
    model, tokenizer = stages.prepared_model(lab, run, 16)
    set_threshold(model, 0.5)
    examples = lab.examples(run.task, lab.profile.evaluated)[:SCORED]
    scored = {}

    def score(mode: str) -> None:
        set_execution(model, mode)
        scored[mode] = evaluate_choices(model, tokenizer, examples, run.task, **stages.fitting(lab))

    works = {mode: partial(score, mode) for mode in ("dense", "skip")}
    found |= {"run": run.name, "questions": len(examples), **_interleaved(works, repeats, clock, end)}
    return {**found, "execution_ratio": scored["skip"]["execution_ratio"]}


def _search(model: PreTrainedModel, rows: list[list[int]]) -> None:
    search_model(model, rows, QuantizationReport("awq", "native", BITS, group_size(model.config), 16))


def _search_with_autoawq(model: PreTrainedModel, rows: list[list[int]]) -> None:
    from qtale_lib.quantization.autoawq_backend import search_with_autoawq  # installed on Linux only

    search_with_autoawq(model, rows, BITS, group_size(model.config))


SEARCHES = {"native": _search, "autoawq": _search_with_autoawq}
