"""Training against independent oracles: what is trained, with which loss, at which rate, how it goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_run import llama, profile, rows, save_base
from transformers import TrainerCallback

from qtale_lib import adaptive, routed_layers
from qtale_lib.adaptive import load_routed
from qtale_lib.data import load_task
from qtale_lib.data.encoding import collate
from qtale_lib.errors import UserError
from qtale_lib.trainer import parameter_groups
from qtale_lib.training import finetune, make_trainer, prepare_model, trainer_arguments

LORA = {
    f"base_model.model.model.layers.{layer}.self_attn.{linear}.lora_{side}.default.weight"
    for layer in range(4)
    for linear in ("q_proj", "k_proj", "v_proj")
    for side in "AB"
}
ROUTERS = {
    f"base_model.model.model.layers.{layer}.router.{name}"
    for layer in (2, 3)
    for name in ("reduce.weight", "reduce.bias", "norm.weight", "score.weight", "score.bias")
}


class Tokenizer:
    pad_token_id = 0


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to use, and its learning rates."""

    def __init__(self):
        self.steps, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **_):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def trained(directory: Path, method: str = "qtale", data=None, callbacks=(), seed: int = 0, **changes):
    settings = profile(**{"lora": {"dropout": 0.0}, **changes})
    model = prepare_model(llama(), settings, method, seed)
    trainer = make_trainer(
        model, Tokenizer(), data or rows(24), settings, method, seed, directory, list(callbacks)
    )
    return trainer


@pytest.fixture
def silent(monkeypatch):
    """No Gumbel noise: what a router prefers is what it does."""
    monkeypatch.setattr(routed_layers, "gumbel", lambda shape, *_: torch.zeros(shape))


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_trains_lora_on_q_k_v_and_nothing_else():
    assert trainable(prepare_model(llama(), profile(), "full", 0)) == LORA


@pytest.mark.parametrize("method", ["dllm", "qtale"])
def test_routed_methods_train_lora_and_routers_in_float32(method):
    model = prepare_model(llama().to(torch.bfloat16), profile(), method, 0)
    assert trainable(model) == LORA | ROUTERS
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_lora_starts_equal_for_all_methods_of_a_seed_and_leaves_the_base_as_it_is():
    full, routed = (prepare_model(llama(), profile(), method, 3).state_dict() for method in ("full", "qtale"))
    assert all(torch.equal(full[name], routed[name]) for name in LORA)
    assert all(not full[name].any() for name in LORA if "lora_B" in name)
    other = prepare_model(llama(), profile(), "full", 4).state_dict()
    assert any(not torch.equal(full[name], other[name]) for name in LORA)


def test_noisy_full_has_the_noise_of_the_start_for_every_token_and_trains_lora_alone(tmp_path):
    trainer = trained(tmp_path, "noisy_full", data=rows(24), training={"batch_size": 8})
    model = trainer.model
    assert trainable(model) == LORA
    before = {name: p.clone() for name, p in model.named_parameters() if ".router." in name}
    trainer.train()
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())
    with adaptive.record_routes(model.train()) as routes:
        model(torch.randint(60, (100, 42), generator=torch.Generator().manual_seed(0)))
    gaps = routes.logits[2:, ..., 0] - routes.logits[2:, ..., 1]
    assert torch.allclose(gaps, torch.tensor(1.9))
    bypassed = 1 - routes.gates[2:, :, 2:].mean()  # 8,000 decisions: standard error 0.4 %
    assert bypassed.item() == pytest.approx(1 / (1 + math.exp(1.9)), abs=0.015)


def test_noisy_full_learns_from_cross_entropy_alone(tmp_path):
    trainer = trained(tmp_path, "noisy_full", max_steps=4, training={"lambda1": 50.0, "lambda2": 50.0})
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert [entry["loss"] for entry in history] == pytest.approx([entry["ce"] for entry in history], abs=1e-5)


def test_noisy_full_with_every_layer_executed_is_a_model_without_routers():
    noisy, full = (prepare_model(llama(), profile(), method, 0) for method in ("noisy_full", "full"))
    weights = {name: torch.randn_like(p) for name, p in full.state_dict().items() if name in LORA}
    for model in (noisy, full):
        model.load_state_dict(weights, strict=False)
    adaptive.set_threshold(noisy, 0.0)
    ids = torch.arange(24).reshape(2, 12)
    assert torch.allclose(noisy.eval()(ids).logits, full.eval()(ids).logits, atol=1e-5)


