"""Which tokens skip: kinds of tokens, shares that add up to R, and what is varied is put back."""

import pytest
import torch
from small_models import TOKENIZER, responses, routed_llama

from qtale_lib.adaptive import set_threshold
from qtale_lib.evaluation import perplexity
from qtale_lib.token_routes import RESERVED, bypassing, kinds, read_routes, reserving, worth

FITTING = {"style": "compact", "batch_size": 4, "max_length": 64, "overlong": "drop"}
LAYERS = 5


def model(theta: float = 0.5):
    found = routed_llama()
    set_threshold(found, theta)
    return found


def test_kinds_of_tokens_of_words_and_of_pieces():
    sentence = "<s> Where does Anna Reed live ? Anna has 3 pets ."
    text = sentence.split()
    assert kinds(text, [word == "<s>" for word in text]) == [
        "special", "function word", "function word", "name", "name", "word", "punctuation", "name",
        "function word", "number", "word", "punctuation",
    ]  # fmt: skip
    assert kinds(["ĠThe", "Ġcat", "▁A", ":"], [False] * 4) == [
        "function word", "word", "function word", "punctuation",
    ]  # fmt: skip


def by(value: dict, what: str) -> list[dict]:
    return [group for group in value["groups"] if group["by"] == what]


@pytest.mark.parametrize("theta", [0.0, 0.5])
def test_groups_hold_every_token_once_and_their_shares_add_up(theta):
    examples = responses(12)
    value = read_routes(model(theta), TOKENIZER, examples, **FITTING)
    count = {what: sum(g["tokens"] for g in by(value, what)) for what in ("kind", "place", "surprisal")}
    assert count["kind"] == count["surprisal"] == count["place"] - 2 * len(examples)  # 2 are reserved
    sums = {
        what: sum(g["tokens"] * torch.tensor(g["executed"]) for g in by(value, what))
        for what in ("kind", "surprisal", "place")
    }
    torch.testing.assert_close(sums["kind"], sums["surprisal"])
    torch.testing.assert_close(sums["place"] - sums["kind"], torch.full((LAYERS,), 2.0 * len(examples)))
    routed = sums["kind"][2:] / count["kind"]
    assert (routed == 1).all() if theta == 0 else 0.1 < routed.mean() < 0.9
    first = next(g for g in by(value, "place") if g["name"] == "0")
    assert first["executed"] == [1.0] * LAYERS and first["tokens"] == len(examples)


def test_what_always_runs_is_varied_and_put_back():
    examples, routed = responses(12), model()
    before = perplexity(routed, TOKENIZER, examples, **FITTING)
    value = worth(routed, TOKENIZER, examples, **FITTING)
    again = perplexity(routed, TOKENIZER, examples, **FITTING)
    assert value["ppl"] == before["ppl"] == again["ppl"]
    ratios = [each["execution_ratio"] for each in value["reserved"]]
    assert [each["tokens"] for each in value["reserved"]] == list(RESERVED) and ratios == sorted(ratios)
    as_trained = next(each for each in value["reserved"] if each["tokens"] == 2)
    assert as_trained["ppl"] == before["ppl"] and as_trained["execution_ratio"] == before["execution_ratio"]
    assert len({each["ppl"] for each in value["bypassed"]} | {before["ppl"]}) == LAYERS + 1


@pytest.mark.parametrize("layer", [0, 3])
def test_a_bypassed_layer_is_as_one_that_adds_nothing(layer):
    examples, routed = responses(6), model(theta=0.0)
    with bypassing(routed, layer):
        found = perplexity(routed, TOKENIZER, examples, **FITTING)["ppl"]
    block = routed.model.layers[layer]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    assert found == pytest.approx(perplexity(routed, TOKENIZER, examples, **FITTING)["ppl"], rel=1e-5)


def test_an_error_meanwhile_puts_back_as_well():
    routed = model()
    with pytest.raises(RuntimeError), reserving(routed, 5), bypassing(routed, 1):
        raise RuntimeError
    assert routed.model.routing.config.always_run_tokens == 2
    assert not routed.model.layers[1]._forward_hooks
