"""Accuracy by lm-eval on local tasks, perplexity of responses, and the execution ratios of the same passes.

A question's answer is the choice whose text is likeliest after the prompt (summed log-likelihood). Sequences
are fed without their last token, sorted by length, padded on the right under an attention mask; choices that
differ in their last token only share one sequence. Padding never counts. R_avg is over all tokens fed, loss-R
over those that the rate loss would see (losses.counted_tokens): it leaves out a sequence's last token, which
is not fed here at all.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qtale_lib.adaptive import record_routes, reserved_tokens, skipping_if_auto
from qtale_lib.data.encoding import Pair, encode_pairs, fit_all, pad_right, response_pairs
from qtale_lib.data.prompts import Rendered, render
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.finite import first_non_finite_layer, is_finite, place
from qtale_lib.losses import counted_tokens
from qtale_lib.pruning.layers import executed_layers

TASKS_FOLDER = Path(__file__).parent / "data" / "lm_eval_tasks"
BATCH_SIZE = 64
DECIMALS = 5  # of a question's nats as kept: an archive of thousands of evaluations is a third of the size

# lm-eval and datasets have no switch of their own for the bars they draw on every call.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)


# Scoring: token ids -> log-likelihoods and executed (token, layer) pairs.


@dataclass
class ExecutionCount:
    """Executed and all (token, layer) pairs, over every token fed and over those that the rate loss sees."""

    executed: int = 0
    pairs: int = 0
    counted_executed: int = 0
    counted_pairs: int = 0
    tokens: int = 0

    def add(self, executed: Tensor | None, valid: Tensor, reserved: int) -> None:
        """executed: bool [L, B, T], or None for a model without routers; valid: bool [B, T], False on
        padding; reserved: how many first tokens always run.
        """
        executed = valid.new_ones(1, *valid.shape) if executed is None else executed
        counted, layers = counted_tokens(valid, reserved, whole=False), executed.shape[0]
        self.executed += int((executed & valid).sum())
        self.counted_executed += int((executed & counted).sum())
        self.pairs += layers * int(valid.sum())
        self.counted_pairs += layers * int(counted.sum())
        self.tokens += int(valid.sum())

    def ratios(self) -> dict[str, float | int | None]:
        """execution_ratio (R_avg), loss_ratio (None where no token counts) and the number of tokens fed."""
        loss_ratio = self.counted_executed / self.counted_pairs if self.counted_pairs else None
        return {
            "execution_ratio": self.executed / self.pairs,
            "loss_ratio": loss_ratio,
            "tokens": self.tokens,
        }


@dataclass
class Scores:
    """Per pair: the log-probability of each continuation token, and whether each is the greedy choice."""

    log_probabilities: list[Tensor]
    greedy: list[bool]
    count: ExecutionCount = field(default_factory=ExecutionCount)


def score(model: nn.Module, pairs: Sequence[Pair], batch_size: int = BATCH_SIZE) -> Scores:
    """Log-probabilities of every pair's continuation after its prompt, each distinct sequence fed once.

    model: a causal language model, routed or not; it runs in eval mode without gradients, and skips layers
        unless set_execution says otherwise.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, continuation) in enumerate(pairs):
        sharing.setdefault((*prompt, *continuation[:-1]), []).append(index)
    fed = sorted(sharing, key=len, reverse=True)  # the longest first: too little memory shows at once
    scores = Scores([torch.empty(0)] * len(pairs), [False] * len(pairs))
    with _evaluating(model):
        for start in range(0, len(fed), batch_size):
            batch = fed[start : start + batch_size]
            _score_batch(model, batch, [sharing[ids] for ids in batch], pairs, scores)
    return scores


