"""How an Example becomes text: two prompt styles, each a table of templates by task.

"compact": a short line in plain words, answered with an option's own text (the cloze form: the prompt does
not list the options, so one prompt scores them all). The embedded base is pretrained on it. "dllm": the
instruction format of D-LLM's fine-tuning (Alpaca's wrapper around a task description), answered with the
option's label. The wrapper is Alpaca's; the task descriptions are in our own words.

The text fed to a model is always prompt + " " + continuation.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError

COMPACT = {
    "piqa": "goal : {goal} answer :",
    "boolq": "passage : {passage} question : {question} ? answer :",
    "siqa": "context : {context} question : {question} answer :",
    "arc_easy": "question : {question} answer :",
    "arc_challenge": "question : {question} answer :",
    "winogrande": "sentence : {sentence} answer : {cue}",  # the cue: up to two words before the blank
    "openbookqa": "question : {question} answer :",
    "mmlu": "subject : {subject} question : {question} answer :",
    "alpaca": "instruction : {instruction} input : {input} response :",
    "alpaca_eval": "instruction : {instruction} input : {input} response :",
    "samsum": "dialogue : {dialogue} summary :",
}
# Where a field is empty, the template that leaves it out.
COMPACT_WITHOUT = {
    "input": "instruction : {instruction} response :",
    "subject": "question : {question} answer :",
}

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

SUMMARISE = {"instruction": "Summarise this dialogue in a few sentences."}

# task -> (what to do and how to answer, the material, the options' labels)
DLLM = {
    "piqa": (
        "Read an everyday task and its two candidate solutions, and choose the solution that works better. "
        'Answer with "1" or "2".',
        "Task: {goal}\n\nSolutions:\n{options}",
        "12",
    ),
    "boolq": (
        "Read a passage and decide whether the answer to the question about it is yes or no. "
        'Answer with "yes" or "no".',
        "Passage: {passage}\n\nQuestion: {question}?",
        ("yes", "no"),
    ),
    "siqa": (
        "Read what happened to some people and choose the most plausible answer to the question about it. "
        'Answer with "1", "2" or "3".',
        "Context: {context}\n\nQuestion: {question}\n\nAnswers:\n{options}",
        "123",
    ),
    "arc_easy": (
        "Choose the right answer to a science question. Answer with its letter.",
        "Question: {question}\n\nAnswers:\n{options}",
        "ABCDE",
    ),
    "arc_challenge": (
        "Choose the right answer to a science question. Answer with its letter.",
        "Question: {question}\n\nAnswers:\n{options}",
        "ABCDE",
    ),
    "winogrande": (
        'Choose the option that the blank (_) in a sentence stands for. Answer with "1" or "2".',
        "Sentence: {sentence}\n\nOptions:\n{options}",
        "12",
    ),
    "openbookqa": (
        "Choose the right answer to a question that takes a science fact and common sense. "
        "Answer with its letter.",
        "Question: {question}\n\nAnswers:\n{options}",
        "ABCD",
    ),
    "mmlu": (
        "Choose the right answer to an exam question. Answer with its letter.",
        "Subject: {subject}\n\nQuestion: {question}\n\nAnswers:\n{options}",
        "ABCD",
    ),
}


@dataclass(frozen=True)
class Rendered:
    """prompt; one continuation per choice (none without choices); target: the right one, or the response;
    values: a continuation per answer that the choices were drawn from (none where the prompt lists them).
    """

    prompt: str
    continuations: tuple[str, ...]
    target: str
    values: tuple[str, ...] = ()


def render(example: Example, style: str = "compact") -> Rendered:
    """Text of one example in the "compact" or the "dllm" style; UserError for another style or task."""
    if style not in STYLES:
        raise UserError(f'There is no prompt style "{style}"; use one of {", ".join(STYLES)}.')
    if example.task not in COMPACT:
        raise UserError(f'There is no prompt for task "{example.task}"; known: {", ".join(COMPACT)}.')
    return STYLES[style](example)


def _compact(example: Example) -> Rendered:
    shorter = [text for name, text in COMPACT_WITHOUT.items() if example.fields.get(name) == ""]
    template = shorter[0] if shorter else COMPACT[example.task]
    values = example.values or example.choices
    prompt = template.format(**example.fields, cue=_cue(example.fields.get("sentence", "")))
    return Rendered(prompt.rstrip(), example.choices, example.response, values)


def _cue(sentence: str) -> str:
    return " ".join(sentence.partition("_")[0].split()[-2:])


def _dllm(example: Example) -> Rendered:
    if not example.choices:
        fields = example.fields
        if example.task == "samsum":
            fields = {**SUMMARISE, "input": fields["dialogue"]}
        template = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
        return Rendered(template.format(**fields), (), example.response)
    instruction, material, labels = DLLM[example.task]
    labels = tuple(labels[: len(example.choices)])
    options = "\n".join(f"  {label}. {choice}" for label, choice in zip(labels, example.choices, strict=True))
    material = material.format(**example.fields, options=options).removeprefix("Subject: \n\n")
    prompt = ALPACA_WITH_INPUT.format(instruction=instruction, input=material)
    return Rendered(prompt, labels, labels[example.answer])


STYLES = {"compact": _compact, "dllm": _dllm}
