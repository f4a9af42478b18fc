"""Probes against plain counts over single rows, the closed form of flips, and training left undisturbed."""

from __future__ import annotations

import pytest
import torch
from small_run import llama, profile, rows
from transformers import TrainerState

from qtale_lib.adaptive import add_routers, record_routes, routing_state, set_threshold
from qtale_lib.probes import ProbeCallback, probe_routes
from qtale_lib.training import make_trainer, prepare_model

ROWS = rows(40, seed=5)


@pytest.fixture(scope="module")
def model():
    """Routers spread over both decisions."""
    made = add_routers(llama())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def probe(model):
    return probe_routes(model, ROWS, 16, seed=0, epoch=3)


@pytest.fixture(scope="module")
def by_hand(model):
    """Routes of each row alone: executed [L, N], logits [L, decided, 2], the rate loss's tokens."""
    executed, logits, rated = [], [], []
    for row in ROWS:
        with record_routes(model) as routes:
            model(torch.tensor([row["input_ids"]]))
        length = len(row["input_ids"])
        executed.append(routes.executed[:, 0])
        logits.append(routes.logits[:, 0, 2:])
        rated += [2 <= token < length - 1 for token in range(length)]
    return torch.cat(executed, 1), torch.cat(logits, 1), torch.tensor(rated)


def test_ratios_are_counts_over_single_rows(probe, by_hand):
    executed, _, rated = by_hand
    assert probe["tokens"] == sum(len(row["input_ids"]) for row in ROWS) == executed.shape[1]
    assert probe["ratio"] == pytest.approx(executed.double().mean(1).tolist())
    assert probe["ratio"][:2] == [1.0, 1.0] and 0 < min(probe["ratio"][2:]) < max(probe["ratio"][2:]) < 1
    assert probe["execution_ratio"] == pytest.approx(executed.double().mean().item())
    assert probe["loss_ratio"] == pytest.approx(executed[:, rated].double().mean().item())


def test_gaps_and_histograms_are_those_of_the_tokens_decided_on(probe, by_hand):
    _, logits, _ = by_hand
    for layer in (2, 3):
        execute, bypass = logits[layer, :, 0], logits[layer, :, 1]
        assert probe["gap"][layer] == pytest.approx((execute - bypass).mean().item(), abs=1e-5)
        assert probe["abs_gap"][layer] == pytest.approx((execute - bypass).abs().mean().item(), abs=1e-5)
        edges = torch.tensor(probe["histogram"]["edges"])
        for kind, values in (("execute", execute), ("bypass", bypass)):
            counts = torch.tensor(probe["histogram"][kind][layer], dtype=torch.float)
            assert counts.sum() == len(values)
            centres = (edges[1:] + edges[:-1]) / 2
            width = (edges[1] - edges[0]).item()
            assert (counts @ centres / counts.sum()).item() == pytest.approx(
                values.mean().item(), abs=width / 2
            )


def test_layers_without_a_router_have_a_ratio_and_nothing_else(probe):
    for name in ("flip", "flip_expected", "gap", "abs_gap"):
        assert probe[name][:2] == [None, None]
    assert probe["histogram"]["execute"][:2] == [None, None]


def test_measured_flips_follow_the_closed_form(model, by_hand):
    _, logits, _ = by_hand
    gap = (logits[..., 0] - logits[..., 1]).double()
    expected = torch.sigmoid(-gap.abs())
    spread = (expected * (1 - expected)).sum(1).sqrt() / gap.shape[1]
    probes = [probe_routes(model, ROWS, 16, seed, 0) for seed in range(8)]
    for layer in (2, 3):
        assert probes[0]["flip_expected"][layer] == pytest.approx(expected[layer].mean().item(), abs=1e-6)
        measured = [probe["flip"][layer] for probe in probes]
        assert len(set(measured)) > 1
        difference = sum(measured) / len(measured) - expected[layer].mean().item()
        assert abs(difference) < 4 * spread[layer].item() / len(measured) ** 0.5


def test_a_probe_decides_by_arg_max_and_leaves_threshold_and_mode_alone(model, probe):
    set_threshold(model, 0.05)
    model.train()
    try:
        again = probe_routes(model, ROWS, 40, seed=0, epoch=3)
        assert routing_state(model).theta == 0.05 and model.training
    finally:
        set_threshold(model, 0.5)
        model.eval()
    assert again["ratio"] == pytest.approx(probe["ratio"])


def test_probes_come_before_training_and_after_every_epoch_and_change_nothing(tmp_path):
    def train(callbacks):
        settings = profile(max_steps=None, training={"epochs": 3, "batch_size": 8})
        model = prepare_model(llama(), settings, "qtale", 0)
        trainer = make_trainer(model, Pad(), rows(24), settings, "qtale", 0, tmp_path, callbacks)
        trainer.train()
        return trainer

    plain, probed = train([]), train([ProbeCallback(rows(12), 8, 0)])
    probes = [entry["probe"] for entry in probed.state.log_history if "probe" in entry]
    assert [probe["epoch"] for probe in probes] == [0, 1, 2, 3]
    assert probes[0]["gap"] != probes[-1]["gap"]
    pairs = zip(plain.model.parameters(), probed.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("epoch", "probed"), [(0, [0]), (1.5, []), (2.0, [2])])
def test_a_run_that_goes_on_from_the_end_of_an_epoch_probes_it(model, epoch, probed):
    """A checkpoint is written before the probe of the epoch that it ends."""
    state = TrainerState(epoch=epoch, global_step=int(2 * epoch))
    ProbeCallback(ROWS, 8, 0).on_train_begin(None, state, None, model=model)
    assert [entry["probe"]["epoch"] for entry in state.log_history] == probed


class Pad:
    pad_token_id = 0
