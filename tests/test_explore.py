"""Notebook 13's panel: what it reads off a model, what it shows and writes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from small_run import profile
from test_notebooks import any_model, fake_lab

from qtale_lib import explore
from qtale_lib.adaptive import record_routes, set_threshold
from qtale_lib.efficiency import flops_per_token
from qtale_lib.explore import Choice, Panel, Reader
from qtale_lib.generation import prompt_ids
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab

TEXT = "question : Who made the wide tray ? answer :"
torch.manual_seed(0)
ROUTED = any_model(None, Run("arc_easy", "qtale", 0), 16)


def made(lab, run, bits):
    """The same models each time: the routed one has random routers."""
    return ROUTED if run.routed else any_model(lab, run, bits)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "prepared_model", made)
    return fake_lab(tmp_path, tasks=["arc_easy", "boolq"], bits=[16, 4])


@pytest.mark.parametrize("theta", [0.0, 0.7, 0.8])
def test_it_tells_what_a_dense_pass_does(lab, theta):
    reading = Reader(lab).read(Choice("arc_easy", "qtale", 16, theta), TEXT)
    model, tokenizer = ROUTED
    ids = prompt_ids(tokenizer, [TEXT])[0]
    set_threshold(model, theta)
    with torch.no_grad(), record_routes(model) as routes:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    assert np.array_equal(reading.executed, routes.executed[:, 0].numpy())
    assert np.allclose(reading.following, logits.softmax(-1).numpy(), atol=1e-5)
    assert reading.execution_ratio == pytest.approx(routes.executed.float().mean().item())
    assert len(reading.tokens) == len(ids) and reading.tokens[1] == "question"
    assert (reading.execution_ratio == 1) == (theta == 0) and reading.seconds > 0


def test_flops_follow_from_the_ratio_and_full_runs_everything(lab):
    reader = Reader(lab)
    full, routed = reader.full("arc_easy", TEXT), reader.read(Choice("arc_easy", "qtale", 16, 0.7), TEXT)
    config = ROUTED[0].config
    assert full.executed.all() and full.flops == flops_per_token(config)["total"] and full.share == 1
    parts = flops_per_token(config, routed.execution_ratio)
    assert 0 < routed.flops - parts["layers"] - parts["lm_head"] < 0.1 * full.flops  # the routers
    assert full.away_from(full) == 0 < routed.away_from(full) <= 1


def test_a_slider_changes_the_picture_and_loads_nothing_anew(lab, monkeypatch):
    loaded = []
    monkeypatch.setattr(explore, "prepared_model", lambda *run: loaded.append(run) or made(*run))
    panel = Panel(lab)
    before, count = panel.shown.value, len(loaded)
    assert count == 3 and before.count("<svg") == 1
    panel.sides["right"].theta.value = 0.8
    assert panel.shown.value != before and len(loaded) == count
    assert panel.readings["right"].choice.theta == 0.8 and "θ 0.80" in panel.shown.value
    assert set(panel.frame.side) == {"left", "right", "full"} and len(panel.table.frame) == 3


def test_a_model_without_routers_has_no_theta(lab):
    panel = Panel(lab)
    side = panel.sides["left"]
    side.method.value = "full"
    assert side.theta.disabled and panel.readings["left"].choice.theta is None
    side.method.value = "dllm"
    assert not side.theta.disabled


def test_another_task_brings_a_question_of_its_own(lab):
    panel = Panel(lab)
    panel.task.value = "boolq"
    assert panel.text.value.startswith("passage :") and panel.readings["left"].choice.task == "boolq"


def test_what_is_typed_is_shown_and_never_run(lab):
    panel = Panel(lab)
    panel.text.value = "<script>alert(1)</script> $x$"
    assert panel.readings and "<script" not in panel.shown.value


@pytest.mark.parametrize(
    ("text", "said"), [("  ", "The text is empty; type one."), ("the " * 600, "shorten it.")]
)
def test_a_text_that_cannot_be_read_is_told_in_a_sentence_and_mended_by_another(lab, text, said):
    panel = Panel(lab)
    panel.text.value = text
    assert panel.trouble.endswith(said) and "role='alert'" in panel.shown.value
    assert panel.frame.empty and said in panel.table.notes[0]
    panel.export()
    assert not (lab.figures / "explored").exists()
    panel.text.value = TEXT
    assert panel.trouble == "" and not panel.frame.empty


def test_the_button_writes_the_picture_with_its_data(lab):
    panel = Panel(lab)
    panel.text.value = "Tom costs $3 & NA < 5"
    panel.button.click()
    written = {path.suffix: path for path in (lab.figures / "explored").iterdir()}
    assert set(written) == {".pdf", ".png", ".svg", ".csv"} and str(written[".pdf"]) in panel.said.value
    data = pd.read_csv(written[".csv"])
    assert len(data) == len(panel.frame) and data.value.sum() == pytest.approx(panel.frame.value.sum())


def test_a_run_that_is_not_in_the_store_is_named_with_the_command_that_makes_it(tmp_path):
    panel = Panel(Lab(profile(), tmp_path))
    assert "The finetune of arc_easy." in panel.trouble and "python -m qtale_lib run" in panel.trouble
    assert panel.frame.empty and panel.trouble in panel.shown.value.replace("&#x27;", "'")
