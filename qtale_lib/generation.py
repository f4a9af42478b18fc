"""Text from a model by greedy decoding, with layers skipped and the share of them that ran."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtale_lib.adaptive import record_routes, set_execution
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


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int = 100
) -> Generated:
    """Continue a prompt by the likeliest token each time, until end of text or max_tokens.

    A routed model executes and caches only what its threshold lets run.
    Raises UserError for an empty prompt, or where prompt and text would not fit the model's positions.
    """
    ids = leading_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = model.config.max_position_embeddings - len(ids)
    if not ids:
        raise UserError("The prompt is empty; give a text to go on from.")
    if max_tokens > room:
        raise UserError(
            f"The prompt's {len(ids)} tokens leave room for {max(room, 0)} more, not {max_tokens}; "
            "shorten the prompt or ask for fewer."
        )
    fed = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    how = {"attention_mask": torch.ones_like(fed), "max_new_tokens": max_tokens, "do_sample": False}
    how["pad_token_id"] = tokenizer.pad_token_id
    model.eval()
    if not is_routed(model):
        made, ratio = model.generate(fed, **how), None
    else:
        set_execution(model, "skip")
        with record_routes(model) as routes:
            made = model.generate(fed, **how)
        ratio = float(routes.executed[:, routes.valid].float().mean())
    new = made[0, len(ids) :]
    return Generated(tokenizer.decode(new, skip_special_tokens=True), len(new), ratio)
