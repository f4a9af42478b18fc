"""The embedded world: a seeded miniature of the tasks, and the small Llama pretrained on its text.

`load(task, split)` gives Examples; `base_directory()` is the shipped base model. See `world` (facts and
rules), `tasks` (questions), `dialogues` (and summaries), `corpus` (pretraining text), `tokenizer`, `pretrain`
(how the base was made).
"""

from __future__ import annotations

from pathlib import Path

from qtale_lib.data.schema import SPLITS, Example
from qtale_lib.errors import UserError


def load(task: str, split: str) -> list[Example]:
    """The examples of one task and split; UserError for a name that does not exist."""
    from qtale_lib.data.microworld import tasks  # slow to build, and not needed by who brings data

    if task not in tasks.ASKED:
        raise UserError(f'The embedded world has no task "{task}"; it has {", ".join(tasks.ASKED)}.')
    if split not in SPLITS:
        raise UserError(f'There is no split "{split}"; there are {", ".join(SPLITS)}.')
    return list(tasks.examples(task, split))


def base_directory() -> Path:
    """Directory of the shipped base model (config, tokenizer, safetensors, model card)."""
    return Path(__file__).parent / "base"
