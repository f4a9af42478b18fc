"""A routed model saved is the model loaded, on logits and on routes; what does not fit is refused."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adaptive import make_base, make_routed, run, tokens
from transformers import AutoModelForCausalLM

from qtale_lib import adaptive
from qtale_lib.adaptive import (
    RouterConfig,
    add_routers,
    load_routed,
    routing_state,
    save_routed,
    set_threshold,
)
from qtale_lib.base import find_base
from qtale_lib.errors import UserError

LORA = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path):
    """Folder of a base model."""
    folder = tmp_path / "base"
    make_base(tie_word_embeddings=request.param).save_pretrained(folder)
    return folder


def routed(base, router=None):
    """The base from its folder with routers that bypass, and LoRA that matters, at θ = 0.6."""
    model = AutoModelForCausalLM.from_pretrained(base)
    add_routers(model, router or RouterConfig(hidden=4, always_run_tokens=3))
    for layer in model.model.layers[2:]:
        torch.nn.init.normal_(layer.router.score.weight, std=1.5)
        torch.nn.init.zeros_(layer.router.score.bias)
    set_threshold(model, 0.6)
    return get_peft_model(model, LoraConfig(**LORA)).eval()


def same(first, second):
    (a, routes), (b, others) = run(first, tokens()), run(second, tokens())
    assert 0.2 < routes.executed[2:].float().mean() < 0.99
    return torch.equal(a, b) and torch.equal(routes.executed, others.executed)


def test_adapter_saved_is_adapter_loaded(base, tmp_path):
    model = routed(base)
    save_routed(model, tmp_path / "saved")
    loaded = load_routed(tmp_path / "saved")
    assert same(model, loaded)
    assert not loaded.training
    assert routing_state(loaded).theta == 0.6
    assert routing_state(loaded).config == RouterConfig(hidden=4, always_run_tokens=3)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    saved_bytes = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert saved_bytes < (base / "model.safetensors").stat().st_size  # the base is not in it
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}


def test_merged_model_is_saved_whole(base, tmp_path):
    model = routed(base).merge_and_unload()
    save_routed(model, tmp_path / "saved")
    (base / "model.safetensors").unlink()
    loaded = load_routed(tmp_path / "saved")
    assert same(model, loaded)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (
        tied == (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_is_saved_whole(family, tmp_path):
    model = make_routed(family, double=False)
    save_routed(model, tmp_path)
    assert same(model, load_routed(tmp_path))


def test_bfloat16_weights_and_float32_routers_come_back_as_they_were(tmp_path):
    model = make_routed(double=False).to(torch.bfloat16)
    save_routed(model, tmp_path / "first")
    loaded = load_routed(tmp_path / "first")
    assert loaded.model.layers[2].mlp.up_proj.weight.dtype == torch.bfloat16
    assert loaded.model.layers[2].router.score.weight.dtype == torch.float32
    for (name, weight), (_, other) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    save_routed(loaded, tmp_path / "second")
    assert same(loaded, load_routed(tmp_path / "second"))


def test_a_model_without_routers_goes_the_same_way(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA)).eval()
    save_routed(model, tmp_path / "saved", base=str(base))
    loaded = load_routed(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert not any(".router." in name for name, _ in loaded.named_parameters())


def test_saving_again_in_the_same_folder_leaves_nothing_stale(base, tmp_path):
    model = routed(base)
    save_routed(model, tmp_path / "saved")
    merged = model.merge_and_unload()
    save_routed(merged, tmp_path / "saved")
    assert same(merged, load_routed(tmp_path / "saved"))


@pytest.mark.parametrize("file", [adaptive.ROUTERS, adaptive.ADAPTER])
def test_missing_surplus_and_misshapen_tensors_are_refused(base, tmp_path, file):
    save_routed(routed(base), tmp_path / "saved")
    path = tmp_path / "saved" / file
    tensors = load_file(path)
    name = sorted(tensors)[0]
    wrong = (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {"model.layers.0.router.score.weight": torch.zeros(2, 4)},
        tensors | {name: torch.zeros(1, 1)},
    )
    for changed in wrong:
        save_file(changed, path)
        with pytest.raises(UserError, match=f"{file} does not fit"):
            load_routed(tmp_path / "saved")
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        load_routed(tmp_path / "saved")


def test_missing_weights_of_a_whole_model_are_refused(tmp_path):
    save_routed(make_routed(double=False), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load_routed(tmp_path)


def test_another_base_or_none_is_refused(base, tmp_path):
    save_routed(routed(base), tmp_path / "saved")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="sha256"):
        load_routed(tmp_path / "saved")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="QTALE_MODELS_DIR"):
        load_routed(tmp_path / "saved")
    with pytest.raises(UserError, match=r"routed\.json"):
        load_routed(tmp_path / "elsewhere")


def test_base_is_found_by_path_in_the_models_folder_or_embedded(base, tmp_path, monkeypatch):
    model = routed(base)
    save_routed(model, tmp_path / "saved", base="some/base")
    (tmp_path / "models" / "some").mkdir(parents=True)
    base.rename(tmp_path / "models" / "some" / "base")
    monkeypatch.setenv("QTALE_MODELS_DIR", str(tmp_path / "models"))
    assert same(model, load_routed(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "routed.json").read_text())["base"]["name"] == "some/base"
    assert find_base("microworld").parts[-4:] == ("qtale_lib", "data", "microworld", "base")


def test_what_cannot_be_saved_faithfully_is_refused(base, tmp_path):
    model = routed(base)
    model.merge_adapter()
    with pytest.raises(UserError, match="merged in place"):
        save_routed(model, tmp_path / "saved")
    nameless = get_peft_model(make_routed(double=False), LoraConfig(**LORA))
    with pytest.raises(UserError, match="base="):
        save_routed(nameless, tmp_path / "saved")
    other = get_peft_model(
        make_routed(double=False), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(UserError, match="LoRA"):
        save_routed(other, tmp_path / "saved", base=str(base))


def test_digest_is_of_the_base_alone(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    digest = adaptive.weights_digest(plain)
    assert adaptive.weights_digest(routed(base)) == digest
    with torch.no_grad():
        plain.model.norm.weight[0] += 1e-6
    assert adaptive.weights_digest(plain) != digest