def _score_batch(
    model: nn.Module,
    fed: list[tuple[int, ...]],
    members: list[list[int]],
    pairs: Sequence[Pair],
    scores: Scores,
) -> None:
    device = model.get_input_embeddings().weight.device
    valid = pad_right([[True] * len(ids) for ids in fed], False).to(device)
    hidden, executed = hidden_states(model, pad_right(fed, 0).to(device), valid)
    scores.count.add(executed, valid, reserved_tokens(model))
    starts = [min(len(pairs[index][0]) for index in indices) - 1 for indices in members]
    needed = torch.cat(
        [hidden[row, start : len(ids)] for row, (start, ids) in enumerate(zip(starts, fed, strict=True))]
    )
    logits = model.get_output_embeddings()(
        needed
    ).float()  # [positions that predict a continuation token, vocabulary]
    log_probabilities, greedy = logits.log_softmax(-1).cpu(), logits.argmax(-1).cpu()
    ends = accumulate(len(ids) - start for start, ids in zip(starts, fed, strict=True))
    owners = [(index, end) for indices, end in zip(members, ends, strict=True) for index in indices]
    continuations = [pairs[index][1] for index, _ in owners]
    lengths = [len(continuation) for continuation in continuations]
    rows = torch.cat([torch.arange(end - n, end) for (_, end), n in zip(owners, lengths, strict=True)])
    tokens = torch.tensor(list(chain(*continuations)))
    chosen = log_probabilities[rows, tokens]
    if not is_finite(chosen):
        raise UserError(_not_finite(model, fed, valid))
    right = chosen.split(lengths), (greedy[rows] == tokens).split(lengths)
    for (index, _), values, are_greedy in zip(owners, *right, strict=True):
        scores.log_probabilities[index], scores.greedy[index] = values, bool(are_greedy.all())


def _not_finite(model: nn.Module, fed: list[tuple[int, ...]], valid: Tensor) -> str:
    """One sentence naming the first decoder layer whose output on a batch is not finite."""
    ids = pad_right(fed, 0).to(valid.device)
    layer = first_non_finite_layer(model.get_decoder().layers, lambda: hidden_states(model, ids, valid))
    return (
        f"The model gives numbers that are not finite: the first appear {place(layer)}; its weights are "
        "damaged or too large for their type."
    )