def test_groups_give_routers_their_rate_and_vectors_no_decay():
    model = prepare_model(llama(), profile(), "dllm", 0)
    groups = parameter_groups(model, 0.1, 0.2, 0.3)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 0.2 if ".router." in name else 0.1
            assert found.pop(id(parameter)) == (rate, 0.3 if parameter.ndim > 1 else 0.0), name
    assert not found


def test_loss_is_cross_entropy_plus_rate_minus_entropy(tmp_path, silent):
    """By hand: transformers' own loss, plain sums over gates, and λ's as Eq. 8 has them."""
    recipe = {"lambda1": 7.0, "lambda2": 3.0, "rate_target": 0.5}
    trainer = trained(tmp_path, data=rows(4), max_steps=2, training={"batch_size": 4, **recipe})
    batch = collate(rows(4))
    trainer.state.global_step, trainer.state.max_steps = 1, 3  # a third of the way: sin(30°) = 1/2
    _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    model = trainer.model.train()
    for parameter in model.parameters():  # routers that differ by token, at both sides of the decision
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    got = trainer.compute_loss(model, batch, num_items_in_batch=counts)

    with adaptive.record_routes(model) as routes:
        ce = model(**batch).loss
    gates, soft = routes.gates.detach().tolist(), routes.soft.detach().tolist()
    rates, entropies = [], []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for token in range(2, length - 1):
            rates.append(abs(sum(layer[row][token] for layer in gates) / 4 - 0.5))
            entropies.append(sum(-p * math.log(p) for layer in soft for p in layer[row][token]) / 2)
    mean_rate, mean_entropy = sum(rates) / len(rates), sum(entropies) / len(entropies)
    assert 0 < mean_rate < 0.5
    assert got.item() == pytest.approx(ce.item() + 3.5 * mean_rate - 3 * mean_entropy, abs=1e-5)


def test_full_has_no_other_loss_than_the_models_own(tmp_path):
    trainer = trained(tmp_path, "full")
    batch = collate(rows(4))
    _, counts = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)
    assert loss.item() == pytest.approx(trainer.model(**batch).loss.item(), abs=1e-6)


@pytest.mark.parametrize("method", ["full", "qtale"])
def test_accumulating_four_rows_is_a_batch_of_four(tmp_path, silent, method):
    """Rows of different lengths: a mean of means would differ. Gradients far above 1 stay unclipped."""
    taken = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        seen = Gradients()
        recipe = {"batch_size": batch_size, "gradient_accumulation": accumulation, "lambda1": 500.0}
        trained(tmp_path, method, rows(16), [seen], max_steps=3, training=recipe).train()
        taken.append(seen.steps)
    for whole, accumulated in zip(*taken, strict=True):
        assert whole.keys() == accumulated.keys()
        for name, gradient in whole.items():
            assert torch.allclose(gradient, accumulated[name], rtol=1e-4, atol=1e-5), name
    if method == "qtale":
        assert max(g.norm().item() for g in taken[0][2].values()) > 1


def test_rates_warm_up_linearly_then_follow_a_cosine_to_zero(tmp_path):
    seen = Gradients()
    recipe = {"lr": 1.0, "router_lr": 2.0, "warmup_fraction": 0.2}
    trained(tmp_path, callbacks=[seen], max_steps=10, training=recipe).train()
    shape = [step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2 for step in range(10)]
    groups = {tuple(sorted(set(rates))) for rates in seen.rates}
    assert groups == {tuple(sorted({s, 2 * s})) for s in shape}


def test_history_shows_the_ramp_of_lambda1(tmp_path):
    trainer = trained(tmp_path, max_steps=8, training={"lambda1": 5.0, "lambda2": 2.0})
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "ce" in entry]
    assert [entry["step"] for entry in history] == list(range(1, 9))
    for entry in history:
        assert entry["lambda1"] == pytest.approx(5 * math.sin(math.pi / 2 * entry["step"] / 8))
        weighted = 5 * math.sin(math.pi / 2 * (entry["step"] - 1) / 8) * entry["rate"]
        assert entry["loss"] == pytest.approx(entry["ce"] + weighted - 2 * entry["entropy"], abs=1e-4)


