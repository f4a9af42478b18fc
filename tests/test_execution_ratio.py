"""Accuracy against execution ratio: fronts, and who wins at equal FLOPs, on results whose truth is known."""

from __future__ import annotations

import fake_study
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_lib import claims, execution_ratio, figures, study_figures
from qtale_lib.statistics import NOT_RUN, NOT_SHOWN, NOT_TESTABLE, SHOWN
from qtale_lib.studies import SHIPPED

YAML = SHIPPED / "execution_ratio.yaml"
numbers = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_the_front_is_what_no_point_beats_and_beats_all_others(points):
    costs, values = np.array(points).T
    front = execution_ratio.front(costs, values)

    def beats(a: int, b: int) -> bool:
        return costs[a] <= costs[b] and values[a] >= values[b] and tuple(points[a]) != tuple(points[b])

    everything = range(len(points))
    for point in everything:
        if front[point]:
            assert not any(beats(other, point) for other in everything)
        else:
            assert any(front[other] and beats(other, point) for other in everything)


def test_a_gain_at_equal_flops_is_found_where_it_is_and_shown():
    """QTALE is 3 points above the line that all others lie on, whatever R they were trained for."""
    study = fake_study.study(YAML, {"qtale": lambda profile, bits: 3.0 if bits == 3 else 0.0})
    gains = execution_ratio.gains(study).set_index(["bits", "rival", "task"])
    for rival in execution_ratio.RIVALS:
        assert gains.loc[(3, rival, "all"), "effect"] == pytest.approx(3.0, abs=0.7)
        assert gains.loc[(16, rival, "all"), "effect"] == pytest.approx(0.0, abs=0.7)
    judged = claims.judged(study, execution_ratio.CLAIMS).set_index("id")
    assert set(judged.loc[["E entropy term, 3 bits", "E trained for R, 3 bits"], "verdict"]) == {SHOWN}
    assert set(judged.loc[["E entropy term, 16 bits", "E trained for R, 16 bits"], "verdict"]) <= {
        NOT_SHOWN,
        NOT_TESTABLE,
    }
    fair = judged.loc["E trained for R, 16 bits"]
    assert (fair.tasks, fair.seeds) == (4, 3)
    assert fair.ratio_low == pytest.approx(0.53, abs=0.04) and fair.ratio_high < 0.9


def test_a_dearer_rival_of_equal_accuracy_loses():
    """D-LLM a tenth of R dearer at the same accuracy: 20 points a unit of R make 2 points."""
    study = fake_study.study(YAML, {"dllm": lambda profile, bits: -2.0})
    gains = execution_ratio.gains(study).set_index(["bits", "rival", "task"]).effect
    assert all(gains.loc[(bits, "targets", "all")] == pytest.approx(2.0, abs=0.7) for bits in (16, 4, 3))


def test_one_seed_of_one_task_is_too_few():
    study = fake_study.study(YAML, tasks=["arc_easy"], seeds=1, bits=[16])
    judged = claims.judged(study, execution_ratio.CLAIMS).set_index("id").verdict
    assert judged["E entropy term, 16 bits"] == NOT_TESTABLE and judged["E entropy term, 3 bits"] == NOT_RUN


def test_what_is_drawn_has_every_point_with_its_interval_and_flops_above_r():
    study = fake_study.study(YAML, tasks=["boolq", "arc_easy"], seeds=2, questions=40)
    frame = execution_ratio.frame(study)
    thetas = len(study.profile.theta_sweep) + 2  # and 0.5, and 0
    assert len(frame) == 3 * 3 * (2 * thetas + 4)  # widths × tasks and their mean × points
    assert (frame.low <= frame.accuracy).all() and (frame.accuracy <= frame.high).all()
    assert (frame.flops > frame.R).all() and set(frame.curve) == set(execution_ratio.CURVES)
    assert frame[frame.curve == "targets"].target.nunique() == 4
    assert frame.groupby(["bits", "task"]).on_front.any().all()
    assert len(study_figures.pareto(frame).axes) == 9
    assert (
        len(execution_ratio.front_table(frame, study).text) == (frame.on_front & (frame.task == "all")).sum()
    )
    assert list(execution_ratio.gains_table(study).text) == [
        "bits", "QTALE along θ, against", "BoolQ", "ARCe", "all",
    ]  # fmt: skip


def test_without_results_there_is_nothing_to_draw(tmp_path):
    study = execution_ratio.Study(YAML, tmp_path)
    frame = execution_ratio.frame(study)
    assert frame.empty and execution_ratio.gains(study).empty
    assert len(study_figures.pareto(frame).axes) == len(figures.empty().axes)
    assert set(claims.judged(study, execution_ratio.CLAIMS).verdict) == {NOT_RUN}
