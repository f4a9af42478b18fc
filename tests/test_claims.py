"""Claims on made-up results whose truth is known, and the paper's own effects against hand-worked numbers."""

from __future__ import annotations

import itertools
from math import isnan, log

import fake_lab
import numpy as np
import pytest
import yaml
from fake_lab import RULES, FakeLab
from pydantic import ValidationError

from qtale_lib import claim_tables, contrasts, effects
from qtale_lib.claims import CLAIMS, NOISE_CLAIMS, planned, tally, verdicts
from qtale_lib.config import METHODS
from qtale_lib.measurements import Measurements
from qtale_lib.statistics import NOT_RUN, NOT_SHOWN, NOT_TESTABLE, SHOWN, Run

MEASURED = [claim.id for claim in CLAIMS if claim not in NOISE_CLAIMS]


def judged(**lab) -> dict:
    """Verdict words by claim, on a lab of these settings."""
    frame = verdicts(Measurements(FakeLab(**lab)))
    return dict(zip(frame.id, frame.verdict, strict=True))


def effect(contrast, group, **lab) -> float:
    """Mean effect of a contrast of scores on a lab of these settings."""
    runs = effects.contrast_runs(Measurements(FakeLab(**lab)), contrast, group, "score")
    return float(np.mean([run.effect for run in runs]))


def test_a_lab_like_the_paper_shows_its_claims():
    words = judged(seeds=[0, 1, 2])
    tables = ("T1 D-LLM loses more, 4 bits, CSQA", "T1 D-LLM loses more, 3 bits, Alpaca", "T3 half, CSQA")
    tables += ("T1 gap to Full, CSQA", "T1 QTALE recovers, 3 bits, MMLU", "T4 θ helps, CSQA")
    figures = ("F3 fades", "F5 grows", "F6 narrower", "F7 flips")
    for claim in (*tables, "T4 θ control, CSQA", "T4 entropy helps, CSQA", *figures):
        assert words[claim] == SHOWN, claim


def test_a_lab_where_all_methods_do_the_same_shows_no_gain():
    words = judged(accuracy={}, seeds=[0, 1])
    null = ("T1 D-LLM loses", "T1 QTALE recovers", "T4 θ", "T4 entropy helps")
    claims = [claim for claim in words if claim.startswith(null)]
    assert len(claims) == 7 + 7 + 3 + 5 + 3
    assert all(words[claim] != SHOWN for claim in claims)


def test_the_opposite_of_a_claim_is_not_shown():
    opposite = {("full", 16, "none"): 80.0, ("full", 4, "none"): 60.0, ("dllm", 4, "argmax"): 80.0,
                ("qtale", 4, "searched"): 60.0}  # fmt: skip
    words = judged(accuracy=opposite)
    assert words["T1 D-LLM loses more, 4 bits, CSQA"] == NOT_SHOWN
    assert words["T1 QTALE recovers, 4 bits, CSQA"] == NOT_SHOWN


def test_one_seed_of_one_task_is_not_testable():
    words = judged(tasks=["arc_easy", "alpaca"], bits=[16, 4])
    assert {words[claim] for claim in MEASURED} == {NOT_TESTABLE, NOT_RUN}
    assert words["T1 D-LLM loses more, 3 bits, CSQA"] == words["T3 half, MMLU"] == NOT_RUN
    assert words["T1 D-LLM loses more, 4 bits, CSQA"] == words["F3 fades"] == NOT_TESTABLE


@pytest.mark.parametrize(
    "profile",
    [
        {"methods": ["full"]},
        {"bits": [4]},
        {"bits": [16]},
        {"tasks": ["mmlu"]},
        {"methods": ["qtale"]},
        {"methods": []},
    ],
)
def test_any_part_of_a_profile_is_judged_without_an_error(profile):
    assert set(judged(**profile)) == {claim.id for claim in CLAIMS}


def test_null_effects_are_seldom_shown_over_the_whole_chain():
    """Question noise, facts and runs as the store holds them; the nominal rate is 2.5 % a claim."""
    shown = []
    for seed in range(30):
        frame = verdicts(Measurements(FakeLab(accuracy={}, seed=seed, questions=200)), "07")
        frame = frame[frame.id.isin(["T4 θ helps, CSQA", "T4 entropy helps, CSQA"])]
        shown += (frame.verdict == SHOWN).tolist()
    assert np.mean(shown) <= 0.05


