"""Streamed from files to files, a model is quantized to the same numbers as in memory, in little memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_models import make_model, route, run
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import TOKENIZER, WORDS
from small_run import profile, save_base
from streaming_memory import LENGTH, SHAPE, TEXTS, write_random_llama
from transformers import AutoModelForCausalLM, LlamaConfig

from qtale_lib import stages
from qtale_lib.adaptive import RouterConfig, add_routers, load_routed, save_routed, set_threshold
from qtale_lib.base import find_base, load_tokenizer
from qtale_lib.data import load_task
from qtale_lib.data.prompts import render
from qtale_lib.errors import UserError
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab, run_spec
from qtale_lib.quantization import quantize, save_search, streaming
from qtale_lib.quantization.packed import pack
from qtale_lib.quantization.packed_files import load_packed, save_packed
from qtale_lib.quantization.report import TENSORS
from qtale_lib.quantization.streaming import apply_search_streamed, peak_bytes, quantize_streamed
from qtale_lib.streamed_model import StreamedModel

WORDY = [" ".join(WORDS[(7 * k + i) % len(WORDS)] for i in range(4 + k)) for k in range(10)]
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rounded(model):
    """The model with every weight but the routers' rounded to bfloat16."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." not in name:
                parameter.copy_(parameter.to(torch.bfloat16))
    return model.eval()


def sharded(model, folder):
    """The model's folder, its weights over several files."""
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def packed_tensors(folder):
    return {name: t for path in folder.glob("packed*.safetensors") for name, t in load_file(path).items()}


def assert_same(folder, other):
    """Two folders of packed models hold the same, bit for bit, but for how tensors are spread over files."""
    tensors, others = packed_tensors(folder), packed_tensors(other)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    records = [json.loads((place / "packed.json").read_text()) for place in (folder, other)]
    for record in records:
        del record["sha256"]
    assert records[0] == records[1]
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, other)]
    assert configs[0] == configs[1]


def in_memory(model, folder, tokenizer, texts, **settings):
    """The whole model quantized in memory and saved; returns its report."""
    report = quantize(model, tokenizer, texts, **settings).quantization
    save_packed(pack(model), folder, tokenizer)
    return report


def assert_same_search(report, other):
    assert report.as_dict() == other.as_dict()
    for kind in TENSORS:
        found, expected = getattr(report, kind), getattr(other, kind)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


# --- the model read from files


def embedded_run(folder, dtype):
    """A saved run on the embedded base: routers at θ 0.7 and LoRA on every linear."""
    model = AutoModelForCausalLM.from_pretrained(find_base("microworld"), dtype=dtype)
    torch.manual_seed(0)
    add_routers(model, RouterConfig(hidden=8, bypass_bias=0.0, execute_bias=0.0))
    for layer in model.model.layers[2:]:
        torch.nn.init.normal_(layer.router.score.weight, std=2.0)
    set_threshold(model, 0.7)
    lora = LoraConfig(r=2, target_modules=EVERY_LINEAR, init_lora_weights=False)
    save_routed(get_peft_model(model, lora), folder, base="microworld")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_read_weight_by_weight_is_the_run_merged_by_peft(dtype, tmp_path):
    streamed = StreamedModel(embedded_run(tmp_path, dtype))
    found, expected = dict(streamed.tensors()), rounded(load_routed(tmp_path).merge_and_unload()).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    whole = streamed.whole()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        merged = rounded(load_routed(tmp_path).merge_and_unload())
        assert torch.equal(whole(ids).logits, merged(ids).logits)
    assert not whole.training
    assert whole.model.routing.theta == 0.7


def test_a_whole_saved_run_is_read_too(tmp_path):
    model = make_model(routed=True)
    save_routed(model, tmp_path)
    found = dict(StreamedModel(tmp_path).tensors())
    assert all(torch.equal(found[name], t) for name, t in rounded(model).state_dict().items())


def test_only_what_is_loaded_has_weights(tmp_path):
    streamed = StreamedModel(sharded(make_model(), tmp_path))
    with streamed.loaded("model.layers.1", "model.norm"):
        there = {name for name, p in streamed.model.named_parameters() if not p.is_meta}
        assert there
        assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in there)
    assert all(p.is_meta for p in streamed.model.parameters())


