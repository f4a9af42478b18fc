"""From Examples to token ids: one token boundary between prompt and continuation, in training and in scoring alike.

The text prompt + " " + continuation is tokenised whole; the continuation's ids are those after the prompt's own.
A beginning-of-text token leads if the tokenizer puts one itself; an end-of-text token, if it has one, ends the
response in training and in perplexity, and never follows a scored choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from qtale_lib.data.prompts import render
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError

IGNORED = -100  # the label that transformers' losses leave out
OVERLONG = ("drop", "cut")

Pair = tuple[list[int], list[int]]  # (prompt ids, continuation ids)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] if the tokenizer itself puts one before a text, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode_pairs(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Token ids of (prompt, continuation) texts; the continuation brings its own leading space."""
    if not texts:
        return []
    leading, prompts = leading_ids(tokenizer), list(dict.fromkeys(prompt for prompt, _ in texts))
    prompt_ids = dict(zip(prompts, _ids(tokenizer, prompts), strict=True))
    whole_ids = _ids(tokenizer, [prompt + continuation for prompt, continuation in texts])
    lengths = [len(prompt_ids[prompt]) for prompt, _ in texts]
    return [
        (leading + ids[:length], ids[length:]) for ids, length in zip(whole_ids, lengths, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def fit(pair: Pair, max_length: int, overlong: str, leading: int) -> tuple[Pair | None, bool]:
    """(the pair within max_length tokens, or None where it does not fit; whether it was cut).

    "drop" refuses every longer pair; "cut" takes tokens from the prompt's left, after its `leading` (0 or 1)
    beginning-of-text token, and never from the continuation. At least one prompt token stays.
    """
    if overlong not in OVERLONG:
        raise UserError(f'overlong is "{overlong}"; use one of {", ".join(OVERLONG)}.')
    prompt, continuation = pair
    excess = len(prompt) + len(continuation) - max_length
    if excess <= 0:
        return pair, False
    if overlong == "drop" or excess > len(prompt) - max(leading, 1):
        return None, False
    return (prompt[:leading] + prompt[leading + excess :], continuation), True


def response_pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: str
) -> list[Pair]:
    """Prompt and response ids of every example, the response ended by the end-of-text token."""
    rendered = [render(example, style) for example in examples]
    pairs = encode_pairs(tokenizer, [(text.prompt, f" {text.target}") for text in rendered])
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [(prompt, response + ending) for prompt, response in pairs]


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    style: str = "compact",
    max_length: int = 1024,
    overlong: str = "drop",
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Training rows {"input_ids", "labels"} (labels IGNORED on the prompt) and the report {used, dropped, cut}."""
    pairs, report = fit_all(response_pairs(examples, tokenizer, style), tokenizer, max_length, overlong)
    kept = [pair for pair in pairs if pair is not None]
    return [
        {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response} for prompt, response in kept
    ], report


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: str = "compact",
    max_length: int = 1024,
    overlong: str = "drop",
) -> dict[str, list[int]] | None:
    """One training row {"input_ids", "labels"}; None where it is longer than max_length and cannot be kept."""
    rows, _ = encode_all([example], tokenizer, style, max_length, overlong)
    return rows[0] if rows else None


def fit_all(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: str
) -> tuple[list[Pair | None], dict[str, int]]:
    """fit for every pair, and the report {used, dropped, cut} (cut rows are among the used)."""
    leading = len(leading_ids(tokenizer))
    fitted = [fit(pair, max_length, overlong, leading) for pair in pairs]
    used = sum(pair is not None for pair, _ in fitted)
    report = {"used": used, "dropped": len(fitted) - used, "cut": sum(cut for _, cut in fitted)}
    return [pair for pair, _ in fitted], report


def pad_right(sequences: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """int64 [rows, longest]; shorter rows filled with `padding` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[padding] * (longest - len(sequence))] for sequence in sequences])


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A right-padded batch: input_ids, labels (IGNORED on padding), attention_mask, each int64 [rows, longest]."""
    return {
        "input_ids": pad_right([row["input_ids"] for row in rows], pad_id),
        "labels": pad_right([row["labels"] for row in rows], IGNORED),
        "attention_mask": pad_right([[1] * len(row["input_ids"]) for row in rows], 0),
    }
