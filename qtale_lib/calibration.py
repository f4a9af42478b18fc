"""The two-phase search for the execution threshold θ (Sec. 3.4), on questions that no evaluation sees.

A coarse sweep over (0, 0.5], then a fine one around its candidate. The candidate is the largest θ, so the
cheapest model, whose score is within a tolerance of the best seen: an accuracy lower by at most that, or a
PPL higher by at most that fraction.

    >>> model = load_routed("runs/arc_easy-qtale")
    >>> questions = load_task("arc_easy", "calibration")
    >>> search = search_threshold(model, tokenizer, questions)
    >>> search.theta, search.execution_ratio
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import singledispatch
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qtale_lib.adaptive import set_threshold
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError
from qtale_lib.evaluation import BATCH_SIZE, choice_nll, fitting_choices, perplexity, score

LARGEST = 0.5  # arg max; above it fewer layers run than the model was trained to run

Objective = Callable[[float], tuple[float, float]]  # θ -> (score, execution ratio)


@dataclass(frozen=True)
class Point:
    """What one θ gives."""

    theta: float
    score: float
    execution_ratio: float


@dataclass(frozen=True)
class ThresholdSearch:
    """The θ found, with its score and ratio, and both curves in rising θ (points met twice are in both)."""

    theta: float
    score: float
    execution_ratio: float
    coarse: tuple[Point, ...]
    fine: tuple[Point, ...]
    tolerance: float
    higher_is_better: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)


@singledispatch
def search_threshold(
    objective: Objective,
    *,
    coarse_step: float = 0.05,
    fine_step: float = 0.01,
    tolerance: float = 0.005,
    higher_is_better: bool = True,
) -> ThresholdSearch:
    """Search θ for an objective, or for a routed model: search_threshold(model, tokenizer, examples, ...).

    An objective gives (score, execution ratio) for a θ; each θ is evaluated once. For a model it is the
    accuracy on the examples (with objective="likelihood" the PPL of the right choices among all), or the PPL
    of the responses where there are no choices; the keywords are then those of evaluate_choices (style,
    batch_size, max_length, overlong) beside steps, tolerance and objective; the model is left at the θ found.

    coarse: 0.5, 0.5 - coarse_step, ... above 0; fine: less than coarse_step to either side of the coarse
    candidate, within (0, 0.5]. The result is the candidate of both curves together.
    Raises UserError for steps that are not 0 < fine_step <= coarse_step <= 0.5, for a score that is NaN, for
    a model without routers, and where no example fits.
    """
    if not 0 < fine_step <= coarse_step <= LARGEST:
        raise UserError(f"θ steps {coarse_step} and {fine_step} are not 0 < fine <= coarse <= {LARGEST}.")
    seen: dict[float, Point] = {}

    def curve(thetas: list[float]) -> tuple[Point, ...]:
        for theta in thetas:
            if theta not in seen:
                seen[theta] = _evaluate(objective, theta)
        return tuple(seen[theta] for theta in thetas)

    coarse = curve(_grid(LARGEST, coarse_step, LARGEST))
    candidate = _candidate(coarse, tolerance, higher_is_better).theta
    fine = curve(_grid(candidate, fine_step, coarse_step))
    best = _candidate(coarse + fine, tolerance, higher_is_better)
    return ThresholdSearch(
        best.theta, best.score, best.execution_ratio, coarse, fine, tolerance, higher_is_better
    )


@search_threshold.register(nn.Module)
def _search_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    coarse_step: float = 0.05,
    fine_step: float = 0.01,
    tolerance: float = 0.005,
    objective: str = "accuracy",
    **settings: Any,
) -> ThresholdSearch:
    build = OBJECTIVES[objective] if any(example.choices for example in examples) else perplexity_objective
    search = search_threshold(
        build(model, tokenizer, examples, **settings),
        coarse_step=coarse_step,
        fine_step=fine_step,
        tolerance=tolerance,
        higher_is_better=build is accuracy_objective,
    )
    set_threshold(model, search.theta)
    return search


def accuracy_objective(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **settings: Any
) -> Objective:
    """θ -> (accuracy, R_avg): what evaluate_choices gives, without lm-eval around it, ids encoded once."""
    answered = _answering(model, tokenizer, examples, **settings)

    def objective(theta: float) -> tuple[float, float]:
        questions, execution_ratio = answered(theta)
        right = sum(_arg_max(sums) == answer for sums, answer in questions)
        return right / len(questions), execution_ratio

    return objective


def likelihood_objective(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **settings: Any
) -> Objective:
    """θ -> (PPL of the right choices among all, R_avg): exp of evaluate_choices' nll, a smoother measure than
    accuracy of the same questions.
    """
    answered = _answering(model, tokenizer, examples, **settings)

    def objective(theta: float) -> tuple[float, float]:
        questions, execution_ratio = answered(theta)
        nll = [choice_nll([(value, False) for value in sums], answer) for sums, answer in questions]
        return math.exp(sum(nll) / len(nll)), execution_ratio

    return objective


OBJECTIVES = {"accuracy": accuracy_objective, "likelihood": likelihood_objective}


def _answering(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    style: str = "compact",
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
    overlong: str = "drop",
) -> Callable[[float], tuple[list[tuple[list[float], int]], float]]:
    """θ -> (per question the log-likelihoods of its choices and which is right; R_avg)."""
    max_length = max_length or model.config.max_position_embeddings
    kept, questions, _ = fitting_choices(examples, tokenizer, style, max_length, overlong)
    pairs = [pair for question in questions for pair in question]

    def answered(theta: float) -> tuple[list[tuple[list[float], int]], float]:
        set_threshold(model, theta)
        scores = score(model, pairs, batch_size)
        sums = iter([float(values.sum()) for values in scores.log_probabilities])
        per_question = [[next(sums) for _ in question] for question in questions]
        answers = [example.answer for example in kept]
        return list(zip(per_question, answers, strict=True)), scores.count.ratios()["execution_ratio"]

    return answered


def perplexity_objective(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **settings: Any
) -> Objective:
    """θ -> (PPL of the responses, R_avg); the settings are those of evaluation.perplexity."""

    def objective(theta: float) -> tuple[float, float]:
        set_threshold(model, theta)
        result = perplexity(model, tokenizer, examples, **settings)
        return result["ppl"], result["execution_ratio"]

    return objective


def _arg_max(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _evaluate(objective: Objective, theta: float) -> Point:
    value, execution_ratio = objective(theta)
    if math.isnan(value):
        raise UserError(
            f"The score at θ = {theta} is not a number; the model's weights or its data are damaged."
        )
    return Point(theta, value, execution_ratio)


def _grid(anchor: float, step: float, reach: float) -> list[float]:
    """anchor + k · step for every integer k that stays less than reach away and within (0, 0.5], rising."""
    count = math.ceil(reach / step - 1e-9) - 1
    thetas = [round(anchor + k * step, 9) for k in range(-count, count + 1)]
    return [theta for theta in thetas if 0 < theta <= LARGEST]


def _candidate(points: Sequence[Point], tolerance: float, higher_is_better: bool) -> Point:
    """The largest θ whose score is within tolerance of the best."""
    if higher_is_better:
        worst = max(point.score for point in points) - tolerance
        good = [point for point in points if point.score >= worst - 1e-12]
    else:
        worst = min(point.score for point in points) * (1 + tolerance)
        good = [point for point in points if point.score <= worst * (1 + 1e-12)]
    return max(good, key=lambda point: point.theta)
