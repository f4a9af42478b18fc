"""The exact grader knows every reference response for right, and what is changed in it for wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_lib.data import load_task
from qtale_lib.data.microworld.grading import _values, grade

EXAMPLES = load_task("alpaca", "test")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_reference_response_is_all_right(split):
    grades = [grade(example, example.response) for example in load_task("alpaca", split)]
    assert all(g.right == g.asked and not g.false for g in grades)


@given(st.data())
def test_another_value_is_false_and_takes_its_fact_alone(data):
    example = data.draw(st.sampled_from(EXAMPLES))
    fact = data.draw(st.sampled_from(example.facts))
    value, others = _values(fact)
    other = data.draw(st.sampled_from(sorted(others)))
    changed = " ".join(other if word.strip(".,") == value else word for word in example.response.split())
    found = grade(example, changed)
    assert found.false >= 1 and found.right <= found.asked - 1


def test_saying_everything_or_speaking_of_another_earns_nothing():
    example = EXAMPLES[0]
    _, others = _values(example.facts[0])
    assert grade(example, f"{example.response} {' '.join(others)}").right < len(example.facts)
    assert grade(example, "Somebody else likes plums.").share == 0
    assert grade(example, "").right == 0
