"""The paper's numbers: equal to an independent copy of the tables, and what their own arithmetic gives."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from qtale_lib import paper

LABELS = {label: key for key, label in paper.METHODS.items()}


def copy_of(name: str) -> pd.DataFrame:
    directory = os.environ.get("QTALE_TEST_PAPER")
    if not directory:
        pytest.skip("QTALE_TEST_PAPER names no directory with the CSV copies of the paper's tables")
    return pd.read_csv(Path(directory) / name)


def as_dict(frame: pd.DataFrame, keys: list[str], values: list[str]) -> dict:
    assert not frame.duplicated(keys).any()
    rows = zip(frame[keys].values, frame[values].values, strict=True)
    return {tuple(map(str, key)): tuple(row) for key, row in rows}


def test_tables_1_and_2_equal_the_copy():
    copy = copy_of("accuracy_ppl.csv").assign(method=lambda f: f.method.map(LABELS))
    keys = ["table", "model", "bits", "method", "task"]
    assert as_dict(paper.accuracy(), keys, ["value"]) == as_dict(copy, keys, ["value"])


def test_table_3_equals_the_copy():
    copy = copy_of("efficiency.csv").assign(method=lambda f: f.method.map(LABELS))
    keys, values = ["model", "bits", "method", "task"], ["model_gb", "gflops", "relative"]
    assert as_dict(paper.efficiency(), keys, values) == as_dict(copy, keys, values)


def test_table_4_equals_the_copy():
    keys, values = ["model", "entropy_loss", "theta", "task"], ["value", "execution_ratio"]
    assert as_dict(paper.ablation(), keys, values) == as_dict(copy_of("ablation.csv"), keys, values)


def test_shapes_of_the_tables():
    assert len(paper.accuracy()) == 2 * 9 * 10
    assert len(paper.efficiency()) == 2 * 9 * 3
    assert len(paper.ablation()) == 2 * 4 * 3


def test_averages_agree_in_table_1_but_for_4_bit_qtale():
    frame = paper.recomputed_averages()
    off = frame[(frame.table == "table1") & (frame.difference.abs() > 0.011)]
    columns = ["bits", "method", "printed", "recomputed"]
    assert off[columns].values.tolist() == [[4, "qtale", 79.18, 79.35]]


def test_averages_of_table_2_are_about_3_points_above_the_printed():
    frame = paper.recomputed_averages()
    assert frame[frame.table == "table2"].difference.between(3.0, 3.6).all()


def test_arithmetic_names_the_slips_of_tables_3_and_4():
    notes = paper.arithmetic().set_index("where")["recomputed from the printed columns"]
    assert notes["table3, LLaMA2-7B, 4 bits, D-LLM, CSQA, relative"] == 0.55
    assert notes["table3 against R_avg of table4, LLaMA2-7B, 4 bits, D-LLM, MMLU"] == 0.55
    assert any("Full - QTALE" in where and "8B" in where for where in notes.index)


def test_a_number_that_is_not_printed_is_a_key_error():
    assert paper.printed("LLaMA2-7B", 4, "qtale", "avg") == 79.18
    with pytest.raises(KeyError, match="2 bits"):
        paper.printed("LLaMA2-7B", 2, "qtale", "avg")
