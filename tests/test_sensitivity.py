"""Sensitivity: effects against the default and which defaults are justified, where the truth is known."""

from __future__ import annotations

import fake_study
import pytest

from qtale_lib import sensitivity, study_figures, theta_aims
from qtale_lib.statistics import NOT_RUN, NOT_SHOWN, SHOWN
from qtale_lib.studies import SHIPPED, Study

YAML = SHIPPED / "sensitivity.yaml"


def truth(profile, bits: int) -> float:
    """Width 8 costs 4 points; τ 2 gains 3, at 3 bits, and weights of 2 bits in training 6, at 2; nothing else
    matters.
    """
    aware = profile.training.weight_bits == bits == 2
    return (
        -4.0 * (profile.routing.hidden == 8) + 3.0 * (profile.training.tau == 2 and bits == 3) + 6.0 * aware
    )


@pytest.fixture(scope="module")
def study() -> Study:
    return fake_study.study(YAML, {"qtale": truth, "dllm": truth})


def test_effects_are_those_that_are_there(study):
    found = sensitivity.effects(study).set_index(["factor", "value", "method", "bits"])
    for method in ("dllm", "qtale"):
        assert found.loc[("routing.hidden", "8", method, 16), "effect"] == pytest.approx(-4, abs=0.6)
        assert found.loc[("routing.hidden", "128", method, 3), "effect"] == pytest.approx(0, abs=0.6)
        assert found.loc[("training.tau", "2", method, 3), "effect"] == pytest.approx(3, abs=0.6)
        assert found.loc[("training.rate_target", "0.7", method, 16), "R_change"] == pytest.approx(
            0.2, abs=0.01
        )
    assert (found.low.dropna() < found.effect[found.low.notna()]).all()


def test_each_factor_shows_its_default_and_what_was_varied_with_it(study):
    found = sensitivity.effects(study)
    assert list(dict.fromkeys(found.factor)) == sensitivity.questions(study)
    for factor, part in found.groupby("factor"):
        assert part[part.default].value.nunique() == 1 and (part[part.default].effect == 0).all()
        assert part.value.nunique() == len(study.plan.factors[factor]) + 1
    assert set(found[found.factor == "training.lambda2"].method) == {"qtale"}
    assert set(found[found.factor == "calibration.objective"].bits) == {3}
    assert list(dict.fromkeys(found[found.factor == "training.lambda2"].value)) == [
        "0.05", "0.16", "0.5", "1.6", "5",
    ]  # fmt: skip


def test_a_default_is_justified_beaten_or_open(study):
    judged = sensitivity.verdicts(study).set_index("id")
    assert len(judged) == 22 and not any(judged.index.str.contains("R target"))  # every value but those
    assert judged.loc["S router width 8", "verdict"] == SHOWN
    assert judged.loc["S τ 2", "effect"] == pytest.approx(3, abs=0.6)
    table = sensitivity.defaults_table(study, judged.reset_index())
    words = table.text.set_index("setting")["the default is"]
    assert words["τ"] == "beaten by 2" and words["router width"] == "justified"
    assert set(words) <= {"beaten by 2", "justified", "open"}


def test_training_on_quantized_weights_is_judged_at_the_width_it_was_for(study):
    """At 4 and 3 bits it gains nothing, at 2 six points; a run for 2 bits gains nothing at 3."""
    judged = sensitivity.verdicts(study).set_index("id")
    for bits, gain in ((4, 0), (3, 0), (2, 6)):
        row = judged.loc[f"S bits of weights in training {bits}"]
        assert row.measured.startswith(f"{bits} bits, D-LLM and QTALE: gain")
        assert row.effect == pytest.approx(gain, abs=0.6)
        assert row.verdict == (SHOWN if gain == 0 else NOT_SHOWN)
    found = sensitivity.effects(study).set_index(["factor", "value", "method", "bits"])
    assert found.loc[(sensitivity.AWARE, "2", "qtale", 3), "effect"] == pytest.approx(0, abs=0.6)
    words = sensitivity.defaults_table(study, judged.reset_index()).text.set_index("setting")
    assert words["the default is"]["bits of weights in training"] == "beaten by 2"
    assert {s.profile.quantization.method for s in study.settings if s.factor == sensitivity.AWARE} == {"rtn"}


def test_every_question_has_its_picture(study):
    found = sensitivity.effects(study)
    for factor in sensitivity.questions(study):
        drawn = study_figures.factor(found[found.factor == factor])
        assert [axis.get_xlabel() for axis in drawn.axes] == [sensitivity.label(factor)] * 2
        ticks = [text.get_text() for text in drawn.axes[0].get_xticklabels()]
        assert sum("default" in tick for tick in ticks) == 1
    assert len(sensitivity.effects_table(study, found).text) == (~found.default).sum()


def test_without_results_nothing_is_claimed(tmp_path):
    study = Study(YAML, tmp_path)
    judged = sensitivity.verdicts(study)
    assert sensitivity.effects(study).empty and set(judged.verdict) == {NOT_RUN}
    assert sensitivity.defaults_table(study, judged).frame.empty
    assert sensitivity.effects_table(study, sensitivity.effects(study)).frame.empty
    assert theta_aims.table(study).frame.empty and len(study_figures.aims(theta_aims.frame(study)).axes) == 1


def test_rules_without_a_grid_run_what_they_aim_at_or_not(study, monkeypatch):
    """In made-up results an aim's R is 0.9: so much does each aim at but one, which aims at 0.6."""
    aims = {"ratio 0.6": 0.6, "ratio 0.6 by layer": 0.9, "flops 0.7": 0.9}
    monkeypatch.setattr(theta_aims, "aimed", lambda store, rule, *_: aims.get(rule, float("nan")))
    found = theta_aims.frame(study).set_index(["rule", "method"])
    assert found.loc[("ratio 0.6", "qtale"), "off"] == pytest.approx(30, abs=1)
    assert found.loc["flops 0.7"].off.abs().max() < 1 and found.loc["searched"].aimed.isna().all()
    every = sensitivity.verdicts(study, theta_aims.claims_of(study))
    judged = every.set_index("id").verdict
    assert [judged[f"S θ by {rule}"] for rule in aims] == [NOT_SHOWN, SHOWN, SHOWN]
    table = sensitivity.defaults_table(study, every)
    assert "theta_aims" not in set(table.frame.factor)
    assert len(theta_aims.table(study).text) == 5 * 2
    assert len(study_figures.aims(theta_aims.frame(study)).axes) == 1
