"""Quantizers, mixed widths and pruning as settings of a profile: keys of their own, results, refusals."""

from __future__ import annotations

import pytest
import torch
from small_run import profile, save_base

from qtale_lib import stages
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run, all_jobs
from qtale_lib.lab import Lab, run_spec
from qtale_lib.preflight import check

RUN = Run("arc_easy", "full", 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A store with one fine-tuning."""
    root = tmp_path_factory.mktemp("results")
    stages.finetune_run(lab_of(base, root), RUN, lambda *_: None)
    return root


def lab_of(base, root, **changes) -> Lab:
    return Lab(
        profile(base, **{"tasks": ["arc_easy"], "methods": ["full"], "bits": [16, 3], **changes}), root
    )


def evaluated(lab: Lab, bits: int) -> dict:
    stages.evaluate_run(lab, RUN, bits, lambda *_: None)
    return lab.result("evaluation", **run_spec(RUN, bits=bits, theta="none"))


def test_pruning_is_in_the_keys_of_evaluations_alone_and_only_where_it_is_done(base, trained):
    plain, pruned = lab_of(base, trained), lab_of(base, trained, bits=[16], pruning={"weights": "wanda 0.5"})
    for kind, spec in (
        ("finetune", run_spec(RUN)),
        ("evaluation", run_spec(RUN, bits=16, theta="none")),
        ("threshold", run_spec(RUN, bits=16)),
    ):
        assert "pruning" not in plain.settings(kind, spec)
        assert ("pruning" in pruned.settings(kind, spec)) == (kind != "finetune")
        same = plain.address(kind, spec) == pruned.address(kind, spec)
        assert same == (kind == "finetune")
    fewer = lab_of(base, trained, pruning={"weights": "wanda 0.5"}, quantization={"calibration_texts": 3})
    spec = run_spec(RUN, bits=16, theta="none")
    assert fewer.address("evaluation", spec) != pruned.address("evaluation", spec)


def test_mixed_widths_and_quantizers_have_keys_of_their_own(base, trained):
    changes = [{}, {"method": "gptq"}, {"method": "magr_gptq"}, {"method": "gptq", "widths": "mixed"}]
    labs = [lab_of(base, trained, quantization=change) for change in changes]
    addresses = {lab.address("quantization", run_spec(RUN, bits=3)) for lab in labs}
    assert len(addresses) == len(changes)
    assert "widths" not in labs[1].settings("quantization", run_spec(RUN, bits=3))["quantization"]


@pytest.mark.parametrize(
    ("pruning", "ratio"),
    [({"layers": "sleb 1"}, 0.75), ({"layers": "block_influence 2"}, 0.5), ({"weights": "wanda 2:4"}, 1.0)],
)
def test_a_pruned_evaluation_says_what_was_done_and_what_ran(base, trained, pruning, ratio):
    value = evaluated(lab_of(base, trained, bits=[16], pruning=pruning), 16)["value"]
    assert value["execution_ratio"] == pytest.approx(ratio)
    ((part, how),) = pruning.items()
    assert value["pruning"][part] == how
    assert "pruning" not in evaluated(lab_of(base, trained), 16)["value"]


def test_a_mixed_model_is_made_again_from_what_the_store_keeps(base, trained):
    lab = lab_of(base, trained, quantization={"method": "gptq", "widths": "mixed"})
    first, _ = stages.prepared_model(lab, RUN, 3)
    kept = lab.result("quantization", **run_spec(RUN, bits=3))["value"]
    assert sum(kept["layer_bits"]) <= 12 and len(kept["layer_bits"]) == 4
    again, _ = stages.prepared_model(lab, RUN, 3)
    assert again.quantization.as_dict() == first.quantization.as_dict() == kept
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_large_base_has_uniform_widths(base, trained, monkeypatch):
    monkeypatch.setattr(stages, "STREAMED_FROM", 0)
    lab = lab_of(base, trained, seeds=[0], quantization={"widths": "mixed", "calibration_texts": 5})
    with pytest.raises(UserError, match=r"quantization\.widths of profile smoke must be uniform"):
        stages.prepared_model(lab, RUN, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": [16, 4], "quantization": {"widths": "mixed"}}, "mixes to 3 bits alone"),
        ({"bits": [4], "pruning": {"weights": "wanda 0.5"}}, "is for models in 16 bits"),
        ({"pruning": {"weights": "wanda 0.5", "layers": "sleb 1"}}, "does not go with pruned weights"),
        ({"methods": ["qtale"], "pruning": {"layers": "sleb 1"}}, "is for models without routers"),
        ({"pruning": {"layers": "block_influence 4"}}, "leaves none of the base's 4 layers"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused_before_any_work(base, tmp_path, changes, said):
    lab = lab_of(base, tmp_path, **{"bits": [16], **changes})
    with pytest.raises(UserError, match=said) as refused:
        check(lab, all_jobs(lab.profile))
    assert str(refused.value).count(". ") == 0
    check(lab, [Job(RUN)])  # a fine-tuning is none of its business
