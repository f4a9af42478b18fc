"""The paper's own arithmetic: what is recomputed, what agrees, and that a slip of one digit shows."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_lib import paper, paper_arithmetic
from qtale_lib.paper import CSQA

PLACES = ["table", "model", "bits", "row", "column"]


def every_way() -> pd.DataFrame:
    return pd.concat([paper_arithmetic.flops(), paper_arithmetic.sizes()])


def off(frame: pd.DataFrame) -> set[tuple]:
    return set(frame[~frame.agrees][PLACES].itertuples(index=False, name=None))


def test_what_does_not_follow_is_known():
    """Found by hand from the copies of the tables."""
    seven, eight = "LLaMA2-7B", "LLaMA3.1-8B"
    methods = ("Full", "D-LLM", "QTALE")
    averages = {("Table 2", eight, bits, method, "CSQA avg.") for bits in (16, 4, 3) for method in methods}
    assert off(paper_arithmetic.checks()) == averages | {
        ("Table 1", seven, 4, "QTALE", "CSQA avg."),
        ("Table 3", seven, 4, "D-LLM", "CSQA relative"),
        ("Table 4", seven, 4, "D-LLM", "MMLU R_avg"),
        ("abstract", eight, 4, "Full − QTALE", "CSQA avg."),
    }


def test_every_number_that_others_determine_is_there_once():
    frame = paper_arithmetic.checks()
    assert not frame.duplicated(PLACES).any()
    counts = {"Table 1": 9, "Table 2": 9, "Table 3": 6 + 18 + 54, "Table 4": 12 + 12, "abstract": 2}
    assert frame.table.value_counts().to_dict() == counts
    tally = paper_arithmetic.tally_table().frame.set_index("table")
    assert tally.printed.to_dict() == {"Table 1": 90, "Table 2": 90, "Table 3": 114, "Table 4": 48}
    assert (tally.determined == tally.agree + tally.differ).all()


def test_averages_of_table_2_are_about_3_points_above_the_printed():
    frame = paper_arithmetic.checks().query("table == 'Table 2'")
    assert frame.difference.between(3.0, 3.6).all()


TABLE_1 = paper.accuracy()
AVERAGES = {("Table 1", "LLaMA2-7B", 4, "QTALE")}  # whose average is off already


@settings(deadline=None, max_examples=60)
@given(row=st.sampled_from(range(9 * len(paper.ACCURACY_COLUMNS))), slip=st.sampled_from([-9, -0.9, 0.9, 9]))
def test_a_slip_of_one_digit_in_table_1_shows(row, slip):
    frame = TABLE_1.copy()
    cell = frame.loc[row]
    frame.loc[row, "value"] += slip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "accuracy", lambda: frame)
        found = paper_arithmetic.checks()
    label = (cell.table.replace("table", "Table "), cell.model, cell.bits, paper.METHODS[cell.method])
    shows = found[found[PLACES[:4]].apply(tuple, axis=1) == label]
    if cell.task in (*CSQA, "avg") and label not in AVERAGES:
        assert not shows.agrees.all()
    if cell.bits == 4 and cell.method != "full" and cell.task in ("avg", "mmlu", "alpaca_ppl"):
        assert len(off(found) - off(paper_arithmetic.checks())) >= 1


def test_table_3_recomputed_to_the_printed_digits():
    """The numbers that follow from the public configs, and which way of counting gives what is printed."""
    frame = every_way().set_index(["model", "quantity", "bits", "counted"])
    seven, eight, flops = "LLaMA2-7B", "LLaMA3.1-8B", "GFLOP per token"
    expected = {
        (seven, flops, 16, "decoder layers"): (12.95, True),
        (seven, flops, 16, "decoder layers and lm_head"): (13.21, False),
        (eight, flops, 16, "decoder layers"): (13.96, False),
        (eight, flops, 16, "decoder layers and lm_head"): (15.01, False),
        (eight, flops, 16, "decoder layers, k and v as if d×d"): (15.57, True),
        (seven, "GiB", 16, "lm_head in 16 bits"): (12.55, True),
        (eight, "GiB", 16, "lm_head in 16 bits"): (14.96, True),
        (seven, "GiB", 4, "lm_head in 16 bits"): (3.62, True),
        (eight, "GiB", 4, "lm_head in 4 bits"): (4.61, True),
        (seven, "GiB", 3, "lm_head in 16 bits"): (2.86, False),
        (seven, "GiB", 3, "lm_head in 16 bits, no steps or zeros"): (2.75, True),
        (eight, "GiB", 3, "lm_head in 3 bits"): (3.73, True),
    }
    found = {key: (round(frame.recomputed[key], 2), bool(frame.agrees[key])) for key in expected}
    assert found == expected
    quantized_8b = every_way().query("model == @eight and quantity == 'GiB' and bits < 16 and agrees")
    assert not any("16" in how for how in quantized_8b.counted)  # the 8B sizes need a quantized lm_head
