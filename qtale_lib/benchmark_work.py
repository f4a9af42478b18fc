"""Times of the work before inference: a training step by plain LoRA's, the AWQ search by autoawq's."""

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

from qtale_lib.benchmark_models import group_size, median_and_quartiles, random_model, twin
from qtale_lib.config import load_profile
from qtale_lib.data.encoding import collate
from qtale_lib.quantization.apply import search_model
from qtale_lib.quantization.report import QuantizationReport
from qtale_lib.training import make_trainer, prepare_model

METHODS = {"plain": "full", "routed": "qtale"}
SEARCHED_LAYERS = 2  # the search goes layer by layer: its time is proportional to their number
SEARCHED_TEXTS = 8
RECIPE = "tiny"


def training_times(model: PreTrainedModel, tokens: int, repeats: int, clock: Callable) -> dict[str, Any]:
    """Seconds of a training step on one row of so many tokens: "plain" (LoRA alone) and "routed" (QTALE).

    model: bfloat16; its tensors are shared and stay as they are.
    clock(work): seconds that a call of `work` takes.
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
        return {"tokens": tokens, **_interleaved(steps, repeats, clock)}


def _step(trainer: Any, batch: dict[str, torch.Tensor]) -> None:
    batches, counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, batches[0], counts)
    trainer.optimizer.step()
    trainer.model.zero_grad()


def search_times(config: dict[str, Any], tokens: int, clock: Callable) -> dict[str, Any]:
    """Seconds of a 4-bit AWQ search, "native" and "autoawq", over two layers of the shape in float32, on
    SEARCHED_TEXTS rows of so many random tokens; each twice, the second counts.
    """
    from qtale_lib.quantization.autoawq_backend import search_with_autoawq  # Linux only

    small = random_model({**config, "num_hidden_layers": SEARCHED_LAYERS}, "cpu").float()
    rows = torch.randint(config["vocab_size"], (SEARCHED_TEXTS, tokens)).tolist()
    group = group_size(small.config)

    def native() -> None:
        search_model(small, rows, QuantizationReport("awq", "native", 4, group, 16))

    searches = {"native": native, "autoawq": lambda: search_with_autoawq(small, rows, 4, group)}
    sizes = {"layers": SEARCHED_LAYERS, "texts": SEARCHED_TEXTS, "tokens": tokens}
    return {**sizes, **_interleaved(searches, 1, clock)}


def _interleaved(works: dict[str, Callable], repeats: int, clock: Callable) -> dict[str, dict[str, float]]:
    """Median and quartiles of each, in rounds of a random order; a first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    draw = random.Random(0)
    for work in works.values():
        work()
    for _ in range(repeats):
        for name in draw.sample(list(works), len(works)):
            taken[name].append(clock(works[name]))
    return {name: median_and_quartiles(times) for name, times in taken.items()}