def test_gains_are_accuracy_points_and_percent_of_perplexity():
    contrast = {("dllm", 4, "argmax"): 1.0, ("full", 4, "none"): -1.0}
    accuracy = {("full", 4, "none"): 80.0, ("dllm", 4, "argmax"): 70.0}
    assert effect(contrast, "csqa", accuracy=accuracy) == pytest.approx(-10, abs=0.7)
    # in the made-up lab log PPL is 2 − score / 100: a score 10 lower is a PPL 10 % higher, a gain of −10
    assert effect(contrast, "alpaca", accuracy=accuracy) == pytest.approx(-10, abs=1.5)


def test_perplexity_gain_is_the_difference_of_log_perplexities():
    lab = FakeLab(tasks=["alpaca"])
    ppl = lab.evaluations().set_index(["method", "bits", "theta_rule"]).ppl
    expected = 100 * (log(ppl["dllm", 4, "argmax"]) - log(ppl["qtale", 4, "searched"]))
    contrast = {("qtale", 4, "searched"): 1.0, ("dllm", 4, "argmax"): -1.0}
    assert effect(contrast, "alpaca", tasks=["alpaca"]) == pytest.approx(expected)


def test_paper_effects_equal_hand_worked_numbers():
    printed = {claim.id: claim.paper for claim in CLAIMS}
    loses = ((77.32 - 80.06) - (78.77 - 80.53) + (77.68 - 80.45) - (79.67 - 81.28)) / 2
    assert printed["T1 D-LLM loses more, 4 bits, CSQA"] == pytest.approx(loses)
    recovers = -50 * (log(4.38 / 5.35) + log(5.29 / 7.24))
    assert printed["T1 QTALE recovers, 3 bits, Alpaca"] == pytest.approx(recovers)
    theta = ((78.48 - 77.32) + (79.18 - 78.86) + (78.14 - 77.68) + (79.17 - 78.86)) / 4
    assert printed["T4 θ helps, CSQA"] == pytest.approx(theta)
    assert printed["T3 half, Alpaca"] == pytest.approx(60.0)
    assert printed["T4 θ control, CSQA"] is None
    assert printed["T1 QTALE recovers, 2 bits, CSQA"] is None


def test_a_profile_target_is_the_one_held_against():
    near, far = FakeLab(), FakeLab()
    far.profile.training.rate_target = 0.3
    words = [
        verdicts(Measurements(lab), "06").set_index("id").verdict["T3 target, CSQA"] for lab in (near, far)
    ]
    assert words == [SHOWN, NOT_SHOWN]


def test_noise_claims_are_those_of_gumbel_draws():
    frame = verdicts(Measurements(FakeLab(methods=[])), "01").set_index("id")
    assert frame.effect["F4 mean"] == pytest.approx(0.5772, abs=0.01)
    assert frame.effect["F4 flips"] == pytest.approx(100 / (1 + np.exp(2)), abs=0.3)
    assert frame.verdict.tolist() == [SHOWN, NOT_SHOWN, SHOWN]


def test_at_equal_ratio_the_difference_is_that_of_the_interpolated_curves():
    """An independent way: both curves of means, interpolated on a grid of R."""
    sweep = [0.3, 0.1, 0.01]
    store = Measurements(FakeLab(tasks=["siqa"], theta_sweep=sweep, seeds=[0, 1]))
    runs = effects.equal_ratio_runs(store, "qtale", "dllm", 3, "csqa")
    assert [(run.task, run.seed) for run in runs] == [("siqa", 0), ("siqa", 1)]
    for run in runs:
        curves = {}
        for method in ("qtale", "dllm"):
            rules = ("argmax", *map(str, sweep))
            points = [store.answers["siqa", method, run.seed, 3, rule] for rule in rules]
            curves[method] = np.array(sorted((p.execution_ratio, p.mean) for p in points)).T
        low, high = (f(c[0].min() if f is max else c[0].max() for c in curves.values()) for f in (max, min))
        at = np.linspace(low, high, 4001)
        lines = {method: np.interp(at, *curve) for method, curve in curves.items()}
        assert high - low > 0.05
        assert run.effect == pytest.approx((lines["qtale"] - lines["dllm"]).mean(), abs=0.02)
        assert run.effect == pytest.approx(run.differences.mean())


