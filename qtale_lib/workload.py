"""How many rows a task has and how long they are, in tokens: measured on the data at hand, else typical."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from qtale_lib.data.prompts import Rendered, render
from qtale_lib.jobs import WRITTEN
from qtale_lib.memory import Batch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qtale_lib.config import Profile
    from qtale_lib.data import Example
    from qtale_lib.lab import Lab

CHARACTERS = 4  # of a token, where the base's tokenizer is not at hand
SAMPLED, LONGEST = 200, 64  # rows that are tokenised for a mean, and to find the longest batch

# Rows to train on and to test on, characters of a row in the "dllm" style and of its answer. Counted on the
# original files, but for the training rows of BoolQ, WinoGrande and MMLU (published counts, less a slice for
# calibration) and the characters of MMLU's, which are mostly reading comprehension: a guess.
TYPICAL = {
    "piqa": (15113, 1838, 592, 2),
    "boolq": (8484, 3270, 942, 4),
    "siqa": (32410, 1954, 544, 2),
    "arc_easy": (2026, 2376, 522, 2),
    "arc_challenge": (1008, 1172, 561, 2),
    "winogrande": (39398, 1267, 436, 2),
    "openbookqa": (4462, 500, 473, 2),
    "mmlu": (98842, 14042, 1900, 2),
    "alpaca": (49002, 2000, 519, 271),
    "samsum": (13732, 819, 800, 110),  # of dialogue and summary a guess
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a split's rows: mean and longest (no longer than max_length), and of answers: their mean over
    all rows, over the longest rows, and the longest.
    """

    mean: float
    longest: int
    answer: float
    late_answer: float
    longest_answer: int


@dataclass(frozen=True)
class Workload:
    """One task under a profile: rows of each kind; sequences fed for a question; lengths when trained on and
    when scored; measured: on the data at hand, rather than typical.
    """

    task: str
    train: int
    test: int
    searched: int
    sequences: int
    trained: Lengths
    scored: Lengths
    measured: bool

    def training_batch(self, profile: Profile) -> Batch:
        """The micro-batch that holds the longest row."""
        rows = min(profile.split_batch()[0], self.train)
        answers = self.trained.longest_answer + (rows - 1) * self.trained.answer
        return Batch(rows, self.trained.longest, round(answers))

    def scoring_batch(self, profile: Profile) -> Batch:
        """The batch of the longest rows: scoring sorts by length."""
        rows = min(profile.training.eval_batch_size, max(self.test, self.searched) * self.sequences)
        return Batch(rows, self.scored.longest, round(rows * self.scored.late_answer))


def measured(lab: Lab, task: str, tokenizer: Tokenizer | None, scored: bool = True) -> Workload:
    """From the rows that the profile uses; by characters where there is no tokenizer.

    scored: False leaves out the rows that are not trained on.
    Raises:
        UserError: if rows are missing or damaged.
    """
    profile = lab.profile
    train = lab.examples(task, "train")
    test = lab.examples(task, profile.evaluated) if scored else []
    searched = lab.examples(task, "calibration")[: profile.calibration.questions] if scored else []
    targets = [(text.prompt, text.target) for text in _rendered(train, profile)]
    asked = [
        (text.prompt, answer) for text in _rendered([*searched, *test], profile) for answer in _answers(text)
    ]
    return Workload(
        task,
        len(train),
        len(test),
        len(searched),
        _sequences(test or train, profile),
        _lengths(targets, tokenizer, profile.max_length),
        _lengths(asked or targets, tokenizer, profile.max_length),
        True,
    )


def typical(profile: Profile, task: str) -> Workload:
    """From what the benchmark's files hold, in the "dllm" style, some row as long as max_length."""
    train, test, characters, answer = TYPICAL[task]
    longest = profile.max_length
    long_answer = longest - 32 if task in WRITTEN else 2
    lengths = Lengths(
        min(characters / CHARACTERS, longest),
        longest,
        max(1.0, answer / CHARACTERS),
        long_answer,
        long_answer,
    )
    searched = min(profile.calibration.questions, profile.limit.calibration or 1000, train)
    return Workload(
        task,
        min(train, profile.limit.train or train),
        min(test, profile.limit.test or test),
        searched,
        1,
        lengths,
        lengths,
        False,
    )


def _rendered(examples: Sequence[Example], profile: Profile) -> list[Rendered]:
    return [render(example, profile.prompt) for example in examples]


def _answers(text: Rendered) -> tuple[str, ...]:
    return text.values or text.continuations or (text.target,)


def _sequences(examples: Sequence[Example], profile: Profile) -> int:
    """Sequences fed for a question: labels of one token share one."""
    return (
        1 if profile.prompt == "dllm" else max(len(_answers(text)) for text in _rendered(examples, profile))
    )


def _lengths(pairs: list[tuple[str, str]], tokenizer: Tokenizer | None, most: int) -> Lengths:
    """Of (prompt, answer) texts, of which longer ones than `most` are dropped or cut."""
    by_length = sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]), reverse=True)
    sample = _counted(random.Random(0).sample(pairs, min(SAMPLED, len(pairs))), tokenizer, most)
    late = _counted(by_length[: 4 * LONGEST], tokenizer, most)
    fitting = sorted((row for row in late if sum(row) < most), reverse=True, key=sum)[:LONGEST]
    rows = fitting if len(fitting) == LONGEST or not late else sorted(late, reverse=True, key=sum)[:LONGEST]
    return Lengths(
        fmean(min(sum(row), most) for row in sample),
        min(max(map(sum, rows)), most),
        fmean(answer for _, answer in sample),
        fmean(min(answer, most) for _, answer in rows),
        min(max(answer for _, answer in rows), most),
    )


def _counted(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer | None, most: int
) -> list[tuple[int, int]]:
    """Tokens of each prompt, with a beginning-of-text, and answer, with an end-of-text."""
    if tokenizer is None:
        return [(len(prompt) // CHARACTERS + 1, len(answer) // CHARACTERS + 2) for prompt, answer in pairs]
    texts = [text for prompt, answer in pairs for text in (prompt, f" {answer}")]
    counts = [len(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return [(counts[i] + 1, counts[i + 1] + 1) for i in range(0, len(counts), 2)]
