"""The paper's numbers: equal to an independent copy of the tables."""

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


def test_a_number_that_is_not_printed_is_a_key_error():
    assert paper.printed("LLaMA2-7B", 4, "qtale", "avg") == 79.18
    with pytest.raises(KeyError, match="2 bits"):
        paper.printed("LLaMA2-7B", 2, "qtale", "avg")
