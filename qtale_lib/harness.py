"""lm-eval's own tasks as a second protocol: its prompts, choices and metrics, zero-shot, on our rows.

The tasks' files are those of the installed lm-eval; only where their rows lie is replaced, so that they are
the same rows as under `likelihood`, from the hub or from files, and nothing is fetched here. The model is
scored by the same passes. A text longer than max_length loses its left, as lm-eval has it; none is left out.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.evaluation import BATCH_SIZE, DECIMALS, ChoiceModel, choice_nll

TASKS_FOLDER = Path(lm_eval.__path__[0]) / "tasks"


# From an Example to a row in the columns that a task of lm-eval reads.


def _piqa(example: Example) -> dict[str, Any]:
    return {**example.fields, **_named(example, "sol1", "sol2"), "label": example.answer}


def _boolq(example: Example) -> dict[str, Any]:
    return {**example.fields, "label": int(example.response == "yes")}


def _siqa(example: Example) -> dict[str, Any]:
    answers = _named(example, "answerA", "answerB", "answerC")
    return {**example.fields, **answers, "label": str(example.answer + 1)}


def _arc(example: Example) -> dict[str, Any]:
    return {**example.fields, **_labelled(example)}


def _winogrande(example: Example) -> dict[str, Any]:
    return {**example.fields, **_named(example, "option1", "option2"), "answer": str(example.answer + 1)}


def _openbookqa(example: Example) -> dict[str, Any]:
    return {"question_stem": example.fields["question"], **_labelled(example)}


def _mmlu(example: Example) -> dict[str, Any]:
    return {**example.fields, "choices": example.choices, "answer": example.answer}


def _named(example: Example, *names: str) -> dict[str, str]:
    return dict(zip(names, example.choices, strict=True))


def _labelled(example: Example) -> dict[str, Any]:
    labels = "ABCDE"[: len(example.choices)]
    return {
        "choices": {"text": example.choices, "label": list(labels)},
        "answerKey": labels[example.answer],
    }


@dataclass(frozen=True)
class Own:
    """A task of lm-eval: its name, the folder of its file, and a row in the columns that it reads."""

    name: str
    folder: str
    row: Callable[[Example], dict[str, Any]]


OWN = {
    "piqa": Own("piqa", "piqa", _piqa),
    "boolq": Own("boolq", "super_glue/boolq", _boolq),
    "siqa": Own("social_iqa", "siqa", _siqa),
    "arc_easy": Own("arc_easy", "arc", _arc),
    "arc_challenge": Own("arc_challenge", "arc", _arc),
    "winogrande": Own("winogrande", "winogrande", _winogrande),
    "openbookqa": Own("openbookqa", "openbookqa", _openbookqa),
    "mmlu": Own("mmlu", "mmlu/default", _mmlu),  # a group of one task per subject
}


def evaluate_own_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: str,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Zero-shot accuracy by lm-eval's own task; the result has the entries of evaluate_choices, and acc_norm
    (by the choices' lengths in bytes) where the task has it.

    facts are the examples'; open_acc and expected_acc are None. "rows" counts as cut the texts before
    choices that lost their left.
    Raises UserError for a task or subject that lm-eval has not, and for a choice longer than max_length.
    """
    max_length = max_length or model.config.max_position_embeddings
    adapter = ChoiceModel(model, tokenizer, batch_size, max_length)
    results, samples = _lm_eval(adapter, examples, task)
    correct = [int(sample["acc"]) for sample in samples]
    nll = [choice_nll(s["filtered_resps"], _gold(s, e, task)) for s, e in zip(samples, examples, strict=True)]
    normed = [sample["acc_norm"] for sample in samples if "acc_norm" in sample]
    return {
        "acc": fmean(correct),
        "stderr": stdev(correct) / len(correct) ** 0.5 if len(correct) > 1 else None,
        **({"acc_norm": fmean(normed)} if normed else {}),
        "count": len(correct),
        "nll": fmean(nll),
        **dict.fromkeys(("open_acc", "expected_acc", "open_correct", "expected_correct")),
        **adapter.count.ratios(),
        "task_version": next(iter(results["versions"].values())),
        "rows": {"used": len(correct), "dropped": 0, "cut": adapter.rows["cut"]},
        "ids": [example.id for example in examples],
        "facts": [list(example.facts) for example in examples],
        "correct": correct,
        "choice_nll": [round(value, DECIMALS) for value in nll],
        "protocol": {
            "name": "lm_eval",
            "scoring": f"lm-eval's own task {OWN[task].name}",
            "nll": "mean of -log(likelihood of the right choice / sum over the choices)",
            "max_length": max_length,
            "overlong": "cut",
            "few_shot": 0,
            "lm_eval": version("lm_eval"),
        },
    }


def _lm_eval(
    adapter: ChoiceModel, examples: Sequence[Example], task: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lm-eval's results, and its sample of every example, in their order."""
    if task not in OWN:
        raise UserError(f"lm-eval's own tasks have none for {task}; they are {', '.join(OWN)}.")
    manager = TaskManager(include_path=TASKS_FOLDER / OWN[task].folder, include_defaults=False)
    names = [_name(example, task) for example in examples]
    with tempfile.TemporaryDirectory() as folder:
        settings = []
        for name in dict.fromkeys(names):
            if name not in manager.all_subtasks:
                raise UserError(f'lm-eval has no task "{name}"; set protocol: likelihood.')
            rows = [OWN[task].row(e) for e, own in zip(examples, names, strict=True) if own == name]
            settings.append(_here(name, rows, Path(folder)))
        datasets.disable_progress_bars()
        tasks = manager.load({"group": "own", "task": settings})["tasks"]
        results = evaluate(adapter, {"tasks": tasks}, bootstrap_iters=0)
    of_task = {name: {s["doc_id"]: s for s in samples} for name, samples in results["samples"].items()}
    met: Counter[str] = Counter()
    ordered = []
    for name in names:
        ordered.append(of_task[name][met[name]])
        met[name] += 1
    return results, ordered


def _name(example: Example, task: str) -> str:
    subject = example.fields.get("subject", "").replace(" ", "_")
    return f"mmlu_{subject}" if task == "mmlu" else OWN[task].name


def _here(name: str, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The task with its rows in a file of `folder`, all else as lm-eval has it."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder)},
        "training_split": None,
        "validation_split": None,
        "fewshot_split": None,
        "test_split": "test",
        "num_fewshot": 0,
    }


def _gold(sample: dict[str, Any], example: Example, task: str) -> int:
    """Index of the right choice in the task's order, which for BoolQ is no, yes."""
    return sample["doc"]["label"] if task == "boolq" else example.answer