def test_the_same_curve_has_no_difference_to_itself_and_curves_apart_are_not_compared():
    near, far = np.array([0.5, 0.9, 0.7]), np.array([0.95, 0.92, 0.99])
    same = effects.equal_ratio_weights(near, near)
    assert np.allclose(same[0], same[1]) and same[0].sum() == pytest.approx(1)
    assert np.allclose(same[0], [0.25, 0.25, 0.5], atol=1e-3)  # by the trapezoid rule
    assert effects.equal_ratio_weights(near, far) is None


def test_without_a_sweep_nothing_is_said_at_equal_ratio():
    words = judged(seeds=[0, 1])
    assert words["T4 QTALE at equal R, 3 bits, CSQA"] == NOT_RUN
    words = judged(seeds=[0, 1], theta_sweep=[0.3, 0.1])
    assert words["T4 QTALE at equal R, 3 bits, CSQA"] != NOT_RUN


AT_EQUAL_R = "T4 QTALE at equal R, 3 bits, CSQA"


def test_where_no_ratio_is_in_common_the_claim_is_not_testable(monkeypatch):
    monkeypatch.setitem(fake_lab.RISE, "dllm", 0.0)
    store = Measurements(FakeLab(tasks=["piqa", "siqa"], seeds=[0, 1], theta_sweep=[0.3, 0.1]))
    frame = verdicts(store, "07").set_index("id", drop=False)
    row = frame.loc[AT_EQUAL_R]
    assert row.verdict == NOT_TESTABLE and "in common" in row.reason and row.power == 0
    shown = claim_tables.verdict_table(frame).text.set_index("claim").loc[AT_EQUAL_R]
    assert shown["over"] == "0 of 4 runs" and shown["effect [95 %]"] == "–"


def test_a_task_with_one_comparable_seed_of_several_is_left_out_whole():
    lab = FakeLab(tasks=["piqa", "siqa"], seeds=[0, 1, 2], theta_sweep=[0.3, 0.1])
    apart = [("piqa", 0), ("piqa", 2), ("siqa", 1)]
    for (task, seed), rule in itertools.product(apart, ("argmax", "0.3", "0.1")):
        lab.value(task, "dllm", seed, 3, rule)["execution_ratio"] = 0.1
    store = Measurements(lab)
    runs = effects.equal_ratio_runs(store, "qtale", "dllm", 3, "csqa")
    assert [(run.task, run.seed) for run in runs if isnan(run.effect)] == sorted(apart)
    frame = verdicts(store, "07").set_index("id", drop=False)
    row = frame.loc[AT_EQUAL_R]
    used = [run for run in runs if run.task == "siqa" and run.seed != 1]
    assert row.effect == pytest.approx(np.mean([run.effect for run in used])) and row.trial == "seeds"
    low, high = min(run.ratios[0] for run in used), max(run.ratios[1] for run in used)
    over = f"1 task(s), 2 seed(s), 300 questions, 2 of 6 runs, at R {low:.2f}–{high:.2f}"
    assert claim_tables.verdict_table(frame).text.set_index("claim").loc[AT_EQUAL_R, "over"] == over


def test_controls_of_the_noise_are_for_profiles_that_run_it():
    assert judged(seeds=[0, 1])["C noise regularises, CSQA"] == NOT_RUN
    accuracy = {("full", 16, "none"): 80.0, ("noisy_full", 16, "zero"): 84.0}
    methods = ["full", "noisy_full"]
    words = judged(seeds=[0, 1, 2], accuracy=accuracy, methods=methods)
    assert words["C noise regularises, CSQA"] == SHOWN
    assert words["C noise hardens, 3 bits, CSQA"] != SHOWN


