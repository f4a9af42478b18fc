"""What a result was made from is in its key: a change makes exactly what depends on it be computed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pool_work import run_here
from safetensors.torch import load_file, save_file
from small_run import profile, save_base

from qtale_lib import lab as lab_module
from qtale_lib import stages
from qtale_lib.errors import DamagedError
from qtale_lib.jobs import Job, Run, all_jobs
from qtale_lib.lab import KEPT_VERSIONS, Lab, run_spec
from qtale_lib.provenance import PACKAGES, versions
from qtale_lib.quantization.report import load_search
from qtale_lib.store import discard, file_digest

RUN = Run("arc_easy", "qtale", 0)
RESULTS = {
    "finetune": ("finetune", run_spec(RUN)),
    "quantization": ("quantization", run_spec(RUN, bits=4)),
    "threshold": ("threshold", run_spec(RUN, bits=4)),
    "evaluation": ("evaluation", run_spec(RUN, bits=4, theta="argmax")),
    "evaluation at 16": ("evaluation", run_spec(RUN, bits=16, theta="argmax")),
}
TRAINED = {"value": {"adapter_sha256": "a", "theta": 0.2}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def question(index: int, split: str) -> dict:
    choices = {"text": ["it", "all"], "label": ["A", "B"]}
    return {"id": f"{split}{index}", "question": f"{split} {index}?", "choices": choices, "answerKey": "A"}


@pytest.fixture
def data(tmp_path) -> Path:
    for split in ("train", "validation", "test"):
        rows = [json.dumps(question(index, split)) for index in range(40)]
        (tmp_path / "data" / "arc_easy").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "arc_easy" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "data"


def keys(root: Path, *places: Path, **changes) -> dict[str, str]:
    """The key of each kind of result, the fine-tuning and the θ search taken as done."""
    lab = Lab(profile(places[0], **changes), root)
    lab.find = lambda kind, **spec: TRAINED
    return {name: lab.address(kind, spec)[2] for name, (kind, spec) in RESULTS.items()}


def changed_by(change: Callable[[], None], *arguments, **settings) -> set[str]:
    before = keys(*arguments, **settings)
    change()
    after = keys(*arguments, **settings)
    return {name for name in before if before[name] != after[name]}


@pytest.mark.filterwarnings("ignore:.*published file has")
@pytest.mark.parametrize(
    ("split", "stale"),
    [
        ("train", {"finetune", "quantization", "threshold", "evaluation"}),  # θ's questions are cut from it
        ("test", {"evaluation", "evaluation at 16"}),
        ("validation", set()),
    ],
)
def test_a_changed_data_file(tmp_path, base, data, split, stale):
    settings = {"data_dir": str(data), "limit": {"train": None, "calibration": None, "test": None}}

    def change() -> None:
        path = data / "arc_easy" / f"{split}.jsonl"
        path.write_text(path.read_text().replace(f"{split} ", "other "))

    assert changed_by(change, tmp_path, base, **settings) == stale


def test_a_changed_base(tmp_path):
    own = save_base(tmp_path / "base")

    def change() -> None:
        tensors = load_file(own / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, own / "model.safetensors", {"format": "pt"})

    assert changed_by(change, tmp_path / "results", own) == set(RESULTS)


@pytest.mark.parametrize("what", ["adapter_sha256", "theta"])
def test_a_changed_adapter_or_threshold(tmp_path, base, what, monkeypatch):
    other = {"value": {**TRAINED["value"], what: 0.3}}

    def change() -> None:
        monkeypatch.setitem(TRAINED, "value", other["value"])

    stale = set(RESULTS) - {"finetune"} if what == "adapter_sha256" else set()  # arg max is no searched θ
    assert changed_by(change, tmp_path, base) == stale


@pytest.mark.parametrize(
    ("library", "protocol", "stale"),
    [
        ("torch", "likelihood", set(RESULTS)),
        ("transformers", "likelihood", set(RESULTS)),
        ("peft", "likelihood", set(RESULTS)),
        ("accelerate", "likelihood", {"finetune"}),
        ("lm_eval", "lm_eval", {"evaluation", "evaluation at 16"}),
        ("lm_eval", "likelihood", set()),
        ("numpy", "likelihood", set()),
    ],
)
def test_another_version_of_a_library(tmp_path, base, monkeypatch, library, protocol, stale):
    def change() -> None:
        other = {**versions(), library: "99.0"}
        monkeypatch.setattr(lab_module, "versions", lambda: other)

    assert changed_by(change, tmp_path, base, protocol=protocol) == stale


def test_another_build_of_the_same_version_is_the_same(tmp_path, base, monkeypatch):
    def change() -> None:
        other = {**versions(), "torch": f"{KEPT_VERSIONS['torch']}+cu130"}
        monkeypatch.setattr(lab_module, "versions", lambda: other)

    assert changed_by(change, tmp_path, base) == set()
    assert set(KEPT_VERSIONS) <= set(PACKAGES)


# Files.


@pytest.fixture
def computed(tmp_path, base, monkeypatch) -> Lab:
    monkeypatch.setattr(lab_module, "run_tasks", run_here)
    lab = Lab(profile(base, tasks=["arc_easy"], methods=["qtale"], bits=[4]), tmp_path / "results")
    assert {outcome.status for outcome in lab.compute(all_jobs(lab.profile))} == {"done"}
    return lab


def shift(path: Path) -> None:
    """Alter one value of a file of tensors, as a soundly written file."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + torch.ones_like(tensors[name])
    save_file(tensors, path)


def test_files_that_are_not_the_results_own_are_refused_and_the_reference_is_left_alone(computed, tmp_path):
    reference = computed.directory.parent / "reference" / "smoke" / "results.json"
    reference.parent.mkdir(parents=True)
    reference.write_text("{}")
    before = file_digest(reference), reference.stat().st_mtime_ns

    search = computed.files("quantization", run_spec(RUN, bits=4))
    report = load_search(search)
    assert report.scales
    shift(search / "search.safetensors")
    with pytest.raises(DamagedError, match="does not belong to"):
        load_search(search)
    (search / "search.json").write_text("{")
    with pytest.raises(DamagedError, match="damaged or of another version"):
        load_search(search)

    weights = computed.files("finetune", run_spec(RUN))
    assert stages.weights_of(computed, RUN) == weights
    shift(weights / "adapter_model.safetensors")
    with pytest.raises(DamagedError, match="are not those that were trained"):
        stages.weights_of(computed, RUN)
    computed.forget([Job(RUN, 4)])
    (failed,) = computed.compute(all_jobs(computed.profile))
    assert failed.status == "failed" and "are not those that were trained" in failed.error

    computed.forget(all_jobs(computed.profile))
    assert {outcome.status for outcome in computed.compute(all_jobs(computed.profile))} == {"done"}
    discard(computed.directory)
    assert (file_digest(reference), reference.stat().st_mtime_ns) == before
