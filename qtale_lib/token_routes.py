"""Which tokens skip: executed layers by kind, place and surprisal of the token; what always running is worth.

Read off one trained run on prompts with their reference responses. What always runs is varied in evaluation
alone: the routers were trained beside the tokens and layers that their profile reserves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qtale_lib.adaptive import record_routes, routing_state
from qtale_lib.data import Example
from qtale_lib.data.encoding import Pair, fit_all, pad_right, response_pairs
from qtale_lib.evaluation import perplexity

WORDS = """
    a an the and or but of in on at by to from for with about as that which who whom whose this these those
    it its he she they them his her their is are was were be been being has have had do does did not no what
    where when how why me you we i us my your our
"""
FUNCTION_WORDS = frozenset(WORDS.split())
SURPRISAL = (0.01, 0.1, 1.0, 3.0)  # nats: edges between the bins
PLACES = 32  # from which on places count as one
RESERVED = (1, 2, 4, 8)  # first tokens that always run, tried


def kinds(pieces: Sequence[str], special: Sequence[bool]) -> list[str]:
    """The kind of every token of one sequence: special, punctuation, number, function word, name or word.

    A name is a capitalised word that stands capitalised within a sentence of the same text.
    """
    words = [piece.lstrip("Ġ▁ ") for piece in pieces]
    first = [place == 0 or not any(map(str.isalnum, words[place - 1])) for place in range(len(words))]
    names = {word for word, start in zip(words, first, strict=True) if word[:1].isupper() and not start}
    return ["special" if marked else _kind(word, names) for word, marked in zip(words, special, strict=True)]


def _kind(word: str, names: set[str]) -> str:
    if not any(map(str.isalnum, word)):
        return "punctuation"
    if any(map(str.isdigit, word)):
        return "number"
    if word.lower() in FUNCTION_WORDS:
        return "function word"
    return "name" if word in names else "word"


def read_routes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **fitting: Any
) -> dict[str, Any]:
    """How often tokens execute each layer, at the model's θ.

    fitting: style, batch_size, max_length and overlong, as of evaluation.perplexity.
    Returns {"groups": [{"by", "name", "tokens", "executed"}]}: executed, [layers], is the share of the
    group's tokens that each layer ran. By "kind" ("name, prompt" ...) and "surprisal" (the number of its bin,
    in nats) without the tokens that always run, by "place" with them.
    """
    pairs = response_pairs(examples, tokenizer, fitting["style"])
    fitted, _ = fit_all(pairs, tokenizer, fitting["max_length"], fitting["overlong"])
    kept = sorted((pair for pair in fitted if pair is not None), key=lambda pair: len(pair[0]) + len(pair[1]))
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(0))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for start in range(0, len(kept), fitting["batch_size"]):
        for key, executed in _tokens(model, tokenizer, kept[start : start + fitting["batch_size"]]):
            sums[key] = executed + (sums[key] if counts[key] else 0)
            counts[key] += 1
    return {
        "groups": [
            {
                "by": by,
                "name": name,
                "tokens": counts[by, name],
                "executed": (total / counts[by, name]).tolist(),
            }
            for (by, name), total in sums.items()
        ]
    }


@torch.no_grad()
def _tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Pair]
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """(by, name) of every group that a token is in, with the layers that it executed, [layers]."""
    rows = [prompt + response for prompt, response in batch]
    device = model.get_input_embeddings().weight.device
    valid = pad_right([[True] * len(ids) for ids in rows], False).to(device)
    fed = pad_right(rows, 0).to(device)
    with record_routes(model) as routes:
        logits = model(input_ids=fed, attention_mask=valid.long(), use_cache=False).logits
    nats = _surprisal(logits, fed).cpu().numpy()
    executed, reserved = routes.executed.cpu().numpy(), routing_state(model).config.always_run_tokens
    special = set(tokenizer.all_special_ids)
    for row, (ids, (prompt, _)) in enumerate(zip(rows, batch, strict=True)):
        named = kinds(tokenizer.convert_ids_to_tokens(ids), [number in special for number in ids])
        for place, kind in enumerate(named):
            ran = executed[:, row, place].astype(float)
            yield ("place", str(min(place, PLACES))), ran
            if place >= reserved:
                yield ("kind", f"{kind}, {'prompt' if place < len(prompt) else 'response'}"), ran
                yield ("surprisal", str(int(np.searchsorted(SURPRISAL, nats[row, place])))), ran


def _surprisal(logits: Tensor, fed: Tensor) -> Tensor:
    """−log p of every token given those before it, in nats, [B, T]; 0 for the first."""
    nats = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), fed[:, 1:], reduction="none"
    )  # [B, T - 1]
    return nn.functional.pad(nats, (1, 0))


# What always running is worth.


def worth(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **fitting: Any
) -> dict[str, Any]:
    """Perplexity of the responses, and R, with other tokens reserved, and with each layer bypassed by all.

    Returns {"reserved": [{"tokens", "ppl", "execution_ratio"}], "bypassed": [{"layer", "ppl"}], "ppl"}.
    """

    def measured() -> dict[str, float]:
        found = perplexity(model, tokenizer, examples, **fitting)
        return {name: found[name] for name in ("ppl", "execution_ratio")}

    tried = []
    for count in RESERVED:
        with reserving(model, count):
            tried.append({"tokens": count, **measured()})
    bypassed = []
    for layer in range(routing_state(model).n_layers):
        with bypassing(model, layer):
            bypassed.append({"layer": layer, "ppl": measured()["ppl"]})
    return {"reserved": tried, "bypassed": bypassed, **measured()}


@contextmanager
def reserving(model: nn.Module, count: int) -> Iterator[None]:
    """Meanwhile so many first tokens of a sequence always run."""
    state = routing_state(model)
    before, state.config = state.config, replace(state.config, always_run_tokens=count)
    try:
        yield
    finally:
        state.config = before


@contextmanager
def bypassing(model: nn.Module, layer: int) -> Iterator[None]:
    """Meanwhile all tokens bypass one decoder layer."""

    def unchanged(module: nn.Module, given: tuple, named: dict[str, Any], output: Tensor) -> Tensor:
        return given[0] if given else named["hidden_states"]

    hook = model.get_decoder().layers[layer].register_forward_hook(unchanged, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
