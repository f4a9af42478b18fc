"""Write docs/prompts.md: one rendered example of every task.  python scripts/prompts.py"""

from __future__ import annotations

from pathlib import Path

from qtale_lib.config import TASKS
from qtale_lib.data import Example, load_task
from qtale_lib.data.prompts import STYLES, render

PAGE = Path(__file__).parents[1] / "docs" / "prompts.md"
HEAD = """# Prompts

One example of every task, as the model reads it; written by `python scripts/prompts.py`, and a test holds
the page and the code together. The questions are the embedded world's, the last two are made up: no
benchmark's text stands here.

What is fed is always the prompt, a space and a continuation. In fine-tuning the continuation is the
response, and the end-of-text token after it. In evaluation (`protocol: likelihood`) every choice of the
request is scored after the same prompt, and the likeliest is the answer; where there are no choices, the
perplexity of the response is taken. The style is the profile's `prompt`: `dllm` is D-LLM's instruction
format with task descriptions in our own words, the material under "Input", where D-LLM's prompt for PIQA
has it under "Instruction"; `compact` is the embedded base's.

`protocol: lm_eval` scores by lm-eval's own tasks and prompts instead (`piqa`, `boolq`, `social_iqa`,
`arc_easy`, `arc_challenge`, `winogrande`, `openbookqa`, `mmlu`), zero-shot, on the same rows; fine-tuning
and the θ search keep the profile's `prompt`.
"""
MADE_UP = (
    Example(
        "made-up/0",
        "alpaca_eval",
        {"instruction": "Name a bird that swims well.", "input": ""},
        response="The penguin swims well.",
    ),
    Example(
        "made-up/1",
        "samsum",
        {"dialogue": "Bo: Is the pump mended?\nAl: Since noon.\nBo: Then I'll water the beans."},
        response="Al has mended the pump, and Bo will water the beans.",
    ),
)


def page() -> str:
    """The whole page."""
    examples = [load_task(task, "test")[0] for task in TASKS] + list(MADE_UP)
    return HEAD + "".join(map(_section, examples))


def _section(example: Example) -> str:
    parts = [f"\n## {example.task}\n"]
    for style in reversed(STYLES):
        text = render(example, style)
        asked = " | ".join(text.continuations) or "the response's perplexity"
        parts.append(
            f"\n{style}: prompt\n\n```text\n{text.prompt}\n```\n\n"
            f"response: `{text.target}`; evaluation request: `{asked}`\n"
        )
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
