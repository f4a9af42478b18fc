"""Greedy text: what transformers gives on dense execution, with the ratio of layers that ran."""

from contextlib import contextmanager

import pytest
import torch
from small_models import TOKENIZER, routed_llama, tiny_llama

from qtale_lib import generation
from qtale_lib.adaptive import record_routes, set_execution, set_threshold
from qtale_lib.errors import UserError
from qtale_lib.generation import generate, generate_all

PROMPT = "w1 w2 w3 w4"
PROMPTS = ["w5", "w1 w2 w3 w4", "w9 w8 w7 w6 w5 w4 w3 w2 w1", "w0 w39", "w7 w7 w7 w7 w7 w7"]


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


@pytest.fixture
def recorded(monkeypatch) -> list:
    """The routes of every batch that is generated, as they come."""
    found = []

    @contextmanager
    def kept(model):
        with record_routes(model) as routes:
            yield routes
        found.append(routes)

    monkeypatch.setattr(generation, "record_routes", kept)
    return found


@pytest.mark.parametrize("batch_size", [len(PROMPTS), 2])
@pytest.mark.parametrize("theta", [0.3, 0.5, 0.8])
def test_a_left_padded_batch_writes_and_routes_as_single_prompts_do(recorded, theta, batch_size):
    model = routed_llama()
    set_threshold(model, theta)
    together = generate_all(model, TOKENIZER, PROMPTS, 12, batch_size)
    batches = [(routes.executed, routes.valid) for routes in recorded]
    assert any(not valid[:, 0].all() for _, valid in batches)  # something is padded
    # the longest prompts are taken first; of equal length, as they come
    order = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index].split()), reverse=True)
    places = {prompt: divmod(place, batch_size) for place, prompt in enumerate(order)}
    for index, (prompt, made) in enumerate(zip(PROMPTS, together, strict=True)):
        recorded.clear()
        alone = generate(model, TOKENIZER, prompt, 12)
        assert (made.text, made.tokens) == (alone.text, alone.tokens)
        assert made.execution_ratio == pytest.approx(alone.execution_ratio, abs=1e-6)
        batch, row = places[index]
        executed, valid = batches[batch]
        padding, single = int((~valid[row]).sum()), recorded[0].executed[:, 0]
        fed = len(prompt.split()) + alone.tokens  # with what begins the text, and without the last token
        assert torch.equal(executed[:, row, padding : padding + fed], single[:, :fed])
        assert 0.2 < single[2:, :fed].float().mean() < 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="5 tokens leave room for 59 more, not 60"):
        generate(tiny_llama(len(TOKENIZER)), TOKENIZER, PROMPT, 60)