def test_a_base_that_is_another_or_lacks_weights_is_refused(tmp_path):
    base, run_folder = sharded(make_model(seed=1), tmp_path / "base"), tmp_path / "run"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    save_routed(model, run_folder)
    path = next(base.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not the one trained on"):
        StreamedModel(run_folder)
    save_file({key: t for key, t in tensors.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is missing"):
        StreamedModel(run_folder)


# --- the same numbers


def questions(count):
    rendered = [render(example, "compact") for example in load_task("piqa", "train")[:count]]
    return [f"{text.prompt} {text.target}" for text in rendered]


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("routed", [False, True])
def test_the_embedded_base_gets_the_numbers_of_memory(routed, bits, tmp_path):
    if routed:
        source = embedded_run(tmp_path / "run", torch.float32)
        model = rounded(load_routed(source).merge_and_unload())
        set_threshold(model, 0.5)
    else:
        source = find_base("microworld")
        model = rounded(AutoModelForCausalLM.from_pretrained(source))
    tokenizer, settings = load_tokenizer(find_base("microworld")), {"bits": bits, "group_size": -1}
    expected = in_memory(model, tmp_path / "memory", tokenizer, questions(20), **settings)
    streamed = StreamedModel(source)
    if routed:
        set_threshold(streamed.model, 0.5)
    found = quantize_streamed(streamed, tmp_path / "streamed", tokenizer, questions(20), **settings)
    assert_same_search(found, expected)
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert len(list((tmp_path / "streamed").glob("packed*.safetensors"))) == 11
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = [load_packed(tmp_path / name)(ids).logits for name in ("streamed", "memory")]
    assert torch.equal(*logits)
    assert found.threshold == (0.5 if routed else None)


@pytest.mark.parametrize("lm_head_bits", [16, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "method"), [("llama", "rtn"), ("mistral", "awq"), ("qwen2", "gptq")])
def test_heads_families_and_rounding(family, method, tied, lm_head_bits, tmp_path):
    model = make_model(family, tied=tied, dtype=torch.bfloat16)
    source = sharded(model, tmp_path / "base")
    settings = {"method": method, "bits": 4, "group_size": 32, "lm_head_bits": lm_head_bits}
    texts = None if method == "rtn" else WORDY
    expected = in_memory(model, tmp_path / "memory", TOKENIZER, texts, **settings)
    streamed = StreamedModel(source)
    found = quantize_streamed(streamed, tmp_path / "streamed", TOKENIZER, texts, **settings)
    assert_same_search(found, expected)
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert torch.equal(run(load_packed(tmp_path / "streamed"))[0], run(load_packed(tmp_path / "memory"))[0])


def test_layers_of_two_kinds_of_attention_are_each_called_as_the_decoder_does(tmp_path):
    kinds = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}
    model = make_model("qwen2", **kinds)
    assert len(set(model.config.layer_types)) == 2
    source = sharded(rounded(model), tmp_path / "base")
    streamed = StreamedModel(source)
    rows = [list(range(20)), list(range(30, 65))]
    batches = streaming._entered(streamed, rows)
    for i in range(4):
        with streamed.loaded(f"model.layers.{i}"), torch.no_grad():
            streaming.pass_layer(streamed.model, i, batches)
    with torch.no_grad():
        for row, hidden in zip(rows[::-1], batches[0].hidden, strict=True):
            every = model(torch.tensor([row]), output_hidden_states=True).hidden_states
            norm = model.model.norm(hidden[: len(row)])
            assert torch.allclose(norm, every[-1][0], atol=1e-5)


def test_a_layer_that_no_token_chooses_is_named(tmp_path):
    model = route(make_model())
    torch.nn.init.zeros_(model.model.layers[3].router.score.weight)
    with torch.no_grad():
        model.model.layers[3].router.score.bias.copy_(torch.tensor([-9.0, 9.0]))
    save_routed(model, tmp_path / "run")
    streamed = StreamedModel(tmp_path / "run")
    settings = {"bits": 3, "group_size": 32}
    found = quantize_streamed(streamed, tmp_path / "streamed", TOKENIZER, WORDY, **settings)
    assert found.unchosen_layers == [3]
    assert_same_search(found, in_memory(rounded(model), tmp_path / "memory", TOKENIZER, WORDY, **settings))
    assert_same(tmp_path / "streamed", tmp_path / "memory")


def test_a_kept_search_is_applied_without_calibration(tmp_path):
    source = sharded(make_model(dtype=torch.bfloat16), tmp_path / "base")
    found = quantize_streamed(StreamedModel(source), tmp_path / "first", TOKENIZER, WORDY, group_size=32)
    save_search(found, tmp_path / "search")
    again = apply_search_streamed(StreamedModel(source), tmp_path / "search", tmp_path / "again", TOKENIZER)
    assert_same_search(again, found)
    assert_same(tmp_path / "again", tmp_path / "first")
    other = sharded(make_model(dtype=torch.bfloat16, seed=1), tmp_path / "other")
    with pytest.raises(UserError, match="another model"):
        apply_search_streamed(StreamedModel(other), tmp_path / "search", tmp_path / "again", TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"group_size": 5}, "group size 5"), ({"bits": 5}, "bits is 5"), ({"texts": None}, "AWQ calibrates")],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    streamed = StreamedModel(sharded(make_model(), tmp_path / "base"))
    with pytest.raises(UserError, match=message):
        quantize_streamed(
            streamed, tmp_path / "out", TOKENIZER, **{"texts": WORDY, "group_size": 32} | settings
        )
    assert not (tmp_path / "out").exists()


