"""Notebook 09: arms, changes and gains at equal R on results of known truth, and borrowed fine-tunings."""

from __future__ import annotations

from functools import partial
from typing import Any

import fake_study
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_lib import claims, figures, quantizers, study_figures
from qtale_lib.lab import run_spec
from qtale_lib.measurements import Answers, Measurements, sharing
from qtale_lib.statistics import NOT_RUN, SHOWN
from qtale_lib.store import Store
from qtale_lib.studies import SHIPPED, Study

YAML, SMALL = SHIPPED / "quantizers.yaml", SHIPPED / "quantizers.smoke.yaml"
WIDTHS = [4, 2, 3, 3, 3, 3, 3, 3]  # of the mixed arm's layers


class ArmLab(fake_study.SettingLab):
    """The made-up lab of one arm: `score(profile, method, bits)` is what each of its models comes to, but for
    noise; Full with fewer layers runs the share of them that is left, early exit its confidence.
    """

    def __init__(self, profile: Any, score: Any, questions: int) -> None:
        super().__init__(profile, {}, questions)
        self.score = score
        for name in ("quantization", "pruning", "routing", "group_size"):
            setattr(self.profile, name, getattr(profile, name))

    def made_up(self, task: str, method: str, seed: int, bits: int, rule: str) -> dict[str, Any]:
        value = super().made_up(task, method, seed, bits, rule)
        kind, _, amount = self.real.pruning.layers.partition(" ")
        if kind != "none":
            value["execution_ratio"] = float(amount) if kind == "early_exit" else 1 - int(amount) / 8
        score = self.score(self.real, method, bits) + self.noise("arm", task, method, seed, bits).normal(
            0, 0.2
        )
        return {**value, **self.choices(task, score)}

    def result(self, kind: str, **spec: Any) -> dict[str, Any]:
        return {"value": {"layer_bits": WIDTHS}} if kind == "quantization" else super().result(kind, **spec)


def study(score: Any, questions: int = 200, **overrides: Any) -> Study:
    made = Study(YAML, **overrides)
    labs = [ArmLab(setting.profile, score, questions) for setting in made.settings]
    made.measured = [(s, Measurements(lab)) for s, lab in zip(made.settings, labs, strict=True)]
    return made


def flat(profile: Any, method: str, bits: int) -> float:
    return 70.0


def robust(profile: Any, method: str, bits: int) -> float:
    """Quantizers and sparsity cost D-LLM 6 points and others 2; each layer removed from Full costs 5."""
    if profile.pruning.layers.startswith("early_exit"):
        return 40 + 30 * float(profile.pruning.layers.split()[1])
    if profile.pruning.layers != "none":
        return 70.0 - 5 * int(profile.pruning.layers.split()[1])
    compressed = bits < 16 or profile.pruning.weights != "none"
    mixed = 3.0 * (profile.quantization.widths == "mixed")
    return 70.0 - compressed * (6.0 if method == "dllm" else 2.0) + mixed


def test_every_arm_stands_there_with_its_widths_and_methods():
    found = quantizers.frame(study(flat, questions=40, tasks=["boolq", "arc_easy"], seeds=1))
    assert not found.duplicated(["arm", "bits", "method"]).any()
    assert len(found) == 3 + 3 * (4 * 3 + 1 + 4) + 17
    whole = found[found.arm == "16 bits"]
    assert whole.change.isna().all() and whole["bytes"].isna().all()
    assert set(found[found.kind == "layers"].method) == {"full"}
    rules = found.set_index(["arm", "bits", "method"]).rule
    assert rules["GPTQ", 3, "qtale"] == "searched" and rules["GPTQ", 3, "dllm"] == "argmax"
    assert rules["wanda 2:4", 16, "qtale"] == "searched" and rules["16 bits", 16, "qtale"] == "argmax"


def test_changes_are_from_the_same_methods_16_bits_and_sizes_those_of_files():
    found = quantizers.frame(study(robust, tasks=["boolq", "piqa"], seeds=2)).set_index(
        ["arm", "bits", "method"]
    )
    assert found.change["GPTQ", 3, "dllm"] == pytest.approx(-6.0, abs=0.5)
    assert found.change["GPTQ, mixed", 3, "qtale"] == pytest.approx(1.0, abs=0.5)
    assert found.change["wanda 0.5", 16, "full"] == pytest.approx(-2.0, abs=0.5)
    assert found.R["sleb 3", 16, "full"] == pytest.approx(5 / 8)
    size = found["bytes"]
    assert size["AWQ", 4, "full"] > size["AWQ", 3, "full"] > size["AWQ", 2, "full"]
    assert size["AWQ", 3, "full"] == size["GPTQ", 3, "full"] < size["GPTQ", 3, "qtale"]  # which has routers
    mixed = size["GPTQ, mixed", 3, "full"]
    assert mixed == pytest.approx(size["GPTQ", 3, "full"], rel=0.01)  # zero points differ, and the header