def test_trainer_neither_clips_nor_reports(tmp_path):
    arguments = trainer_arguments(profile(), 0, 24, tmp_path)
    assert (arguments.max_grad_norm, arguments.report_to, arguments.disable_tqdm) == (0, [], True)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.weight_decay) == (0.9, 0.95, 0.02)


@pytest.mark.parametrize("layer", [0, 3])
def test_divergence_names_layer_and_step(tmp_path, layer):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 2:
                model.get_base_model().model.layers[layer].mlp.down_proj.weight.data[0, 0] = math.nan

    trainer = trained(tmp_path, "full", callbacks=[Poison()])
    with pytest.raises(UserError, match=f"step 2: .* in layer {layer};"):
        trainer.train()


def test_training_is_reproducible_and_depends_on_the_seed(tmp_path):
    weights = []
    for seed in (0, 0, 1):
        trainer = trained(tmp_path, seed=seed, lora={"dropout": 0.05})
        trainer.train()
        weights.append(
            torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_finetune_leaves_a_model_that_loads_and_a_record(tmp_path):
    base = save_base(tmp_path / "base")
    settings = profile(base, overlong="drop", max_length=40)
    reports = []
    examples = load_task("arc_easy", "train")[:24]
    asked = ("arc_easy", "qtale", 0, tmp_path / "run")
    outcome = finetune(settings, *asked, lambda *done: reports.append(done), examples)
    assert outcome["steps"] == 6 and [share for share, _ in reports] == [step / 6 for step in range(1, 7)]
    for (_, note), entry in zip(reports, outcome["history"], strict=True):
        known = f"step {entry['step']} of 6, loss {entry['loss']:.3f}, R {entry['loss_ratio']:.3f}, "
        assert note.startswith(f"epoch {entry['epoch']:.1f} of 2, {known}") and note.endswith(" GiB")
    assert sum(outcome["rows"][k] for k in ("used", "dropped")) == 24
    assert [probe["epoch"] for probe in outcome["probes"]][:2] == [0, 1]
    assert outcome["trainable_parameters"] == 4 * 8 * (3 * 32 + 32 + 2 * 16) + 2 * (
        32 * 32 + 32 + 32 + 64 + 2
    )
    model = load_routed(tmp_path / "run")
    logits = model(torch.tensor([[5, 6, 7, 8]])).logits
    assert torch.isfinite(logits).all()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_that_do_not_fit_are_refused_in_a_sentence(tmp_path):
    base = save_base(tmp_path / "base")
    with pytest.raises(UserError, match="No training row of arc_easy fits"):
        finetune(profile(base, max_length=3), "arc_easy", "full", 0, tmp_path / "run")


@pytest.mark.parametrize("method", ["full", "qtale"])
def test_a_bfloat16_base_is_trained_saved_and_merged_beside_float32_routers_and_lora(tmp_path, method):
    base = save_base(tmp_path / "base")
    settings = profile(base, dtype="bfloat16", max_length=40, training={"lr": 0.01})
    outcome = finetune(settings, "arc_easy", method, 0, tmp_path / "run")
    assert all(math.isfinite(entry["loss"]) for entry in outcome["history"])
    loaded = load_routed(tmp_path / "run")
    kinds = {
        name: parameter.dtype
        for name, parameter in loaded.named_parameters()
        if "lora_" in name or ".router." in name
    }
    assert set(kinds.values()) == {torch.float32} and len(kinds) == len(
        LORA | (ROUTERS if method != "full" else set())
    )
    others = {p.dtype for n, p in loaded.named_parameters() if n not in kinds}
    assert others == {torch.bfloat16}
    assert all(p.abs().sum() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = loaded(ids).logits
        merged = loaded.merge_and_unload()
        after = merged(ids).logits
    assert {p.dtype for n, p in merged.named_parameters() if ".router." not in n} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for n, p in merged.named_parameters() if ".router." in n)
    assert (before - after).abs().median() < 0.05 * before.abs().mean()
