"""From Examples to token ids: one token boundary between prompt and continuation, in training and in scoring
alike.

The text prompt + " " + continuation is tokenised whole; the continuation's ids are those after the prompt's
own. A beginning-of-text token leads if the tokenizer puts one itself; an end-of-text token, if it has one,
ends the response in training and in perplexity, and never follows a scored choice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

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
    return [(leading + ids[:length], ids[length:]) for ids, length in zip(whole_ids, lengths, strict=True)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def response_pairs(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, style: str) -> list[Pair]:
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
    """Training rows {"input_ids", "labels"} (labels IGNORED on the prompt) and the report {used, dropped,
    cut}.
    """
    pairs, report = fit_all(response_pairs(examples, tokenizer, style), tokenizer, max_length, overlong)
    kept = [pair for pair in pairs if pair is not None]
    return [
        {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}
        for prompt, response in kept
    ], report


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: str = "compact",
    max_length: int = 1024,
    overlong: str = "drop",
) -> dict[str, list[int]] | None:
    """One training row {"input_ids", "labels"}; None where it does not fit max_length."""
    rows, _ = encode_all([example], tokenizer, style, max_length, overlong)
    return rows[0] if rows else None


def fit_all(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlong: str,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[Pair | None], dict[str, int]]:
    """Every pair within max_length tokens, or None where it is left out; and the report {used, dropped, cut}.

    "drop" leaves out what is longer; "cut" takes the prompt's left, after its beginning-of-text token, never
    the continuation, and leaves out what still does not fit with one prompt token. Pairs of one group (the
    choices of a question; by default each pair is its own) are cut alike; the report counts groups.
    """
    if overlong not in OVERLONG:
        raise UserError(f'overlong is "{overlong}"; use one of {", ".join(OVERLONG)}.')
    groups = range(len(pairs)) if groups is None else groups
    excess = dict.fromkeys(groups, 0)
    for group, (prompt, continuation) in zip(groups, pairs, strict=True):
        excess[group] = max(excess[group], len(prompt) + len(continuation) - max_length)
    leading = len(leading_ids(tokenizer))
    fitted = [
        _shorten(pair, excess[group], overlong, leading) for group, pair in zip(groups, pairs, strict=True)
    ]
    dropped = {group for group, pair in zip(groups, fitted, strict=True) if pair is None}
    cut = {group for group in excess if excess[group] > 0} - dropped
    return fitted, {"used": len(excess) - len(dropped), "dropped": len(dropped), "cut": len(cut)}


def _shorten(pair: Pair, excess: int, overlong: str, leading: int) -> Pair | None:
    prompt, continuation = pair
    if not excess:
        return pair
    if overlong == "drop" or excess > len(prompt) - max(leading, 1):
        return None
    return prompt[:leading] + prompt[leading + excess :], continuation


def pad_right(sequences: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """[rows, longest], int64 or bool; shorter rows filled with `padding` on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[padding] * (longest - len(sequence))] for sequence in sequences])


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A right-padded batch: input_ids, labels (IGNORED there), attention_mask, each int64 [rows, longest].

    Rows that have a number of their own, "example", keep it: int64 [rows].
    """
    batch = {
        "input_ids": pad_right([row["input_ids"] for row in rows], pad_id),
        "labels": pad_right([row["labels"] for row in rows], IGNORED),
        "attention_mask": pad_right([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    if "example" in rows[0]:
        batch["example"] = torch.tensor([row["example"] for row in rows])
    return batch