def test_verdicts_find_what_is_there():
    judged = claims.judged(study(robust, tasks=["arc_easy", "piqa", "siqa"]), quantizers.CLAIMS).set_index(
        "id"
    )
    lost = ["Q RTN, 3 bits", "Q GPTQ, 3 bits", "Q MagR+GPTQ, 3 bits", "Q sparsity, wanda 2:4"]
    assert judged.effect[lost].to_numpy() == pytest.approx(4.0, abs=0.5)
    assert set(judged.verdict[lost]) == {SHOWN}
    assert judged.effect["Q GPTQ, mixed against GPTQ, 3 bits"] == pytest.approx(3.0, abs=0.5)
    assert judged.effect["Q MagR+GPTQ against AWQ, 3 bits"] == pytest.approx(0.0, abs=0.5)
    # 5 points a layer are 40 a unit of R: at R 0.52, Full has lost 0.48 × 40
    assert judged.effect["Q layers, SLEB"] == pytest.approx(0.48 * 40, abs=1.0)
    assert judged.ratio_low["Q layers, SLEB"] == pytest.approx(0.52, abs=0.04)
    assert judged.effect["Q layers, early exit"] == pytest.approx(0.48 * 30, abs=1.0)


def test_what_was_not_run_is_said_so():
    part = study(flat, questions=40, tasks=["boolq"], seeds=1)
    part.measured = part.measured[:2]  # its own settings, and RTN
    verdicts = claims.judged(part, quantizers.CLAIMS).set_index("id").verdict
    assert verdicts["Q GPTQ, 3 bits"] == verdicts["Q layers, SLEB"] == NOT_RUN
    assert verdicts["Q RTN, 3 bits"] != NOT_RUN
    assert quantizers.equal_ratios(part).empty


def answers(ratio: float, score: float) -> Answers:
    return Answers(np.full(4, score), np.ones(4), sharing(((),) * 4), ratio, ratio)


points_of_a_curve = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=2, max_size=6, unique_by=lambda point: point[0]
)


@given(points_of_a_curve, st.floats(0, 1))
def test_a_point_is_held_against_the_curve_at_its_own_ratio(points, at):
    run = quantizers.gain_at_its_ratio("boolq", 0, answers(at, 50.0), [answers(*point) for point in points])
    ratios, scores = np.array(sorted(points)).T
    if ratios[0] <= at <= ratios[-1]:
        assert run.effect == pytest.approx(50.0 - np.interp(at, ratios, scores), abs=1e-6)
    else:
        assert np.isnan(run.effect)


@pytest.mark.parametrize("score", [flat, robust])
def test_tables_and_the_figure_hold_every_row(score, tmp_path):
    made = study(score, questions=40, seeds=2, tasks=["boolq", "arc_easy"])
    found, equal = quantizers.frame(made), quantizers.equal_ratios(made)
    tables = [partial(quantizers.quantizer_table, found), partial(quantizers.pruning_table, found),
              partial(quantizers.equal_ratio_table, equal)]  # fmt: skip
    shown = [table(made) for table in tables]
    assert [len(table.text) for table in shown] == [len(table.frame) for table in shown]
    assert len(shown[0].text) + len(shown[1].text) == len(found) and len(equal) == 6
    assert set(figures.save(study_figures.compression(found), found, "quantizers", tmp_path)) > {"csv", "pdf"}


def test_nothing_computed_is_no_error():
    made = study(flat, questions=40)
    made.measured = [(setting, Measurements(_empty())) for setting, _ in made.measured]
    found = quantizers.frame(made)
    assert found.empty and len(quantizers.quantizer_table(found, made).text) == 0
    assert quantizers.equal_ratios(made).empty and study_figures.compression(found)


def _empty() -> Any:
    return fake_study.SettingLab(Study(SMALL).profile.model_copy(update={"seeds": ()}), {}, 10)


def test_fine_tunings_of_the_profile_it_extends_are_taken_over(tmp_path):
    made = Study(SMALL, tmp_path)
    lab, run = made.labs[0], made.jobs()[0][1][0].run
    address = lab.address("finetune", run_spec(run))
    smoke = Store(tmp_path / "smoke" / "store")
    made.borrow()
    assert lab.find("finetune", **run_spec(run)) is None
    smoke.put(*address, spec=run_spec(run), value={"adapter_sha256": "0" * 64}, config={}, provenance={})
    made.borrow()
    assert lab.find("finetune", **run_spec(run)) is None  # there are no weights with it
    smoke.files(*address).mkdir()
    (smoke.files(*address) / "adapter_model.safetensors").write_bytes(b"weights")
    made.borrow()
    assert lab.find("finetune", **run_spec(run))["value"] == {"adapter_sha256": "0" * 64}
    taken = lab.store.files(*address) / "adapter_model.safetensors"
    assert taken.read_bytes() == b"weights"
