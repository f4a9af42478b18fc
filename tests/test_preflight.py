"""What is found before the first worker starts: one sentence with file, key and value, nothing computed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_run import save_base

from qtale_lib import preflight
from qtale_lib.config import load_profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.quantization import apply

SMALL = {"extends": "smoke", "base": "base", "group_size": 32, "tasks": ["arc_easy"]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("sound") / "base")


@pytest.fixture
def base(sound, tmp_path) -> Path:
    """A copy of the base, to be damaged."""
    return shutil.copytree(sound, tmp_path / "base")


def lab_of(folder: Path, text: str = "") -> Lab:
    """The lab of a profile file in the folder that holds the base."""
    settings = {**SMALL, **(yaml.safe_load(text) or {})}
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return Lab(load_profile(folder / "mine.yaml"), folder / "results")


def refusal(lab: Lab) -> str:
    """The sentence, from the lab's own door to the pool; before any work, and without a trace on disk."""
    with pytest.raises(UserError) as refused:
        lab.compute(all_jobs(lab.profile))
    sentence = str(refused.value)
    assert sentence.endswith(".") and "\n" not in sentence and ". " not in sentence
    assert not lab.directory.exists()
    return sentence


def test_a_sound_base_passes_and_nothing_is_written(base, tmp_path):
    lab = lab_of(tmp_path)
    preflight.check(lab, all_jobs(lab.profile))
    assert not lab.directory.exists() and not lab.figures.exists()


def test_the_families_are_those_of_the_quantizer():
    assert preflight.FAMILIES == apply.FAMILIES


def cut(name: str, left: int) -> Callable[[Path], None]:
    """Leaves so many bytes of a file (of its end, if negative)."""

    def damage(base: Path) -> None:
        content = (base / name).read_bytes()
        (base / name).write_bytes(content[:left])

    return damage


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda base: (base / name).write_text(text)


def configured(**changes) -> Callable[[Path], None]:
    """Values of config.json changed, or removed where None."""

    def damage(base: Path) -> None:
        config = {**json.loads((base / "config.json").read_text()), **changes}
        (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def lose(name: str) -> Callable[[Path], None]:
    return lambda base: (base / name).unlink()


def shard(base: Path) -> None:
    """An index of two parts, of which one is there."""
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


ANEW = "; copy or download it anew."
WHOLE = "must be a whole number of at least 1."


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut("config.json", 20), "{base}/config.json is not readable as a JSON object" + ANEW),
        (put("config.json", "[]"), "{base}/config.json is not readable as a JSON object" + ANEW),
        (lose("config.json"), "holds no config.json"),
        (configured(model_type="gpt2"),
         '{base}/config.json: model_type (= "gpt2") must be one of llama, mistral, qwen2, qwen3.'),
        (configured(model_type=None), "model_type (= null) must be one of llama"),
        (configured(intermediate_size=None), "{base}/config.json: intermediate_size (= null) " + WHOLE),
        (configured(num_attention_heads=0), "{base}/config.json: num_attention_heads (= 0) " + WHOLE),
        (lose("model.safetensors"), "{base} holds no model.safetensors; "),
        (shard, "{base} holds no model-2.safetensors; "),
        (cut("model.safetensors", -100), "{base}/model.safetensors is no readable safetensors file ("),
        (cut("model.safetensors", 50), "{base}/model.safetensors is no readable safetensors file ("),
        (cut("model.safetensors", 0), "{base}/model.safetensors is no readable safetensors file ("),
        (put("model.safetensors", "version https://git-lfs.github.com/spec/v1\n" * 3),
         "{base}/model.safetensors is no readable safetensors file ("),
        (lose("tokenizer.json"),
         "{base} holds no tokenizer; save one there: tokenizer.json, or tokenizer.model, or vocab.json "),
        (cut("tokenizer.json", 100), "{base}/tokenizer.json is no readable tokenizer ("),
    ],
)  # fmt: skip
def test_a_damaged_base_is_refused(base, tmp_path, damage, complaint):
    lab = lab_of(tmp_path)
    damage(base)
    sentence = refusal(lab)
    assert sentence.startswith(f'{tmp_path}/mine.yaml: base (= "{base}") cannot be used: ')
    assert complaint.format(base=base) in sentence


