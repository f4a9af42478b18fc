"""Tidy frames of the run store: layers found, ratios corrected, answers weighted and clustered."""

from __future__ import annotations

import numpy as np
import pytest
from fake_lab import LAYERS, SEARCHED, FakeLab

from qtale_lib.measurements import Measurements, compared_bits, group_of, sharing, shown_epochs


def test_groups_are_the_papers():
    assert [group_of(task) for task in ("piqa", "openbookqa", "mmlu", "alpaca")] == [
        "csqa",
        "csqa",
        "mmlu",
        "alpaca",
    ]


@pytest.mark.parametrize(
    ("epochs", "expected"), [(range(11), [0, 3, 6, 10]), (range(4), [0, 3]), ([0, 0.4], [0, 0.4]), ([], [])]
)
def test_shown_epochs(epochs, expected):
    assert shown_epochs(epochs) == expected


def test_answers_average_to_the_stored_metric():
    lab = FakeLab(tasks=["arc_easy", "alpaca"], bits=[4])
    answers = Measurements(lab).answers
    frame = lab.evaluations().set_index(["task", "method", "seed", "bits", "theta_rule"])
    assert len(answers) == len(frame) == 2 * 7
    for cell, answer in answers.items():
        row = frame.loc[cell]
        stored = 100 * row.expected_acc if row.metric == "acc" else 100 * np.log(row.ppl)
        assert answer.mean == pytest.approx(stored)
        assert answer.shared.sum(axis=0).tolist() == [2] * lab.questions


def test_questions_share_by_any_of_their_facts_and_stand_alone_without():
    shared = sharing((("home", "sea"), ("pet", "sea"), ("pet",), (), ()))
    assert shared.toarray().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_where_the_choices_are_all_there_is_right_or_wrong_is_the_score():
    lab = FakeLab(tasks=["boolq", "piqa"], bits=[4], methods=["full"])
    answers = Measurements(lab).answers
    fixed, drawn = (answers[task, "full", 0, 4, "none"] for task in ("boolq", "piqa"))
    assert set(fixed.scores) == {0.0, 100.0} and len(set(drawn.scores)) > 10
    value = lab.result("evaluation", task="boolq", method="full", seed=0, bits=4, theta="none")["value"]
    assert fixed.mean == pytest.approx(100 * value["acc"])
    del value["expected_correct"]  # results from before it was measured
    assert Measurements(lab).answers["boolq", "full", 0, 4, "none"].mean == fixed.mean


def test_lowest_layers_are_those_of_the_last_epoch():
    lab = FakeLab(tasks=["piqa"], seeds=[0, 1])
    means = np.mean([lab.probes("piqa", "dllm", seed)[-1]["ratio"] for seed in (0, 1)], axis=0)
    assert Measurements(lab).lowest_layers("piqa") == sorted(np.argsort(means)[:3].tolist())


def test_routed_ratio_leaves_out_the_tokens_that_always_run():
    lab = FakeLab(tasks=["piqa"])
    frame = Measurements(lab).layers
    routed = frame[frame.layer >= 2]
    assert frame[frame.layer < 2].routed_ratio.isna().all()
    assert np.allclose(routed.ratio, 0.1 + 0.9 * routed.routed_ratio)  # 400 of 4,000 tokens always run


def test_histograms_hold_the_probes_counts():
    lab = FakeLab(tasks=["piqa"])
    store = Measurements(lab)
    frame, layers = store.histograms("qtale"), store.lowest_layers("piqa")
    assert sorted(frame.epoch.unique()) == [0, 3, 6, 10] and sorted(frame.layer.unique()) == layers
    chosen = frame[(frame.epoch == 6) & (frame.layer == layers[1]) & (frame.kind == "bypass")]
    assert chosen["count"].tolist() == lab.probes("piqa", "qtale", 0)[6]["histogram"]["bypass"][layers[1]]


def test_all_seeds_are_in_the_histograms_with_their_range():
    lab = FakeLab(tasks=["piqa"], seeds=[0, 1, 2])
    store = Measurements(lab)
    layer = store.lowest_layers("piqa")[1]
    counts = [lab.probes("piqa", "dllm", s)[-1]["histogram"]["execute"][layer] for s in range(3)]
    gaps = [lab.probes("piqa", "dllm", s)[-1]["gap"][layer] for s in range(3)]
    frame = store.histograms("dllm")
    part = frame[(frame.epoch == 10) & (frame.layer == layer) & (frame.kind == "execute")]
    assert part["count"].tolist() == np.sum(counts, axis=0).tolist()
    shares = 100 * np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    assert np.allclose(part.low, shares.min(0)) and np.allclose(part.high, shares.max(0))
    assert np.allclose(part.gap, np.mean(gaps)) and np.allclose(part.gap_spread, np.std(gaps, ddof=1))
    one = Measurements(FakeLab(tasks=["piqa"])).histograms("dllm")
    assert one[["low", "high", "gap_spread"]].isna().all(axis=None)


