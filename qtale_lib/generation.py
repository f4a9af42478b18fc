"""Text from a model by greedy decoding, with layers skipped and the share of them that ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtale_lib.adaptive import Routes, record_routes, set_execution
from qtale_lib.data.encoding import leading_ids
from qtale_lib.errors import UserError
from qtale_lib.quantization.statistics import is_routed


@dataclass(frozen=True)
class Generated:
    """text: what follows the prompt; tokens: how many; execution_ratio: over prompt and text, None without
    routers.
    """

    text: str
    tokens: int
    execution_ratio: float | None


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int = 100
) -> Generated:
    """Continue one prompt; see `generate_all`."""
    return generate_all(model, tokenizer, [prompt], max_tokens)[0]


@torch.no_grad()
def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int = 100,
    batch_size: int = 64,
) -> list[Generated]:
    """Continue every prompt by the likeliest token each time, until end of text or max_tokens.

    A routed model executes and caches only what its threshold lets run. Prompts of like length share a batch,
    padded on the left, which changes none of them.
    Raises UserError for an empty prompt, or where prompt and text would not fit the model's positions.
    """
    rows = prompt_ids(tokenizer, prompts)
    longest, positions = max(map(len, rows), default=0), model.config.max_position_embeddings
    if not all(rows):
        raise UserError("The prompt is empty; give a text to go on from.")
    if max_tokens > positions - longest:
        raise UserError(
            f"The prompt's {longest} tokens leave room for {max(positions - longest, 0)} more, "
            f"not {max_tokens}; shorten the prompt or ask for fewer."
        )
    model.eval()
    if is_routed(model):
        set_execution(model, "skip")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    made: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = _batch(model, tokenizer, [rows[index] for index in batch], max_tokens)
        made |= zip(batch, texts, strict=True)
    return [made[index] for index in range(len(rows))]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """What is fed of every prompt."""
    leading = leading_ids(tokenizer)
    return [leading + tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_tokens: int
) -> list[Generated]:
    width = max(map(len, rows))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    device = model.get_input_embeddings().weight.device
    fed = torch.tensor([[padding] * (width - len(ids)) + ids for ids in rows], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    how = {"attention_mask": mask, "max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": padding}
    if not is_routed(model):
        new, ratios = model.generate(fed, **how)[:, width:], [None] * len(rows)
        lengths = _lengths(new, tokenizer.eos_token_id)
    else:
        with record_routes(model) as routes:
            new = model.generate(fed, **how)[:, width:]
        lengths = _lengths(new, tokenizer.eos_token_id)
        ratios = _ratios(routes, width, lengths)
    texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(new, lengths, strict=True)]
    return [Generated(*parts) for parts in zip(texts, lengths, ratios, strict=True)]


def _lengths(new: Tensor, end: int | None) -> list[int]:
    """Tokens of each row of `new` [B, N], the first end of text included; what follows it is padding."""
    if end is None:
        return [new.shape[1]] * len(new)
    before = (new == end).cumsum(1) - (new == end).long() == 0
    return before.sum(1).tolist()


def _ratios(routes: Routes, width: int, lengths: list[int]) -> list[float]:
    """R of every row: over its prompt and all its new tokens but the last, which is not fed."""
    executed, valid = routes.executed, routes.valid
    places = torch.arange(valid.shape[1], device=valid.device)
    own = valid & (places < width - 1 + torch.tensor(lengths, device=valid.device)[:, None])
    counted = (executed & own).sum((0, 2)) / (len(executed) * own.sum(1))
    return counted.tolist()