# --- killed and gone on with


def test_a_killed_quantization_goes_on_with_the_next_layer(tmp_path, monkeypatch):
    source = sharded(make_model(routed=False), tmp_path / "base")
    settings = {"bits": 3, "group_size": 32}
    quantize_streamed(StreamedModel(source), tmp_path / "whole", TOKENIZER, WORDY, **settings)
    searched, search = [], streaming.search_in_layer

    def dying(model, i, *args):
        if i == 2 and i not in searched:
            searched.append(i)
            raise KeyboardInterrupt
        searched.append(i)
        search(model, i, *args)

    monkeypatch.setattr(streaming, "search_in_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_streamed(StreamedModel(source), tmp_path / "out", TOKENIZER, WORDY, **settings)
    with pytest.raises(UserError, match=r"no packed\.json"):
        load_packed(tmp_path / "out")
    quantize_streamed(StreamedModel(source), tmp_path / "out", TOKENIZER, WORDY, **settings)
    assert searched == [0, 1, 2, 2, 3]
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / streaming.PARTS).exists()


@pytest.mark.parametrize("changed", [{"bits": 4}, {"texts": WORDY[:5]}, {"seed": 1}])
def test_layers_of_another_quantization_are_not_gone_on_with(changed, tmp_path, monkeypatch):
    seed = changed.pop("seed", 0)
    settings = {"bits": 3, "group_size": 32, "texts": WORDY}
    first, other = (sharded(make_model(seed=s), tmp_path / f"base{s}{n}") for n, s in enumerate((0, seed)))
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "finish_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize_streamed(StreamedModel(first), tmp_path / "out", TOKENIZER, **settings)
    for folder in ("out", "fresh"):
        quantize_streamed(StreamedModel(other), tmp_path / folder, TOKENIZER, **settings | changed)
    assert_same(tmp_path / "out", tmp_path / "fresh")


def test_a_missing_or_damaged_file_of_several_is_named(tmp_path):
    quantize_streamed(StreamedModel(sharded(make_model(), tmp_path / "base")), tmp_path / "out", method="rtn",
                      group_size=32)  # fmt: skip
    path = tmp_path / "out" / "packed-00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"packed-00002\.safetensors is missing"):
        load_packed(tmp_path / "out")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"packed-00002\.safetensors is not the file"):
        load_packed(tmp_path / "out")


# --- memory


def child(folder, out, megabytes, how):
    command = [
        sys.executable,
        str(Path(__file__).parent / "streaming_memory.py"),
        folder,
        out,
        megabytes,
        how,
    ]
    # else the C library keeps up to 64 MiB of what is freed: little beside a real model, much beside this one
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