def test_means_over_seeds_come_with_their_spread():
    lab = FakeLab(tasks=["piqa"], seeds=[0, 1])
    frame = Measurements(lab).lowest_by_epoch("dllm").set_index(["layer", "epoch"])
    layer = frame.index[0][0]
    flips = [lab.probes("piqa", "dllm", seed)[3]["flip"][layer] for seed in (0, 1)]
    row = frame.loc[layer, 3]
    assert (row.flip, row.flip_spread) == pytest.approx((np.mean(flips), np.std(flips, ddof=1)))


def test_figure_2_holds_the_papers_tasks_in_its_order_and_means_over_seeds():
    lab = FakeLab(seeds=[0, 1])
    frame = Measurements(lab).ratios_by_layer("dllm")
    assert list(dict.fromkeys(frame.task)) == ["arc_easy", "arc_challenge", "siqa", "piqa"]
    expected = np.mean([lab.probes("siqa", "dllm", seed)[3]["ratio"] for seed in (0, 1)], axis=0)
    assert frame[(frame.task == "siqa") & (frame.epoch == 3)].ratio.tolist() == pytest.approx(expected)
    assert set(Measurements(FakeLab(tasks=["boolq"])).ratios_by_layer("qtale").task) == {"boolq"}


def test_every_task_keeps_its_own_last_epoch():
    lab = FakeLab(tasks=["siqa", "piqa"])
    whole = lab.probes
    lab.probes = lambda task, method, seed: whole(task, method, seed)[: 5 if task == "siqa" else None]
    frame = Measurements(lab).ratios_by_layer("dllm")
    assert {t: sorted(part.epoch.unique()) for t, part in frame.groupby("task")} == {
        "siqa": [0, 3, 4],
        "piqa": [0, 3, 6, 10],
    }


@pytest.mark.parametrize(
    ("bits", "compared"), [([16, 4, 3, 2], [4, 16]), ([16, 3], [3, 16]), ([16], [16]), ([8, 2], [2])]
)
def test_bits_compared(bits, compared):
    assert compared_bits(FakeLab(bits=bits).profile) == compared


def test_figures_3_and_7_follow_d_llms_lowest_layers():
    store = Measurements(FakeLab(tasks=["arc_easy", "piqa"]))
    frame = store.lowest_by_epoch("dllm", "qtale")
    assert sorted(frame.layer.unique()) == store.lowest_layers("arc_easy")
    assert len(frame) == 2 * 3 * 11


def test_what_was_not_run_is_absent():
    nothing = Measurements(FakeLab(methods=["full"], tasks=["mmlu"]))
    assert nothing.layers.empty and nothing.figure_task() is None
    assert nothing.histograms("dllm").empty and nothing.lowest_by_epoch("dllm", "qtale").empty
    assert nothing.ratios_by_layer("dllm").empty
    assert Measurements(FakeLab(methods=["qtale"])).histograms("qtale").empty
    assert len(nothing.answers) == 4
    assert Measurements(FakeLab(methods=[])).answers == {}


def test_figure_task_is_arc_easy_where_there_is_one():
    assert Measurements(FakeLab()).figure_task() == "arc_easy"
    assert Measurements(FakeLab(tasks=["siqa", "alpaca"])).figure_task() == "siqa"
    assert set(Measurements(FakeLab(tasks=["siqa"])).layers.layer) == set(range(LAYERS))


def test_theta_curves_are_means_over_tasks_in_percent():
    lab = FakeLab(tasks=["piqa", "siqa", "alpaca"], bits=[16, 4])
    frame = Measurements(lab).theta_curves().set_index(["group", "method", "bits", "theta"])
    curves = frame.score
    searches = lab.thresholds().set_index(["task", "method", "bits"]).coarse
    pair = [searches[task, "qtale", 4][1]["score"] for task in ("piqa", "siqa")]
    assert curves["csqa", "qtale", 4, 0.2] == pytest.approx(100 * np.mean(pair))
    variances = [score * (1 - score) / SEARCHED for score in pair]
    assert frame.stderr["csqa", "qtale", 4, 0.2] == pytest.approx(100 * np.sqrt(sum(variances)) / 2)
    assert np.isnan(frame.stderr["alpaca", "qtale", 4, 0.2])
    assert curves["alpaca", "dllm", 16, 0.5] == searches["alpaca", "dllm", 16][4]["score"]
    assert Measurements(FakeLab(methods=["full"])).theta_curves().empty
