"""Tables: numbers equal their frames in every format, headers and notes present, what was not run is said."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_lab import FakeLab
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qtale_lib import (
    ablation_tables,
    claim_tables,
    claims,
    effects,
    efficiency,
    efficiency_tables,
    layer_tables,
    paper,
    paper_arithmetic,
    results,
    tables,
)
from qtale_lib.config import load_profile
from qtale_lib.measurements import Measurements
from qtale_lib.store import write_json
from qtale_lib.tables import NOT_RUN, Table, number, with_errors

SMALL = {"tasks": ["arc_easy", "alpaca"], "bits": [16, 4], "questions": 60}
STORE = Measurements(FakeLab(questions=60))
BUILDERS = {
    "setting": results.setting,
    "accuracy": results.accuracy_table,
    "beside 1": lambda store: results.accuracy_beside_paper(store, "table1"),
    "beside 2": lambda store: results.accuracy_beside_paper(store, "table2"),
    "changes": results.changes_table,
    "metrics": results.metrics_table,
    "rows": results.rows_table,
    "ablation": ablation_tables.ablation_table,
    "sweep": ablation_tables.sweep_table,
    "ablation beside": ablation_tables.ablation_beside_paper,
    "tally": lambda store: paper_arithmetic.tally_table(),
    "differences": lambda store: paper_arithmetic.difference_table(),
    "checks": lambda store: paper_arithmetic.check_table(),
    "efficiency": efficiency_tables.efficiency_table,
    "efficiency beside": efficiency_tables.efficiency_beside_paper,
    "loss ratio": efficiency_tables.loss_ratio_table,
    "files": efficiency_tables.file_table,
    "ways": lambda store: paper_arithmetic.ways_table(),
    "noise": lambda store: layer_tables.noise_table(),
    "lowest": layer_tables.lowest_table,
    "unevenness": layer_tables.unevenness_table,
    "gaps": layer_tables.gaps_table,
    "flips": layer_tables.flips_table,
    "claims": lambda store: claim_tables.verdict_table(claims.verdicts(store, "07")),
    "seeds": lambda store: claim_tables.seeds_table(claims.planned(store)),
    "scoreboard": lambda store: claim_tables.scoreboard(claims.verdicts(store)),
}


def cells(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, header first."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    "store", [STORE, Measurements(FakeLab(**SMALL)), Measurements(FakeLab(methods=["full"], **SMALL))]
)
def test_every_table_is_written_in_three_formats(name, store, tmp_path):
    table = tables.save(BUILDERS[name](store), tmp_path)
    written = {path.suffix: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert set(written) == {".md", ".tex", ".csv"}
    shown = cells(written[".md"])
    assert len(shown) == 1 + len(table.text)
    assert shown[0] == [str(column) for column in table.text.columns]
    assert [[cell.replace("\\|", "|") for cell in row] for row in shown[1:]] == table.text.astype(
        str
    ).values.tolist()
    assert written[".tex"].count(r"\\" + "\n") == 1 + len(table.text)
    assert all(
        rule in written[".tex"]
        for rule in (r"\toprule", r"\midrule", r"\bottomrule", rf"\label{{tab:{table.name}}}")
    )
    if len(table.frame):
        read = pd.read_csv(tmp_path / f"{table.name}.csv")
        assert list(read.columns) == list(table.frame.columns) and len(read) == len(table.frame)
        for column in table.frame.select_dtypes("number"):
            assert np.allclose(read[column], table.frame[column], equal_nan=True)
    assert not table.frame.duplicated(list(table.keys)).any()


def test_further_metrics_are_means_over_the_tasks_of_a_group_in_percent_with_the_spread_over_seeds():
    accuracies = [("piqa", 0, 0.8), ("boolq", 0, 0.6), ("piqa", 1, 0.4), ("boolq", 1, 0.6), ("mmlu", 0, 0.1)]
    frame = pd.DataFrame([
        {"task": t, "method": "full", "seed": s, "bits": 16, "theta_rule": "none", "metric": "acc",
         "acc": a, "expected_acc": a + 0.1, "open_acc": a - 0.1, "nll": 0.5 * a}
        for t, s, a in accuracies
    ])  # fmt: skip
    store = SimpleNamespace(evaluations=frame, profile=STORE.profile)
    table = results.metrics_table(store)
    assert table.text.to_dict("records") == [
        {"bits": "16", "tasks": "CSQA", "method": "Full", "θ": "–", "sampled": "60.0 (14.1)",
         "expected": "70.0 (14.1)", "open": "50.0 (14.1)", "NLL of the choices": "0.30 (0.07)"},
        {"bits": "16", "tasks": "MMLU", "method": "Full", "θ": "–", "sampled": "10.0", "expected": "20.0",
         "open": "0.0", "NLL of the choices": "0.05"},
    ]  # fmt: skip


def test_accuracy_cells_are_the_evaluations():
    store = Measurements(FakeLab(questions=60, seeds=[0, 1, 2]))
    held = results.accuracy_cells(store).set_index(["bits", "method", "task"])
    raw = store.evaluations
    chosen = raw[
        (raw.task == "siqa") & (raw.method == "qtale") & (raw.bits == 4) & (raw.theta_rule == "searched")
    ]
    cell = held.loc[4, "qtale", "siqa"]
    assert cell.value == pytest.approx(100 * chosen.acc.mean())
    assert cell.sampling == pytest.approx(100 * chosen.stderr.mean())
    assert cell.spread == pytest.approx(100 * chosen.acc.std(ddof=1)) and cell.seeds == 3
    ppl = raw[
        (raw.task == "alpaca") & (raw.method == "dllm") & (raw.bits == 3) & (raw.theta_rule == "argmax")
    ].ppl
    assert held.loc[3, "dllm", "alpaca_ppl"].value == pytest.approx(ppl.mean())


def test_csqa_average_weighs_tasks_alike_and_its_error_follows():
    held = results.accuracy_cells(STORE).set_index(["bits", "method", "task"])
    tasks = held.sort_index().loc[16, "full"].loc[list(paper.CSQA)]
    average = held.loc[16, "full", "avg"]
    assert average.value == pytest.approx(tasks.value.mean())
    assert average.sampling == pytest.approx(np.sqrt((tasks.sampling**2).sum()) / 7)


def test_quantized_qtale_stands_at_its_searched_theta():
    shown = results.accuracy_table(STORE).text.set_index(["bits", "method"])["θ"]
    assert shown["16", "QTALE"] == "0.5" and shown["4", "QTALE"] == shown["3", "QTALE"] == "searched"
    assert shown["4", "D-LLM"] == "0.5" and shown["4", "Full"] == "–"


def test_beside_the_paper_is_a_difference():
    frame = results.accuracy_beside_paper(STORE, "table2").frame.set_index(["bits", "method", "task"])
    row = frame.loc[3, "dllm", "boolq"]
    assert row.paper == 76.88 and row.difference == pytest.approx(row.ours - 76.88)
    assert len(frame) == 90


def test_what_was_not_run_is_said():
    store = Measurements(FakeLab(**SMALL))
    table = results.accuracy_table(store)
    assert set(table.text["MMLU"]) == {NOT_RUN} and NOT_RUN not in set(table.text["ARCe"])
    assert any("PIQA" in note for note in table.notes)
    beside = results.accuracy_beside_paper(store, "table1")
    assert beside.text["PIQA"].tolist()[0] == f"83.73 ({NOT_RUN})"
    assert set(
        ablation_tables.ablation_table(Measurements(FakeLab(methods=["full"], **SMALL))).text["CSQA acc."]
    ) == {NOT_RUN}


def test_changes_are_from_the_methods_own_16_bits():
    held = results.changes_table(STORE).frame.set_index(["source", "bits", "method", "task"]).change
    assert held["LLaMA2-7B", 3, "dllm", "avg"] == pytest.approx(70.57 - 80.06)
    assert held["LLaMA3.1-8B", 4, "full", "alpaca_ppl"] == pytest.approx(100 * np.log(3.65 / 3.57))
    answers = {bits: STORE.answers["mmlu", "full", 0, bits, "none"].mean for bits in (4, 16)}
    assert held["ours", 4, "full", "mmlu"] == pytest.approx(answers[4] - answers[16])
    ppl = STORE.evaluations.query("task == 'alpaca' and method == 'dllm' and theta_rule == 'argmax'")
    ppl = ppl.set_index("bits").ppl
    assert held["ours", 3, "dllm", "alpaca_ppl"] == pytest.approx(100 * np.log(ppl[3] / ppl[16]))


def test_rows_are_told_with_the_facts_that_they_rest_on(monkeypatch):
    lab = FakeLab(tasks=["piqa"], questions=60)
    held = results.rows_table(Measurements(lab)).frame.set_index("split")
    assert held.used.to_dict() == {"train": 800, "θ search": 50, "test": 60}
    assert held.facts.to_dict() == {"train": 267, "θ search": 17, "test": 30}
    monkeypatch.setattr(lab, "examples", lambda task, split: [SimpleNamespace(facts=())])
    without = results.rows_table(Measurements(lab)).frame.set_index("split").facts
    assert np.isnan(without["train"]) and without["test"] == 30


def test_a_change_has_the_error_of_paired_answers_and_the_spread_over_seeds():
    store = Measurements(FakeLab(tasks=["piqa", "siqa"], bits=[16, 4], seeds=[0, 1], questions=60))
    row = results.changes(store).set_index(["method", "task"]).loc["dllm", "avg"]
    score = {
        (task, seed, bits): store.answers[task, "dllm", seed, bits, "argmax"].mean
        for task in ("piqa", "siqa") for seed in (0, 1) for bits in (16, 4)
    }  # fmt: skip
    seeds = [np.mean([score[t, seed, 4] - score[t, seed, 16] for t in ("piqa", "siqa")]) for seed in (0, 1)]
    assert row.change == pytest.approx(np.mean(seeds))
    assert row.change_spread == pytest.approx(np.std(seeds, ddof=1))
    apart = results.accuracy_cells(store).set_index(["bits", "method", "task"]).sampling
    assert 0 < row.change_sampling < np.hypot(apart[4, "dllm", "avg"], apart[16, "dllm", "avg"])
    shown = results.changes_table(store).text.set_index("method").ours["D-LLM"]
    assert shown == with_errors(row.change, row.change_sampling, row.change_spread, sign=True)


def test_ablation_pairs_entropy_with_the_method_and_theta_with_the_rule():
    held = ablation_tables.ablation_cells(STORE, [4, 16]).set_index(
        ["bits", "entropy_loss", "theta", "group"]
    )
    raw = STORE.evaluations.set_index(["task", "method", "bits", "theta_rule"])
    for (bits, entropy, theta), (method, rule) in {
        (4, "no", "0.5"): ("dllm", "argmax"),
        (4, "yes", "adjust"): ("qtale", "searched"),
        (16, "yes", "→ 0"): ("qtale", "zero"),
    }.items():
        cell, row = held.loc[bits, entropy, theta, "mmlu"], raw.loc["mmlu", method, bits, rule]
        assert cell.value == pytest.approx(100 * row.acc)
        assert cell.execution_ratio == pytest.approx(row.execution_ratio) and cell.theta_value == row.theta


def test_the_sweep_is_of_means_over_tasks_and_seeds():
    store = Measurements(FakeLab(tasks=["piqa", "siqa", "alpaca"], theta_sweep=[0.1], seeds=[0, 1], bits=[3]))
    table = ablation_tables.sweep_table(store)
    assert set(table.frame.theta) == {0.5, 0.1} and len(table.frame) == len(table.text) == 2 * 2 * 2
    held = table.frame.set_index(["method", "group", "theta"])
    seeds = [
        np.mean([store.answers[task, "qtale", seed, 3, "0.1"].mean for task in ("piqa", "siqa")])
        for seed in (0, 1)
    ]
    assert held.score["qtale", "csqa", 0.1] == pytest.approx(np.mean(seeds))
    assert held.score_spread["qtale", "csqa", 0.1] == pytest.approx(np.std(seeds, ddof=1))
    nll = [store.answers["alpaca", "dllm", seed, 3, "argmax"].mean / 100 for seed in (0, 1)]
    assert held.score["dllm", "alpaca", 0.5] == pytest.approx(np.exp(nll).mean())
    assert ablation_tables.sweep_table(STORE).frame.empty


def test_flops_are_the_layers_times_the_measured_ratio():
    held = efficiency_tables.efficiency_cells(STORE).set_index(["bits", "method", "group"])
    raw = STORE.evaluations
    raw = raw[
        (raw.method == "qtale") & (raw.bits == 3) & (raw.theta_rule == "searched") & raw.task.isin(paper.CSQA)
    ]
    cell, full = held.loc[3, "qtale", "csqa"], held.loc[3, "full", "csqa"]
    assert cell.relative == cell.R == pytest.approx(raw.execution_ratio.mean()) and cell.runs == 7
    assert full.layers == 2 * 8 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)  # q, o; k, v; gate, up, down
    assert cell.layers == pytest.approx(full.layers * cell.R) and full.routers == 0
    assert cell.routers == 2 * 6 * (128 // 8) * (128 + 2)  # six routed layers, h = d / 8
    assert cell.bytes > full.bytes == efficiency.model_bytes(efficiency_tables.shape(STORE), 3)["total"]


def test_loss_ratios_are_those_of_16_bits_at_arg_max_and_the_largest_gaps_come_last():
    store = Measurements(FakeLab(tasks=["piqa", "mmlu"], seeds=[0, 1], questions=60))
    table = efficiency_tables.loss_ratio_table(store)
    held = table.frame.set_index("task")
    raw = store.evaluations.query("bits == 16 and theta_rule == 'argmax'")
    raw = raw.set_index(["task", "method", "seed"]).sort_index().loss_ratio.astype(float)
    row = held.loc["piqa"]
    assert row.dllm == pytest.approx(raw["piqa", "dllm"].mean())
    assert row.dllm_off_target == pytest.approx(row.dllm - 0.5)
    assert row.difference == pytest.approx(row.qtale - row.dllm)
    assert row.difference_spread == pytest.approx((raw["piqa", "qtale"] - raw["piqa", "dllm"]).std())
    last = table.text.iloc[-1]
    assert last["QTALE − D-LLM"] == number(held.difference.abs().max(), 3)
    assert last["D-LLM − target"] == number(held.dllm_off_target.abs().max(), 3)


def test_flips_table_holds_measured_and_closed_form():
    frame = layer_tables.flips_table(STORE).frame
    assert np.allclose(frame.difference, frame.flip - frame.flip_expected)
    assert sorted(frame.epoch.unique()) == [0, 3, 6, 10] and set(frame.method) == {"dllm", "qtale"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any))
def test_gini_and_entropy_are_those_of_their_textbook_definitions(executed):
    values = np.array(executed) / 1000
    pairs = np.abs(values[:, None] - values[None]).mean()  # half the mean difference of pairs over the mean
    assert effects.gini(values) == pytest.approx(pairs / (2 * values.mean()), abs=1e-9)
    assert effects.evenness(values) == pytest.approx(stats.entropy(values) / np.log(len(values)), abs=1e-9)


def test_even_layers_and_a_single_layer_are_the_ends_of_both_measures():
    for ratios, ends in (([0.4] * 5, (0.0, 1.0)), ([0, 0, 1.0, 0], (0.75, 0.0)), ([0.0] * 3, (0.0, 1.0))):
        assert (effects.gini(np.array(ratios)), effects.evenness(np.array(ratios))) == pytest.approx(ends)


def test_unevenness_is_per_method_over_fine_tunings_and_dllm_is_less_even_in_the_made_up_lab():
    store = Measurements(FakeLab(tasks=["piqa", "siqa", "mmlu"], seeds=[0, 1]))
    held = layer_tables.unevenness_table(store).frame.set_index(["measure", "method"])
    final = store.layers[(store.layers.epoch == 10) & store.layers.routed_ratio.notna()]
    final = final[final.task.isin(["piqa", "siqa"])]
    each = final[final.method == "dllm"].groupby(["task", "seed"]).routed_ratio
    row = held.loc["Gini coefficient", "D-LLM"]
    assert row.effect == pytest.approx(each.apply(lambda r: effects.gini(r.to_numpy())).mean())
    assert row.low < row.effect < row.high and (row.tasks, row.seeds) == (2, 2)
    difference = held.loc["Gini coefficient", "QTALE − D-LLM"].effect
    assert difference == pytest.approx(held.effect["Gini coefficient", "QTALE"] - row.effect)


@pytest.mark.parametrize(
    ("value", "sampling", "spread", "text"),
    [
        (78.904, 1.1, None, "78.90 ± 1.10"),
        (78.904, 1.1, 0.8, "78.90 ± 1.10 (0.80)"),
        (-1.0, None, None, "−1.00"),
        (None, 1.0, None, NOT_RUN),
        (float("nan"), 1.0, None, NOT_RUN),
        (5.0, float("nan"), float("nan"), "5.00"),
    ],
)
def test_numbers_with_errors(value, sampling, spread, text):
    assert with_errors(value, sampling, spread) == text


def test_signs_and_digits():
    assert (number(1.25, 1, sign=True), number(-0.5, 1)) == ("+1.2", "−0.5")


def test_latex_escapes_what_it_must():
    text = pd.DataFrame({"a_b & c": ["50 % ± 1", "θ ≤ 0.5 − x^2"]})
    written = tables.to_latex(Table("t", "100 %_#", text, text, ("a_b & c",)))
    assert r"a\_b \& c \\" in written and r"50 \% $\pm$ 1 \\" in written
    assert r"$\theta$ $\leq$ 0.5 $-$ x\^{}2 \\" in written and r"\caption{100 \%\_\#}" in written


def test_reference_run_beside(tmp_path):
    frame = pd.DataFrame(
        {"task": ["piqa", "mmlu"], "bits": [4, 4], "value": [80.0, 70.0], "verdict": ["x", "y"]}
    )
    table = tables.of_numbers("t", "T", frame, ("task", "bits"))
    lab = reader()
    assert "No reference run of profile tiny" in tables.beside_reference(table, lab, tmp_path).notes[0]
    directory = tmp_path / "results" / "reference" / "tiny" / "tables"
    tables.save(
        tables.of_numbers("t", "T", frame.assign(value=[81.0, 70.5], verdict="z")[:1], ("task", "bits")),
        directory,
    )
    beside = tables.beside_reference(table, lab, tmp_path).frame
    assert beside[["task", "here", "reference", "difference"]].values.tolist() == [["piqa", 80.0, 81.0, -1.0]]


@pytest.fixture
def full(tmp_path):
    """Write results/reference/tiny-full with two rows; returns a table of the same kind and the root."""

    def write(seeds=(0, 1, 2, 3), extends="tiny", base="a", **changes):
        folder = tmp_path / "results" / "reference" / "tiny-full"
        frame = pd.DataFrame({"task": ["piqa", "mmlu"], "value": [80.0, 70.0], "sampling": [0.1, 0.1],
                              "spread": [2.0, 0.0], "R": [0.5, 0.6], "R_spread": [0.02, 0.01]})  # fmt: skip
        tables.save(tables.of_numbers("t", "T", frame, ("task",)), folder / "tables")
        settings = {"name": "tiny-full", "extends": extends, "seeds": list(seeds), "theta_sweep": [0.1]}
        profile = load_profile("tiny", **changes).model_dump(mode="json") | settings
        write_json(folder / "provenance.json", {"profile": profile, "base": {"sha256": base}})
        here = frame.assign(value=[83.0, 71.0], sampling=[1.0, 0.5], R=[0.47, 0.6], spread=np.nan)
        return tables.of_numbers("t", "T", here, ("task",))

    return write


def test_a_number_is_placed_among_the_seeds_of_the_full_run(full, tmp_path):
    beside = tables.beside_reference(full(), reader(), tmp_path)
    held = beside.frame.set_index(["task", "column"])
    row = held.loc["piqa", "value"]
    assert (row.here, row["tiny-full"], row["tiny-full spread"]) == (83.0, 80.0, 2.0)
    assert row.z == pytest.approx(3 / np.sqrt(2.0**2 * 3 / 4 + 1.0**2))  # seed 0 is one of the four
    assert held.z["mmlu", "value"] == pytest.approx(1 / 0.5)  # no spread over seeds: sampling error alone
    assert held.z["piqa", "R"] == pytest.approx(-0.03 / (0.02 * np.sqrt(3 / 4)))  # no sampling error known
    assert "4 seeds" in beside.notes[1] and "No reference run of profile tiny " in beside.notes[0]
    assert "in both (1) have" in beside.notes[1] and "0.75 spread²" in beside.notes[1]
    other = tables.beside_reference(full(seeds=[5, 6, 7, 8]), reader(), tmp_path)
    held = other.frame.set_index(["task", "column"])
    assert held.z["piqa", "value"] == pytest.approx(3 / np.sqrt(2.0**2 * 5 / 4 + 1.0**2))
    assert "1.25 spread²" in other.notes[1]


@pytest.mark.parametrize("family", [[0, 1, 2, 3], [1, 2, 5], [7, 8]])
def test_the_spread_of_a_difference_of_means_over_seeds_is_that_of_drawn_seeds(full, tmp_path, family):
    here = full(seeds=family)
    tables_of_two = tables.beside_reference(here, reader(seeds=[0, 1]), tmp_path)
    ours = tables_of_two.frame.set_index(["task", "column"]).loc["piqa", "R"]
    share = (ours.here - ours["tiny-full"]) ** 2 / ours.z**2 / 0.02**2
    draws = np.random.default_rng(0).normal(size=(100_000, 9))
    apart = draws[:, [0, 1]].mean(1) - draws[:, family].mean(1)
    assert share == pytest.approx(apart.var(), rel=0.02)


def test_an_effect_is_placed_with_the_sampling_error_of_its_questions(tmp_path):
    folder = tmp_path / "results" / "reference" / "tiny-full"
    frame = pd.DataFrame({"id": ["a"], "effect": [1.0], "effect_spread": [0.5], "effect_sampling": [0.1]})
    tables.save(tables.of_numbers("t", "T", frame, ("id",)), folder / "tables")
    settings = {"name": "tiny-full", "extends": "tiny", "seeds": [0, 1, 2, 3]}
    profile = load_profile("tiny").model_dump(mode="json") | settings
    write_json(folder / "provenance.json", {"profile": profile, "base": {"sha256": "a"}})
    here = frame.assign(effect=3.0, effect_spread=np.nan, effect_sampling=2.0)
    beside = tables.beside_reference(tables.of_numbers("t", "T", here, ("id",)), reader(), tmp_path)
    z = beside.frame.set_index("column").z["effect"]
    assert z == pytest.approx(2 / np.sqrt(0.5**2 * 3 / 4 + 2.0**2))


def test_the_full_run_stands_beside_the_reference_of_the_same_profile(full, tmp_path):
    table = full()
    tables.save(
        tables.of_numbers("t", "T", table.frame.assign(value=[81.0, 70.0]), ("task",)),
        tmp_path / "results" / "reference" / "tiny" / "tables",
    )
    row = tables.beside_reference(table, reader(), tmp_path).frame.set_index(["task", "column"])
    assert row.loc["piqa", "value"][["here", "reference", "difference", "tiny-full"]].tolist() == [
        83,
        81,
        2,
        80,
    ]
    assert np.isnan(row.z["piqa", "sampling"])


@pytest.mark.parametrize("other", [{"seeds": (0,)}, {"extends": "smoke"}])
def test_without_a_family_of_several_seeds_nothing_is_said_of_one(full, tmp_path, other):
    beside = tables.beside_reference(full(**other), reader(), tmp_path)
    assert len(beside.notes) == 1 and beside.frame.empty and "tiny-full" not in str(beside.notes)


@pytest.mark.parametrize(
    ("other", "said"), [({"base": "b"}, "base"), ({"training": {"lr": 0.5}}, "training.lr")]
)
def test_a_full_run_on_another_base_or_by_another_recipe_gives_no_z(full, tmp_path, other, said):
    beside = tables.beside_reference(full(**other), reader(), tmp_path)
    assert beside.frame.z.isna().all() and f"differs in {said}: z does not apply" in beside.notes[1]


def test_every_table_with_a_reference_has_spreads_over_seeds():
    store = Measurements(
        FakeLab(tasks=["arc_easy", "siqa", "alpaca"], bits=[16, 4], seeds=[0, 1], questions=60)
    )
    made = {
        "table_1_2": (results.accuracy_table(store), ["value"]),
        "table_3": (efficiency_tables.efficiency_table(store), ["R"]),
        "table_4": (ablation_tables.ablation_table(store), ["value", "execution_ratio", "theta_value"]),
        "figure_2": (layer_tables.lowest_table(store), ["ratio", "of_tokens_routed", "mean_ratio"]),
        "figures_5_6": (layer_tables.gaps_table(store), ["gap", "abs_gap"]),
        "figures_3_7": (layer_tables.flips_table(store), ["ratio", "flip"]),
        "claims": (claim_tables.verdict_table(claims.verdicts(store)), ["effect"]),
    }
    for name, (table, columns) in made.items():
        for column in columns:
            assert table.frame[tables.spread_of(column)].notna().any(), (name, column)


def reader(sha256: str = "a", **overrides: Any) -> SimpleNamespace:
    """What a comparison with the reference reads of a lab of tiny."""
    return SimpleNamespace(profile=load_profile("tiny", **overrides), base=lambda: {"sha256": sha256})


SAME = "The reference is a committed run of the same profile; its provenance lies beside it."
OTHER = "The reference is a committed run of a profile of this name, but differs from this one in {}: so may "


@pytest.mark.parametrize(
    ("lab", "note"),
    [
        (reader(), SAME),
        (reader(name="tiny", extends="smoke"), SAME),
        (reader("b"), OTHER.format("base")),
        (reader(seeds=2, data_dir="."), OTHER.format("data_dir, seeds")),
        (reader("b", bits=[4], training={"lr": 1.0}), OTHER.format("base, bits, training.lr")),
    ],
)
def test_the_note_says_in_what_the_reference_differs(tmp_path, lab, note):
    table = tables.of_numbers("t", "T", pd.DataFrame({"task": ["piqa"], "value": [80.0]}), ("task",))
    folder = tmp_path / "results" / "reference" / "tiny"
    tables.save(table, folder / "tables")
    assert "settings that are not known" in tables.beside_reference(table, lab, tmp_path).notes[0]
    told = {"profile": reader().profile.model_dump(mode="json"), "base": {"sha256": "a"}}
    write_json(folder / "provenance.json", told)
    assert tables.beside_reference(table, lab, tmp_path).notes[0].startswith(note)


def test_a_table_of_quantities_is_compared_with_the_committed_reference():
    beside = tables.beside_reference(layer_tables.noise_table(), reader("b"))
    assert "differs from this one in base" in beside.notes[0]  # and in what is newer than that run
    assert set(beside.frame.column) == {"measured", "closed form"} and len(beside.frame) > 4


def test_the_scoreboard_holds_every_claim_in_a_short_line_with_the_primary_ones_first():
    verdicts = claims.verdicts(STORE)
    table = claim_tables.scoreboard(verdicts)
    held, frame = table.frame.set_index("id"), verdicts.set_index("id")
    assert set(held.index) == set(frame.index)
    for column in ("effect", "low", "high", "power", "verdict"):
        assert held[column].equals(frame.loc[held.index, column])
    families = list(dict.fromkeys(verdicts.family))
    families.sort(key=lambda family: family != "primary")
    assert list(dict.fromkeys(held.family)) == families == [name for name in table.text.family if name]
    assert max(map(len, tables.to_markdown(table).splitlines()[:-1])) <= 250
    empty = (table.text == "").values
    assert not empty[0].any() and (empty[:, :-1] >= empty[:, 1:]).all()  # what is empty stands above


def test_packed_files_stand_beside_their_formula():
    rows = efficiency_tables.file_table(STORE).frame.set_index("base model").MiB * 2**20
    for bits in (4, 3, 2):
        formula, real = rows[f"formula, {bits} bits"], rows[f"packed file, {bits} bits"]
        groups = efficiency.model_bytes(efficiency_tables.shape(STORE), bits)["groups"] * 8 / (16 + bits)
        header = real - formula - 2 * groups  # steps take 32 bits there, 16 in the formula
        assert 0 < header < 200 * 8 * (7 * 3 + 2)


@pytest.mark.parametrize(
    ("size", "said"), [(128, "128 weights a group"), (-1, "one group per row (the paper: 128 weights)")]
)
def test_the_quantizer_is_told_where_its_numbers_stand(size, said):
    store = Measurements(FakeLab(group_size=size))
    assert said in results.setting(store).text.set_index("setting").value["quantizer"]
    for table in (results.accuracy_table(store), efficiency_tables.efficiency_table(store)):
        assert said in table.notes[0]
