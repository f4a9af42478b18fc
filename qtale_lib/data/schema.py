"""One schema for every task's rows: the embedded world, the benchmarks' original files and the hub give the
same Example.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Example:
    """One question with its options, or one instruction with its response.

    fields: the original row's text, normalised to these keys: piqa {goal}; boolq {passage, question};
    siqa {context, question}; arc_easy, arc_challenge, openbookqa {question}; winogrande {sentence} with
    one "_"; mmlu {subject, question}, the subject "" in auxiliary_train; alpaca, alpaca_eval
    {instruction, input}; samsum {dialogue}. As in the originals, a boolq question carries no question
    mark. choices, answer: the options' own texts and the index of the right one; () and None for alpaca.
    response: the text a model is to give; left empty, it becomes choices[answer]. facts: ids of the
    embedded world's facts that the row rests on; () for other data. values: all answers that the choices
    were drawn from, the right one among them; () where the choices are all there is.
    """

    id: str
    task: str
    fields: Mapping[str, str]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    response: str = ""
    facts: tuple[str, ...] = ()
    values: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.answer is None:
            return
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"{self.id}: answer {self.answer} is outside its {len(self.choices)} choices")
        if not self.response:
            object.__setattr__(self, "response", self.choices[self.answer])
