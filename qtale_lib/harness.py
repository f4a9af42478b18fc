"""Accuracy by lm-eval's own tasks (`piqa`, `arc_easy`, ...): its prompts, its datasets, its metrics.

The second protocol beside that of `evaluation`, for numbers that compare with those others publish. lm-eval
fetches each task's dataset from the hub itself; a profile's data_dir does not reach it. A limit takes the
first rows of a task (of each subject, for MMLU), as lm-eval does.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from qtale_lib.errors import UserError
from qtale_lib.evaluation import BATCH_SIZE, DECIMALS, ChoiceModel, choice_nll

# ours -> (lm-eval's task or group, its folder there)
TASKS = {
    "piqa": ("piqa", "piqa"),
    "boolq": ("boolq", "super_glue/boolq"),
    "siqa": ("social_iqa", "siqa"),
    "arc_easy": ("arc_easy", "arc"),
    "arc_challenge": ("arc_challenge", "arc"),
    "winogrande": ("winogrande", "winogrande"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "mmlu": ("mmlu", "mmlu/default"),
}


def evaluate_own_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy by lm-eval's own task, with the execution ratios of the same passes.

    Returns what `evaluation.evaluate_choices` does (facts and what rests on the drawing of choices empty),
    and acc_norm, None where the task has none. Too long prompts lose their left.
    Raises UserError for a task that lm-eval has none of, and where its dataset cannot be had.
    """
    if task not in TASKS:
        raise UserError(f"lm-eval has no task for {task}; set protocol to likelihood for it.")
    name, _ = TASKS[task]
    adapter = ChoiceModel(model, tokenizer, batch_size, max_length or model.config.max_position_embeddings)
    results = _run(adapter, task, limit)
    samples = [s for part in sorted(results["samples"]) for s in _in_order(results["samples"][part])]
    nll = [choice_nll(sample["filtered_resps"], _gold(sample)) for sample in samples]
    scores = results["results"][name]
    return {
        "acc": scores["acc,none"],
        "acc_norm": scores.get("acc_norm,none"),
        "stderr": scores["acc_stderr,none"] if len(samples) > 1 else None,
        "count": len(samples),
        "nll": sum(nll) / len(nll),
        **dict.fromkeys(("open_acc", "expected_acc", "open_correct", "expected_correct")),
        **adapter.count.ratios(),
        "task_version": results["versions"][name],
        "rows": {"used": len(samples), "dropped": 0},
        "ids": [f"{part}/{s['doc_id']}" for part in sorted(results["samples"])
                for s in _in_order(results["samples"][part])],
        "facts": [[] for _ in samples],
        "correct": [int(sample["acc"]) for sample in samples],
        "choice_nll": [round(value, DECIMALS) for value in nll],
        "protocol": {
            "name": "lm_eval",
            "scoring": "lm-eval's own task: arg max over choices of the summed log-likelihood",
            "task": name,
            "limit": limit,
            "max_length": adapter.max_length,
            "overlong": "cut",
            "few_shot": 0,
            "lm_eval": version("lm_eval"),
        },
    }  # fmt: skip


def _run(adapter: ChoiceModel, task: str, limit: int | None) -> dict[str, Any]:
    name, folder = TASKS[task]
    manager = TaskManager(include_path=str(Path(lm_eval.__file__).parent / "tasks" / folder),
                          include_defaults=False)  # fmt: skip
    datasets.disable_progress_bars()
    try:
        return lm_eval.simple_evaluate(
            model=adapter, tasks=[name], task_manager=manager, num_fewshot=0, limit=limit,
            bootstrap_iters=1,  # any positive number gives an accuracy's stderr in closed form
        )  # fmt: skip
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:  # ConnectionError is an OSError
        raise UserError(
            f"{task}: the dataset of lm-eval's task {name} cannot be had ({type(error).__name__}); "
            "connect once, or set protocol to likelihood."
        ) from error


def _in_order(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def _gold(sample: dict[str, Any]) -> int:
    """The right choice's index; WinoGrande's task swaps target and text, and its rows hold "1" or "2"."""
    target = sample["target"]
    return target if isinstance(target, int) else int(sample["doc"]["answer"]) - 1