def hidden_states(model: nn.Module, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Last hidden states [B, T, d], and what executed, bool [L, B, T] (None where all layers do)."""
    forward = partial(model.get_decoder(), input_ids=input_ids, attention_mask=valid.long(), use_cache=False)
    if not any(".router." in name for name, _ in model.named_parameters()):
        hidden = forward().last_hidden_state
        return hidden, executed_layers(model, valid)
    with record_routes(model) as routes:
        hidden = forward().last_hidden_state
    return hidden, routes.executed


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), skipping_if_auto(model):
            yield
    finally:
        model.train(training)


# Accuracy.


class ChoiceModel(LM):
    """lm-eval's view of a model: log-likelihoods of continuations, nothing else. Too long prompts lose their
    left.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = BATCH_SIZE,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self.count = ExecutionCount()
        self.rows: dict[str, int] = {}  # contexts {used, dropped, cut}
        self.further: list[tuple[str, str]] = []  # (context, continuation) scored in the same passes
        self.further_sums: list[float] = []

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(summed log-likelihood, is it the greedy continuation) of each (context, continuation)."""
        texts = [*(request.args for request in requests), *self.further]
        pairs = encode_pairs(self.tokenizer, texts)
        contexts = [context for context, _ in texts]
        pairs, self.rows = fit_all(pairs, self.tokenizer, self.max_length, "cut", contexts)
        if self.rows["dropped"]:
            raise UserError(f"A choice alone is longer than {self.max_length} tokens; raise max_length.")
        scores = score(self.model, pairs, self.batch_size)
        self.count = scores.count
        sums = [float(values.sum()) for values in scores.log_probabilities]
        self.further_sums = sums[len(requests) :]
        return list(zip(sums, scores.greedy, strict=True))[: len(requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Not used: see perplexity."""
        raise NotImplementedError("ChoiceModel scores choices; perplexity() scores whole responses")

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Not used: no task here generates."""
        raise NotImplementedError("ChoiceModel scores choices and does not generate")


def evaluate_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: str,
    style: str = "compact",
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    overlong: str = "drop",
) -> dict[str, Any]:
    """Zero-shot accuracy on multiple-choice examples through lm-eval, and the ratios of the same passes.

    max_length: tokens of prompt and choice together; None is the model's own limit. A question with a longer
    choice is left out ("drop") or its prompt cut from the left ("cut"); "rows" in the result counts both.
    Returns acc, stderr, count, nll (mean of −log of the right answer's share among the choices' likelihoods),
    open_acc (against all values that the choices were drawn from), expected_acc (acc's expectation over that
    draw; both None where the prompt lists the choices), execution_ratio, loss_ratio, tokens, task_version,
    rows, protocol, and per question: ids, facts, correct, choice_nll, and open_correct and expected_correct,
    which are None where they equal correct. Raises UserError where nothing is left to score.
    """
    max_length = max_length or model.config.max_position_embeddings
    kept, _, rows = fitting_choices(examples, tokenizer, style, max_length, overlong)
    adapter = ChoiceModel(model, tokenizer, batch_size, max_length)
    rendered = [render(example, style) for example in kept]
    adapter.further = [(text.prompt, f" {value}") for text in rendered for value in text.values]
    results = _lm_eval(adapter, kept, task, style)
    name = f"qtale_{task}"
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    nll = [choice_nll(sample["filtered_resps"], sample["target"]) for sample in samples]
    return {
        "acc": results["results"][name]["acc,none"],
        "stderr": results["results"][name]["acc_stderr,none"] if len(kept) > 1 else None,
        "count": len(kept),
        "nll": sum(nll) / len(nll),
        **_without_the_draw(kept, rendered, adapter.further_sums),
        **adapter.count.ratios(),
        "task_version": results["versions"][name],
        "rows": rows,
        "ids": [example.id for example in kept],
        "facts": [list(example.facts) for example in kept],
        "correct": [int(sample["acc"]) for sample in samples],
        "choice_nll": [round(value, DECIMALS) for value in nll],
        "protocol": {
            "name": "likelihood",
            "scoring": "arg max over choices of the summed log-likelihood of the choice after the prompt",
            "nll": "mean of -log(likelihood of the right choice / sum over the choices)",
            "style": style,
            "max_length": max_length,
            "overlong": overlong,
            "few_shot": 0,
            "lm_eval": version("lm_eval"),
        },
    }


def _without_the_draw(
    examples: Sequence[Example], rendered: Sequence[Rendered], sums: Sequence[float]
) -> dict[str, Any]:
    """Accuracies that do not hang on which wrong choices were drawn, from all values' log-likelihoods.

    With b of n − 1 wrong values less likely than the right one, k choices hold none that is likelier with
    probability C(b, k − 1) / C(n − 1, k − 1).
    """
    if not all(text.values for text in rendered):
        return dict.fromkeys(("open_acc", "expected_acc", "open_correct", "expected_correct"))
    left, right, expected = iter(sums), [], []
    for example, text in zip(examples, rendered, strict=True):
        values = list(islice(left, len(text.values)))
        own = values.pop(text.values.index(text.continuations[example.answer]))
        beaten, wrong = sum(own > other for other in values), len(text.continuations) - 1
        right.append(int(beaten == len(values)))
        expected.append(math.comb(beaten, wrong) / math.comb(len(values), wrong))
    fixed = all(len(text.values) == len(text.continuations) for text in rendered)
    return {
        "open_acc": sum(right) / len(right),
        "expected_acc": sum(expected) / len(expected),
        "open_correct": None if fixed else right,
        "expected_correct": None if fixed else expected,
    }


def fitting_choices(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    max_length: int,
    overlong: str,
) -> tuple[list[Example], list[list[Pair]], dict[str, int]]:
    """The questions all of whose choices fit, the pairs of each, and how many were {used, dropped, cut}."""
    texts, owners = [], []
    for index, example in enumerate(examples):
        rendered = render(example, style)
        texts += [(rendered.prompt, f" {continuation}") for continuation in rendered.continuations]
        owners += [index] * len(rendered.continuations)
    pairs, rows = fit_all(encode_pairs(tokenizer, texts), tokenizer, max_length, overlong, owners)
    questions: list[list[Pair | None]] = [[] for _ in examples]
    for owner, pair in zip(owners, pairs, strict=True):
        questions[owner].append(pair)
    kept = [(example, own) for example, own in zip(examples, questions, strict=True) if None not in own]
    if not kept:
        raise UserError(f"None of the {len(examples)} questions fits {max_length} tokens; raise max_length.")
    return [example for example, _ in kept], [own for _, own in kept], rows


def rows_that_fit(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    max_length: int,
    overlong: str,
) -> dict[str, Any]:
    """{"ids", "rows"}: which examples evaluate_choices (or, without choices, perplexity) would score, and how
    many {used, dropped, cut}.
    """
    if any(example.choices for example in examples):
        kept, _, rows = fitting_choices(examples, tokenizer, style, max_length, overlong)
    else:
        pairs, rows = fit_all(response_pairs(examples, tokenizer, style), tokenizer, max_length, overlong)
        kept = [example for example, pair in zip(examples, pairs, strict=True) if pair is not None]
    return {"ids": [example.id for example in kept], "rows": rows}


def _lm_eval(adapter: ChoiceModel, examples: Sequence[Example], task: str, style: str) -> dict[str, Any]:
    manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(_row(example, style) for example in examples), encoding="utf-8")
        source = {"data_files": {"test": str(rows)}, "cache_dir": folder}
        datasets.disable_progress_bars()
        tasks = manager.load(
            {"group": "qtale", "task": [{"task": f"qtale_{task}", "dataset_kwargs": source}]}
        )
        # any positive bootstrap_iters gives an accuracy's stderr in closed form; one question has none
        return evaluate(adapter, {"tasks": tasks["tasks"]}, bootstrap_iters=int(len(examples) > 1))


def _row(example: Example, style: str) -> str:
    rendered = render(example, style)
    row = {"prompt": rendered.prompt, "choices": rendered.continuations, "gold": example.answer}
    return json.dumps(row, ensure_ascii=False) + "\n"


def choice_nll(responses: Sequence[tuple[float, bool]], target: int) -> float:
    """−log of the right choice's share among the choices' likelihoods; responses: lm-eval's, one a choice."""
    log_likelihoods = torch.tensor([value for value, _ in responses], dtype=torch.float64)
    return float(-log_likelihoods.log_softmax(0)[target])


# Perplexity.


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    style: str = "compact",
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    overlong: str = "drop",
) -> dict[str, Any]:
    """Perplexity of the responses given their prompts: exp of the mean NLL over response tokens, end-of-text
    included.

    It is exp of the cross-entropy that fine-tuning minimises, over the same tokens. Returns ppl, nll, stderr
    (of ppl, over examples, delta method), count (response tokens), execution_ratio, loss_ratio, tokens, rows,
    protocol, and per example: ids, facts, example_nll (summed), example_tokens. Raises UserError where
    nothing is left to score.
    """
    max_length = max_length or model.config.max_position_embeddings
    fitted, rows = fit_all(response_pairs(examples, tokenizer, style), tokenizer, max_length, overlong)
    kept = [(example, pair) for example, pair in zip(examples, fitted, strict=True) if pair is not None]
    if not kept:
        raise UserError(f"None of the {len(examples)} responses fits {max_length} tokens; raise max_length.")
    scores = score(model, [pair for _, pair in kept], batch_size)
    sums = [-float(values.double().sum()) for values in scores.log_probabilities]
    counts = [len(values) for values in scores.log_probabilities]
    nll = sum(sums) / sum(counts)
    return {
        "ppl": math.exp(nll),
        "nll": nll,
        "stderr": math.exp(nll) * ratio_stderr(sums, counts) if len(kept) > 1 else None,
        "count": sum(counts),
        **scores.count.ratios(),
        "rows": rows,
        "ids": [example.id for example, _ in kept],
        "facts": [list(example.facts) for example, _ in kept],
        "example_nll": [round(value, DECIMALS) for value in sums],
        "example_tokens": counts,
        "protocol": {
            "name": "perplexity",
            "scoring": "exp of the mean negative log-likelihood over all response tokens",
            "end_of_text": "counted" if tokenizer.eos_token_id is not None else "the tokenizer has none",
            "style": style,
            "max_length": max_length,
            "overlong": overlong,
        },
    }


def ratio_stderr(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(sums) / sum(counts) over at least two independent examples, linearised."""
    mean = sum(sums) / sum(counts)
    squares = sum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * len(sums) / (len(sums) - 1)) / sum(counts)
