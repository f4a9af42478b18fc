"""A real Llama of 0.26 M parameters on real benchmarks, from fine-tuning to text, by ordinary commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.preflight import check
from qtale_lib.provenance import ROOT

DATA, MODELS = os.environ.get("QTALE_TEST_DATA"), os.environ.get("QTALE_TEST_MODELS")
pytestmark = pytest.mark.skipif(
    not (DATA and MODELS), reason="QTALE_TEST_DATA and QTALE_TEST_MODELS do not name the folders"
)
SMALLER = {
    "extends": str(ROOT / "qtale_lib" / "profiles" / "stories260k.yaml"),
    "bits": [16, 4],
    "max_steps": 3,
    "limit": {"train": 24, "calibration": 6, "test": 8},
    "max_length": 128,
    "calibration": {"coarse_step": 0.25, "fine_step": 0.25, "questions": 6},
    "probes": {"samples": 4},
    "quantization": {"calibration_texts": 4},
}


def lab(folder: Path, monkeypatch, **changes) -> Lab:
    monkeypatch.setenv("QTALE_MODELS_DIR", MODELS)
    return Lab(load_profile("stories260k", data_dir=DATA, **changes), folder)


@pytest.mark.parametrize(("size", "fits"), [(128, False), (8, False), (4, True), (-1, True)])
def test_only_4_divides_its_widths_and_one_group_per_row_always_does(size, fits, tmp_path, monkeypatch):
    made = lab(tmp_path, monkeypatch, group_size=size, tasks=["arc_easy"])
    if fits:
        check(made, all_jobs(made.profile))
        return
    with pytest.raises(UserError, match=rf"\(= {size}\) does not divide .*use a divisor of 4, or -1"):
        check(made, all_jobs(made.profile))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_story_from_one_command_at_a_smaller_size(tmp_path):
    profile = tmp_path / "story.yaml"
    profile.write_text(yaml.safe_dump(SMALLER))
    places = {"QTALE_RESULTS_DIR": tmp_path / "results", "QTALE_FIGURES_DIR": tmp_path / "figures",
              "QTALE_MODELS_DIR": MODELS, "QTALE_DATA_DIR": DATA, "PYTHONPATH": ROOT}  # fmt: skip

    def command(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "qtale_lib", *words, "--profile", str(profile)],
            cwd=tmp_path, env={**os.environ, **{name: str(place) for name, place in places.items()}},
            capture_output=True, text=True, timeout=1500, check=False,
        )  # fmt: skip

    ran = command("run")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"[1-9]\d* jobs, 0 there already", ran.stdout)
    prompt = "Once upon a time"
    for words in (["full"], ["qtale", "--bits", "4", "--theta", "0.5"], ["dllm", "--bits", "4"]):
        made = command("generate", "alpaca", *words, "--prompt", prompt, "--tokens", "12")
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith(prompt) and len(made.stdout.strip()) > len(prompt)
        assert ("execution ratio" in made.stderr) == (words != ["full"])
    refused = command("generate", "alpaca", "full", "--theta", "0.5", "--prompt", prompt)
    assert refused.returncode == 2 and "has no routers" in refused.stderr
