"""Greedy text: what transformers gives on dense execution, with the ratio of layers that ran."""

import pytest
import torch
from small_models import TOKENIZER, routed_llama, tiny_llama

from qtale_lib.adaptive import set_execution, set_threshold
from qtale_lib.errors import UserError
from qtale_lib.generation import generate

PROMPT = "w1 w2 w3 w4"


@pytest.mark.parametrize("theta", [0.0, 0.5, 0.9])
def test_skipping_writes_what_dense_execution_does(theta):
    model = routed_llama()
    set_threshold(model, theta)
    made = generate(model, TOKENIZER, PROMPT, 12)
    set_execution(model, "dense")
    ids = TOKENIZER(PROMPT, return_tensors="pt")["input_ids"]
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    new = dense[0, ids.shape[1] :]
    assert made.text == TOKENIZER.decode(new, skip_special_tokens=True) and made.tokens == len(new)
    assert made.execution_ratio == 1.0 if theta == 0 else 0.2 < made.execution_ratio < 1


def test_a_model_without_routers_has_no_ratio():
    made = generate(tiny_llama(len(TOKENIZER)), TOKENIZER, PROMPT, 5)
    assert made.execution_ratio is None and 0 < made.tokens <= 5


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="5 tokens leave room for 59 more, not 60"):
        generate(tiny_llama(len(TOKENIZER)), TOKENIZER, PROMPT, 60)