def test_seeds_for_a_point_are_fewer_over_more_tasks_and_give_that_power():
    lab = FakeLab(seeds=[0, 1, 2, 3], questions=900, theta_sweep=[0.3, 0.1])
    frame = planned(Measurements(lab)).set_index(["id", "on"])
    assert set(frame.index.get_level_values(0)) == {
        claim.id for claim in CLAIMS if claim.family == "primary" and claim.group == "csqa"
    }
    for contrast in frame.index.unique(0):
        four, seven = frame.loc[contrast, "Figure 2's tasks"], frame.loc[contrast, "all seven"]
        assert (four.tasks, seven.tasks) == (4, 7) and four.questions == 4 * 900
        assert four.needed >= seven.needed and four.spread > 0 and four.sampling > seven.sampling
    one = planned(Measurements(FakeLab(tasks=["arc_easy", "siqa"]))).set_index(["id", "on"])
    assert one.spread.isna().all() and one.needed.isna().all()  # one seed of too few tasks


def test_a_notebooks_verdicts_are_those_of_the_whole_scoreboard():
    store = Measurements(FakeLab(seeds=[0, 1]))
    whole = verdicts(store).set_index("id")
    for notebook in ("05", "07"):
        part = verdicts(store, notebook).set_index("id")
        assert len(part) and part.equals(whole.loc[part.index].astype(part.dtypes))


def test_the_primary_contrasts_are_the_five_questions_for_accuracy_and_for_perplexity():
    frame = verdicts(Measurements(FakeLab()))
    primary = frame[frame.family == "primary"].id.tolist()
    questions = (
        "T1 D-LLM loses more, 3 bits", "T1 QTALE loses less, 3 bits", "T4 entropy hardens, 3 bits",
        "T4 QTALE at equal R, 3 bits", "T4 θ control, 3 bits",
    )  # fmt: skip
    assert primary == [f"{question}, {group}" for question in questions for group in ("CSQA", "Alpaca")]


BAD = {
    "unknown rule": ("dllm 3 argmax: 1", "dllm 3 none: 1"),
    "unknown bits": ("dllm 3 argmax: 1", "dllm 5 argmax: 1"),
    "no range": ("      high: 0\n", ""),
    "unknown key": ("      high: 0\n", "      hihg: 0\n"),
    "no θ to sweep": ("plus: qtale", "plus: full"),
    "unknown group": ("groups: [mmlu]", "groups: [mmul]"),
    "cells and a curve": ("      equal_ratio:", "      cells: {qtale 3 argmax: 1}\n      equal_ratio:"),
    "range of no group": ("{csqa: -1, mmlu: -1, alpaca: -5}", "{csqa: -1, mmlu: -1}"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_slip_in_the_statement_is_refused(name):
    text = contrasts.FILE.read_text(encoding="utf-8")
    assert BAD[name][0] in text
    with pytest.raises(ValidationError):
        contrasts.Statement.model_validate(yaml.safe_load(text.replace(*BAD[name])))


def test_probe_effects_use_each_methods_own_layers():
    store = Measurements(FakeLab(tasks=["piqa"]))
    (run,) = effects.probe_runs(store, effects.difference("abs_gap"), ("dllm", "qtale"))
    final = store.layers[(store.layers.epoch == 10) & store.layers.gap.notna()]
    lowest = {m: final[final.method == m].nsmallest(3, "ratio").abs_gap.mean() for m in ("dllm", "qtale")}
    assert run == Run("piqa", 0, pytest.approx(lowest["qtale"] - lowest["dllm"]))


def test_ids_are_distinct_and_every_notebook_but_the_first_has_claims():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    said = [getattr(c, name) for c in CLAIMS for name in ("id", "quote", "source", "measured", "unit")]
    assert all(isinstance(text, str) and text for text in said)
    assert {claim.notebook for claim in CLAIMS} == {*(f"0{i}" for i in range(1, 8)), "12"}


def test_tally_counts_every_claim():
    frame = verdicts(Measurements(FakeLab()))
    assert sum(tally(frame).values()) == len(CLAIMS) == len(frame)
    assert not any(isnan(value) for value in frame[frame.tasks.notna()].effect)
    assert set(RULES) == set(METHODS)