LIMIT, SLACK = 48, 1.2  # MiB; measured peak over the predicted one


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells and limits memory")
def test_a_model_larger_than_the_memory_is_quantized_in_it(tmp_path):
    config = LlamaConfig(**SHAPE, num_hidden_layers=64)
    size = write_random_llama(tmp_path / "base", config)
    assert size > 2 * LIMIT * 2**20
    refused = child(tmp_path / "base", tmp_path / "out", LIMIT, "whole")
    assert "memory" in refused.stderr  # the limit is one
    done = child(tmp_path / "base", tmp_path / "out", LIMIT, "streamed")
    assert done.returncode == 0, done.stderr
    predicted = peak_bytes(config, len(TEXTS) * LENGTH)
    added = json.loads(done.stdout)["added"]
    print({"file": size, "limit": LIMIT * 2**20, "added": added, **predicted})
    assert added < SLACK * predicted["peak"]
    with safe_open(tmp_path / "out" / "packed-00063.safetensors", "pt") as file:
        assert "model.layers.63.mlp.down_proj.codes" in file.keys()  # noqa: SIM118
    assert load_packed(tmp_path / "out").quantization.as_dict()["bits"] == 4


def test_the_predicted_peak_is_made_of_what_is_held():
    config = LlamaConfig(**SHAPE, num_hidden_layers=8)
    found, deeper = peak_bytes(config, 100), peak_bytes(LlamaConfig(**SHAPE, num_hidden_layers=80), 100)
    assert found == deeper  # depth costs nothing
    assert found["embeddings"] == 2 * (2 * 2000 * 256 + 256)
    assert found["layer"] == 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 768 + 2 * 256)
    assert found["moments"] == 4 * (3 * 256**2 + 2 * 768**2)
    wordy = peak_bytes(LlamaConfig(**SHAPE | {"vocab_size": 128_000}, num_hidden_layers=8), 100)
    assert wordy["peak"] == wordy["embeddings"] + 128_000 * 256 * 2 + 100 * 256 * 2 > found["peak"]


# --- a large base's way through the stages


def test_a_large_base_goes_from_files_to_files_and_its_results_are_those_of_memory(tmp_path, monkeypatch):
    chosen = profile(save_base(tmp_path / "base"), tasks=["arc_easy"], methods=["qtale"], bits=[3])
    asked = Run("arc_easy", "qtale", 0)
    memory, files = (Lab(chosen, tmp_path / name) for name in ("memory", "files"))
    stages.finetune_run(memory, asked, lambda *_: None)
    shutil.copytree(memory.directory, files.directory)
    stages.evaluate_run(memory, asked, 3, lambda *_: None)
    monkeypatch.setattr(stages, "STREAMED_FROM", memory.model_bytes())
    monkeypatch.setattr(stages, "quantize", None)
    stages.evaluate_run(files, asked, 3, lambda *_: None)
    for kind, more in (("quantization", {}), ("threshold", {}), ("evaluation", {"theta": "searched"})):
        found, expected = (lab.result(kind, **run_spec(asked, bits=3, **more)) for lab in (files, memory))
        assert found["key"] == expected["key"]
        assert found["value"] == expected["value"]
    search = files.files("quantization", run_spec(asked, bits=3))
    assert {path.name for path in search.iterdir()} == {"search.json", "search.safetensors"}
    again, _ = stages.prepared_model(files, asked, 3)  # by the search that is kept
    stages.write_packed(files, asked, 3, tmp_path / "out")
    written = load_packed(tmp_path / "out")
    assert written.model.routing.theta == files.theta(run_spec(asked, bits=3, theta="searched"))
    set_threshold(again, written.model.routing.theta)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, written(ids).logits)


def test_autoawq_cannot_quantize_a_large_base(tmp_path, monkeypatch):
    chosen = profile(save_base(tmp_path / "base"), quantization={"backend": "autoawq"})
    asked, lab = Run("arc_easy", "full", 0), Lab(chosen, tmp_path)
    stages.finetune_run(lab, asked, lambda *_: None)
    monkeypatch.setattr(stages, "STREAMED_FROM", 0)
    with pytest.raises(UserError, match=r"backend .* must be native"):
        stages.prepared_model(lab, asked, 4)
