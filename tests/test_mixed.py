"""Mixed precision: the choice against brute force, the loss against a plain one, its file."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import make_model
from small_models import TOKENIZER, WORDS, routed_llama

from qtale_lib.errors import UserError
from qtale_lib.quantization import apply_search, quantize, save_search
from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.mixed import WIDTHS, allocate
from qtale_lib.quantization.packed import pack
from qtale_lib.quantization.packed_files import TENSORS, load_packed, save_packed
from qtale_lib.quantization.packed_size import packed_file_bytes
from qtale_lib.quantization.statistics import calibration_loss
from qtale_lib.quantization.streaming import apply_search_streamed
from qtale_lib.streamed_model import StreamedModel

TEXTS = [" ".join(WORDS[(7 * k + i) % len(WORDS)] for i in range(4 + k)) for k in range(10)]
ROWS = [TOKENIZER(text)["input_ids"] for text in TEXTS]
rises = st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(rises, st.sampled_from([2, 2.5, 3, 4]))
def test_the_choice_is_the_best_of_all_that_are_small_enough(rises, mean):
    every = [c for c in product(WIDTHS, repeat=len(rises)) if sum(c) <= mean * len(rises)]
    costs = [sum(row[WIDTHS.index(width)] for row, width in zip(rises, c, strict=True)) for c in every]
    found = allocate(rises, WIDTHS, mean)
    assert tuple(found) in every
    cost = sum(row[WIDTHS.index(width)] for row, width in zip(rises, found, strict=True))
    assert cost == pytest.approx(min(costs), abs=1e-9)


def test_the_sensitive_layer_gets_more_bits():
    assert allocate([[0.0, 0.1, 0.2], [0.0, 1.0, 9.0], [0.0, 0.1, 0.3]], WIDTHS, 3) == [2, 4, 3]


def test_the_loss_is_that_of_each_row_alone():
    model, total, count = routed_llama(), 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            logits = model(torch.tensor([row]), use_cache=False).logits[0]
            right = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])
            total, count = total - right.sum().item(), count + len(row) - 1
    assert calibration_loss(model, ROWS) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_mixed_model_has_each_layer_as_its_width_alone_has_it(method, tmp_path):
    model = routed_llama()
    uniform = {
        width: decoder_linears(quantize(copy.deepcopy(model), TOKENIZER, TEXTS, method, width, 16))
        for width in WIDTHS
    }
    whole = copy.deepcopy(model)
    report = quantize(model, TOKENIZER, TEXTS, method, 3, 16, widths="mixed").quantization
    assert len(report.layer_bits) == 5 and sum(report.layer_bits) <= 15
    assert report.layer_bits == allocate(report.sensitivity, WIDTHS, 3)
    for name, linear in decoder_linears(model).items():
        width = report.layer_bits[int(name.split(".")[2])]
        assert torch.equal(linear.weight, uniform[width][name].weight), name
    save_search(report, tmp_path)
    apply_search(whole, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_measured_sensitivity_is_the_loss_with_that_layer_alone_quantized():
    model = make_model(vocab_size=len(TOKENIZER))
    before = copy.deepcopy(model.state_dict())
    report = quantize(copy.deepcopy(model), TOKENIZER, TEXTS, "rtn", 3, 32, widths="mixed").quantization
    one, rounded = copy.deepcopy(model), quantize(copy.deepcopy(model), method="rtn", bits=2, group_size=32)
    one.model.layers[1] = rounded.model.layers[1]
    rise = calibration_loss(one, ROWS) - calibration_loss(model, ROWS)
    assert report.sensitivity[1][WIDTHS.index(2)] == pytest.approx(rise, abs=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_its_file_is_as_large_as_the_formula_says_and_comes_back(tmp_path):
    shape = {"vocab_size": len(TOKENIZER), "dtype": torch.bfloat16}
    make_model(**shape).save_pretrained(tmp_path / "base")
    fresh = quantize(make_model(**shape), TOKENIZER, TEXTS, "gptq", 3, 32, widths="mixed")
    widths = fresh.quantization.layer_bits
    save_search(fresh.quantization, tmp_path / "search")
    save_packed(pack(fresh), tmp_path / "whole")
    told = packed_file_bytes(fresh.config, 3, 32, layer_bits=widths)
    assert (tmp_path / "whole" / TENSORS).stat().st_size == told["total"]
    apply_search_streamed(StreamedModel(tmp_path / "base"), tmp_path / "search", tmp_path / "streamed")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load_packed(tmp_path / name)(ids).logits for name in ("whole", "streamed")]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 4}, "none mix to 4 bits"),
        ({"widths": "varied"}, "widths is 'varied'"),
        ({"backend": "autoawq"}, "with backend native"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes, said):
    given = {"bits": 3, "group_size": 16, "widths": "mixed", **changes}
    with pytest.raises(UserError, match=said):
        quantize(routed_llama(), TOKENIZER, TEXTS, **given)
    with pytest.raises(UserError, match="texts to calibrate on"):
        quantize(routed_llama(), method="rtn", bits=3, group_size=16, widths="mixed")
