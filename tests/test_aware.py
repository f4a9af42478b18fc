"""Quantization-aware fine-tuning: training sees the quantized model, with straight-through gradients."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_run import llama, profile, rows
from torch import nn

from qtale_lib.adaptive import set_threshold
from qtale_lib.data.encoding import IGNORED, collate
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.quantization import fake_quantize, quantize
from qtale_lib.quantization.apply import decoder_linears
from qtale_lib.quantization.aware import merged_weight, see_quantized
from qtale_lib.stages import merged_model
from qtale_lib.trainer import response_loss
from qtale_lib.training import finetune, prepare_model

IDS = torch.arange(60).reshape(4, 15)


def adapted(method: str = "full", **changes) -> nn.Module:
    """A model of this profile with a LoRA that is no longer nothing."""
    model = prepare_model(llama(), profile(**{"lora": {"dropout": 0.0}, **changes}), method, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def aware(bits: int) -> dict:
    return {"training": {"weight_bits": bits}}


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("method", ["full", "qtale"])
def test_forward_is_that_of_the_merged_and_quantized_model(method, bits):
    trained, floats = adapted(method, **aware(bits)).eval(), adapted(method).eval()
    merged = floats.merge_and_unload()
    for linear in decoder_linears(merged).values():
        linear.weight.data = linear.weight.data.to(torch.bfloat16).float()
    before = merged(IDS).logits
    quantize(merged, method="rtn", bits=bits, group_size=32)
    torch.testing.assert_close(trained(IDS).logits, merged(IDS).logits, atol=2e-5, rtol=1e-5)
    assert (before - merged(IDS).logits).abs().max() > 0.05  # the rounding is no trifle


def test_a_trained_run_is_seen_in_training_as_it_is_evaluated(tmp_path, monkeypatch):
    """Over the files: the model at the end of training, and its run read, merged and quantized."""
    models = []
    kept = prepare_model

    def spied(*arguments):
        models.append(kept(*arguments))
        return models[-1]

    monkeypatch.setattr("qtale_lib.training.prepare_model", spied)
    settings = profile(group_size=-1, **aware(3))  # the shipped base, whose weights are in 16 bits
    made = finetune(settings, "arc_easy", "dllm", 0, tmp_path / "run")
    assert made["steps"] == 6 and len(made["probes"]) > 1
    run = merged_model(tmp_path / "run")
    set_threshold(run, 0.5)
    quantize(run, method="rtn", bits=3, group_size=-1)
    torch.testing.assert_close(models[0].eval()(IDS).logits, run(IDS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_gradients_are_straight_through(name):
    linear = adapted(**aware(2)).get_base_model().get_submodule(name)
    seen = torch.randn(5, linear.in_features, requires_grad=True)
    into = torch.randn(5, linear.out_features)
    linear(seen).backward(into)

    # by the definition: y = Q x, dx = Qᵀ dy, and dW = dy xᵀ as if W were what multiplies
    merged = merged_weight(linear).detach()
    on_grid = fake_quantize(merged.to(torch.bfloat16).float(), 2, 32)
    torch.testing.assert_close(linear(seen), seen @ on_grid.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.grad, into @ on_grid, atol=1e-5, rtol=1e-5)
    if not isinstance(linear, LoraLayer):
        assert linear.weight.grad is None
        return
    of_weight = into.T @ seen.detach()  # [out, in]
    a, b, scale = linear.lora_A.default.weight, linear.lora_B.default.weight, linear.scaling["default"]
    torch.testing.assert_close(b.grad, scale * of_weight @ a.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.grad, scale * b.T @ of_weight, atol=1e-5, rtol=1e-5)


def test_training_for_two_bits_lowers_the_loss_of_the_quantized_model_further_than_training_floats():
    losses = {}
    for bits in (16, 2):
        model = adapted(**aware(bits))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        batch = collate(rows(16))
        answered = (batch["labels"][:, 1:] != IGNORED).sum()
        for _ in range(40):
            (response_loss(model, **batch) / answered).backward()
            optimizer.step()
            optimizer.zero_grad()
        merged = model.merge_and_unload()
        for module in merged.modules():
            module._forward_hooks.clear()
        quantize(merged, method="rtn", bits=2, group_size=32)
        with torch.no_grad():
            losses[bits] = float(response_loss(merged, **batch) / answered)
    assert losses[2] < losses[16] - 0.1


def test_lm_head_is_seen_at_its_own_width():
    model, twin = llama(), llama()
    see_quantized(model, 8, -1, lm_head_bits=2)
    see_quantized(twin, 8, -1)
    hidden = model.model(IDS).last_hidden_state
    assert torch.equal(hidden, twin.model(IDS).last_hidden_state)
    expected = hidden @ fake_quantize(model.lm_head.weight.to(torch.bfloat16).float(), 2, -1).T
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="group size 24 does not divide"):
        see_quantized(llama(), 4, 24)


def test_only_a_run_trained_on_quantized_weights_has_the_grid_in_its_key():
    spec = {"task": "arc_easy", "method": "qtale", "seed": 0}

    def kept(**changes) -> dict:
        return Lab(profile(**changes)).settings("finetune", spec)

    assert kept(group_size=32) == kept(group_size=16) == kept(quantization={"lm_head_bits": 4})
    assert "weight_bits" not in kept()["training"]  # as in results from before there was such a setting
    assert kept(**aware(3)) != kept(**aware(2))
    assert kept(group_size=32, **aware(3)) != kept(group_size=16, **aware(3))
    assert kept(**aware(3)) != kept(quantization={"lm_head_bits": 4}, **aware(3))
    assert kept(**aware(3)) == kept(quantization={"method": "rtn"}, **aware(3))