@pytest.mark.parametrize("damage", [cut("config.json", 20), cut("model.safetensors", -100), shard])
def test_reading_results_of_a_damaged_base_is_refused_in_a_sentence_too(base, tmp_path, damage):
    damage(base)
    with pytest.raises(UserError, match="anew"):
        lab_of(tmp_path).base()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("routing: {always_run_layers: 4}",
         "routing.always_run_layers (= 4) leaves none of the base's 4 layers to route; lower it to at most "
         "3."),
        ("lora: {target_modules: [q_proj, qproj]}",
         'lora.target_modules (= ["q_proj", "qproj"]) holds "qproj", which is no linear layer of the base; '
         "there are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."),
        ("lora: {target_modules: [proj]}", 'holds "proj", which is no linear layer'),
        ("lora: {target_modules: [embed_tokens]}", 'holds "embed_tokens", which is no linear layer'),
        ("max_length: 257",
         "max_length (= 257) is above the base's max_position_embeddings; lower it to 256."),
        ("max_length: 5",
         "max_length (= 5) is too short for every training row of arc_easy; raise it, or set overlong: cut."),
        ("max_length: 1\noverlong: cut",
         "max_length (= 1) is too short for every training row of arc_easy; raise it."),
        ("group_size: 24",
         "group_size (= 24) does not divide the 32 columns of a layer of the base; use a divisor of 32, or "
         "-1 for one group per row."),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_the_base_is_refused(base, tmp_path, text, complaint):
    sentence = refusal(lab_of(tmp_path, text))
    assert sentence.startswith(f"{tmp_path}/mine.yaml: ") and complaint in sentence


@pytest.mark.parametrize(
    "text",
    [
        "methods: [full]\nrouting: {always_run_layers: 4}",
        "lora: {target_modules: [self_attn.q_proj, lm_head]}",
        "max_length: 20\noverlong: cut",
        "bits: [16]\ntraining: {epochs: 3}",
    ],
)
def test_what_fits_is_not_refused(base, tmp_path, text):
    lab = lab_of(tmp_path, text)
    preflight.check(lab, all_jobs(lab.profile))


def test_the_key_of_an_override_is_named_with_its_source(base, tmp_path):
    lab_of(tmp_path)
    lab = Lab(load_profile(tmp_path / "mine.yaml", max_length=1000), tmp_path / "results")
    assert refusal(lab).startswith("command line or call: max_length (= 1000) ")
    inherited = lab.profile.refusal("training.lr", "is odd")
    assert str(inherited).endswith("profiles/tiny.yaml: training.lr (= 0.001) is odd.")


def test_missing_data_are_found_for_every_task_and_split(base, tmp_path, monkeypatch):
    lab = lab_of(tmp_path)
    asked = []
    monkeypatch.setattr(lab, "examples", lambda *pair: asked.append(pair) or Lab.examples(lab, *pair))
    preflight.check(lab, all_jobs(lab.profile))
    assert {("arc_easy", split) for split in ("train", "calibration", "test")} <= set(asked)
    (tmp_path / "data").mkdir()
    assert str(tmp_path / "data") in refusal(lab_of(tmp_path, "data_dir: data"))


@pytest.mark.parametrize("variable", ["QTALE_RESULTS_DIR", "QTALE_FIGURES_DIR"])
def test_a_folder_that_cannot_be_written_to_is_refused(base, tmp_path, monkeypatch, variable):
    (tmp_path / "file").write_text("")
    lab_of(tmp_path)
    monkeypatch.setenv("QTALE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    sentence = refusal(Lab(load_profile(tmp_path / "mine.yaml")))
    assert sentence.startswith(f"{tmp_path}/file/mine cannot be written to (Not a directory); ")
    assert variable in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(base, tmp_path):
    lab = lab_of(tmp_path)
    lab.directory.parent.mkdir(mode=0o500)
    assert "cannot be written to (Permission denied)" in refusal(lab)
    assert lab.base()["parameters"]["total"] > 0
