"""A packed model saved is the model loaded; what does not fit is refused; others read AWQ's layout."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from packed_models import both, make_model, run
from safetensors.torch import load_file, save_file
from small_models import TOKENIZER
from torch import nn
from transformers import AutoConfig
from transformers.utils.quantization_config import AwqConfig

from qtale_lib.adaptive import routing_state, set_threshold
from qtale_lib.errors import UserError
from qtale_lib.quantization import quantize
from qtale_lib.quantization.awq_export import awq_tensors, export_awq
from qtale_lib.quantization.packed import pack, packed_bytes, packed_linears
from qtale_lib.quantization.packed_files import CONFIG, RECORD, TENSORS, load_packed, save_packed
from qtale_lib.quantization.packed_size import packed_file_bytes

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def same(first, second):
    (logits, routes), (others, other_routes) = run(first, 1), run(second, 1)
    long, other_long = run(first, 4, 30)[0], run(second, 4, 30)[0]
    equal = torch.equal(logits, others) and torch.equal(long, other_long)
    return equal and (routes is None or torch.equal(routes, other_routes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "tied"), [(4, False), (3, True)])
def test_saved_is_loaded(family, routed, dtype, bits, tied, tmp_path):
    _, model = both(bits, family=family, routed=routed, dtype=dtype, tied=tied)
    save_packed(model, tmp_path)
    loaded = load_packed(tmp_path)
    assert same(model, loaded)
    assert not loaded.training
    assert loaded.dtype == dtype
    assert loaded.quantization.as_dict() == model.quantization.as_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    if routed:
        assert routing_state(loaded).theta == 0.4
        assert routing_state(loaded).config == routing_state(model).config
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_few_bits_and_half_steps_come_back(tied, tmp_path):
    fake = quantize(make_model(tied=tied), method="rtn", bits=3, group_size=-1, lm_head_bits=4)
    model = pack(fake, step_dtype=torch.float16)
    save_packed(model, tmp_path, TOKENIZER)
    loaded = load_packed(tmp_path, "cpu")
    assert same(model, loaded)
    assert packed_linears(loaded)["lm_head"].bits == 4
    assert loaded.lm_head.steps.dtype == torch.float16
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_the_theta_of_the_day_is_saved_and_saving_again_is_clean(tmp_path):
    _, model = both(routed=True)
    save_packed(model, tmp_path)
    set_threshold(model, 0.2)
    save_packed(model, tmp_path)
    loaded = load_packed(tmp_path)
    assert routing_state(loaded).theta == 0.2 and same(model, loaded)
    save_packed(loaded, tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


def test_generation_settings_come_back(tmp_path):
    _, model = both(routed=True)
    model.generation_config.eos_token_id = [7, 9]
    save_packed(model, tmp_path, TOKENIZER)
    assert load_packed(tmp_path).generation_config.eos_token_id == [7, 9]


def test_the_record_says_what_the_file_was_made_from(tmp_path):
    fake = make_model(routed=True)
    digest = quantize(fake, method="rtn", group_size=32).quantization.model_sha256
    save_packed(pack(fake), tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["quantizer"]["model_sha256"] == digest and len(digest) == 64
    assert record["threshold"] == 0.4 and record["routers"]["hidden"] == 8
    assert set(record["sha256"]) == {CONFIG, TENSORS}


def test_no_float_weight_of_a_packed_layer_is_loaded(tmp_path):
    _, model = both(4, dtype=torch.bfloat16, routed=True)
    save_packed(model, tmp_path)
    loaded = load_packed(tmp_path)
    floats = {name for name, _ in loaded.named_parameters()}
    assert not any(name.endswith(f"{linear}.weight") for name in floats for linear in LINEARS)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert packed_bytes(loaded) == packed_bytes(model)
    header = int.from_bytes((tmp_path / TENSORS).read_bytes()[:8], "little") + 8
    assert packed_bytes(tmp_path) == packed_bytes(model) + header


MEASURE = """
import sys, torch
from pathlib import Path
from qtale_lib.quantization.packed import packed_bytes
from qtale_lib.quantization.packed_files import load_packed
def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
load_packed(sys.argv[2])  # imports, and what torch sets up once
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_packed(sys.argv[1])
print(1024 * (kib("VmHWM") - before) / packed_bytes(sys.argv[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("bits", [4, 3])
def test_loading_adds_little_more_memory_than_the_file_has_bytes(bits, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "vocab_size": 8000}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    for name, changes in (
        ("large", sizes),
        ("small", {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}),
    ):
        model = make_model(dtype=torch.bfloat16, routed=True, **changes)
        save_packed(pack(quantize(model, method="rtn", bits=bits)), tmp_path / name)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.15, done.stdout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
@pytest.mark.parametrize(("bits", "group", "head", "steps"), [(4, 32, 16, "float16"), (3, -1, 4, "float32")])
def test_the_files_bytes_are_known_before_there_is_a_file(family, routed, bits, group, head, steps, tmp_path):
    model = make_model(family, torch.bfloat16, routed, tied=head == 4)
    config, routers = model.config.to_dict(), routing_state(model).config if routed else None
    quantize(model, method="rtn", bits=bits, group_size=group, lm_head_bits=head)
    save_packed(pack(model, getattr(torch, steps)), tmp_path)
    size = packed_file_bytes(config, bits, group, head, routers, step_dtype=steps)
    assert size["tensors"] == packed_bytes(model)
    assert size["total"] == packed_bytes(tmp_path)


# --- what is refused


@pytest.fixture
def saved(tmp_path):
    _, model = both(routed=True)
    return save_packed(model, tmp_path / "saved")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="point at a folder"):
        load_packed(tmp_path)
    for name in (TENSORS, CONFIG, RECORD):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        with pytest.raises(UserError, match=name):
            load_packed(saved)
        (saved / name).write_bytes(content)
    load_packed(saved)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_damaged_and_exchanged_files_are_refused(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-9] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is not the file that was saved \(sha256\)"):
        load_packed(saved)


def resealed(saved, tensors):
    """Write `tensors` with the digests that belong to them."""
    import hashlib

    save_file(tensors, saved / TENSORS)
    record = json.loads((saved / RECORD).read_text())
    digest = hashlib.sha256((saved / TENSORS).read_bytes()).hexdigest()
    edit(saved / RECORD, sha256=record["sha256"] | {TENSORS: digest})


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.codes", "model.norm.weight", "model.layers.3.router.score.weight"],
)
def test_missing_surplus_and_misshapen_tensors_are_refused(saved, name):
    tensors = load_file(saved / TENSORS)
    wrong = (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 4)},
        tensors | {name: torch.zeros(1, 1)},
    )
    for changed in wrong:
        resealed(saved, changed)
        with pytest.raises(UserError, match="missing, left over or misshapen"):
            load_packed(saved)
    resealed(saved, tensors)
    load_packed(saved)


def test_records_that_do_not_fit_are_refused(saved):
    whole = (saved / RECORD).read_text()
    record = json.loads(whole)
    name = "model.layers.0.mlp.up_proj"
    other = record["layers"] | {name: {"bits": 3, "group": 32}}
    unknown = record["layers"] | {"model.layers.9.mlp.up_proj": {"bits": 4, "group": 32}}
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(record | {"format": 2}), "format 2, not 1"),
        (json.dumps(record | {"layers": other}), "up_proj"),
        (json.dumps(record | {"layers": unknown}), "does not fit"),
        (json.dumps(record | {"routers": None}), "router"),
        (json.dumps(record | {"routers": {"wide": 8}}), "does not fit"),
        (json.dumps(record | {"dtype": "real"}), "does not fit"),
        (json.dumps({"format": 1, "sha256": record["sha256"]}), "does not fit"),
        (json.dumps({"format": 1}), "sha256"),
    ):
        (saved / RECORD).write_text(text)
        with pytest.raises(UserError, match=message):
            load_packed(saved)


def test_only_a_packed_model_is_saved(tmp_path):
    with pytest.raises(UserError, match="not packed"):
        save_packed(make_model(), tmp_path)
    with pytest.raises(UserError, match="no safetensors"):
        packed_bytes(tmp_path)


# --- AWQ's layout


def read_words(words, order=(0, 4, 1, 5, 2, 6, 3, 7)):
    """int32 [rows, n] -> 4-bit numbers [rows, 8n]: output i of a word stands in its 4-bit place order[i]."""
    unsigned = words.numpy().view(np.uint32)
    return np.stack([(unsigned >> np.uint32(4 * place)) & 15 for place in order], -1).reshape(len(words), -1)


def read_awq(tensors, name, group):
    """float16-step weights [out, in] by the format's description alone, in float32."""
    codes, zeros = (read_words(tensors[f"{name}.{key}"]).astype(np.int64) for key in ("qweight", "qzeros"))
    scales = tensors[f"{name}.scales"].numpy()
    assert scales.dtype == np.float16
    whole = (codes - zeros.repeat(group, 0)) * scales.astype(np.float32).repeat(group, 0)
    return whole.T


@pytest.fixture(params=FAMILIES)
def exported(request, tmp_path):
    _, model = both(4, family=request.param, dtype=torch.bfloat16, tied=request.param == "qwen2")
    export_awq(model, tmp_path, TOKENIZER)
    return model, tmp_path


def test_an_independent_reader_finds_the_same_weights(exported):
    model, folder = exported
    tensors = load_file(folder / "model.safetensors")
    for name, layer in packed_linears(model).items():
        read = read_awq(tensors, name, 32)
        group = [t.float().repeat_interleave(32, 1) for t in (layer.zero_points(), layer.steps.half())]
        exact = (layer.unpacked().float() - group[0]) * group[1]
        assert np.array_equal(read, exact.numpy()), name
        weight = layer.dequantize(torch.float32)
        assert ((torch.tensor(read) - weight).abs() <= 2**-11 * weight.abs() + 1e-7).all()
        if layer.bias is not None:
            assert torch.equal(tensors[f"{name}.bias"], layer.bias.half())
    floats = {name for name in tensors if name.endswith(".weight")}
    head = set() if model.config.tie_word_embeddings else {"lm_head.weight"}
    assert {"model.embed_tokens.weight", "model.norm.weight"} | head <= floats
    assert all(torch.equal(tensors[name], model.state_dict()[name].half()) for name in floats)


def test_the_config_says_what_awq_readers_ask_for(exported):
    model, folder = exported
    config = AutoConfig.from_pretrained(folder)
    asked = AwqConfig.from_dict(config.quantization_config)
    assert (asked.bits, asked.group_size, asked.zero_point) == (4, 32, True)
    assert config.quantization_config["version"] == "gemm"
    assert config.quantization_config["quant_method"] == "awq"
    assert config.dtype == torch.float16 and config.architectures == [type(model).__name__]
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.skipif(find_spec("awq") is None, reason="autoawq is not installed")
def test_autoawq_reads_what_was_exported(exported):
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    model, folder = exported
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    layer = packed_linears(model)[name]
    reader = WQLinear_GEMM(4, 32, layer.in_features, layer.out_features, layer.bias is not None, "cpu")
    reader.load_state_dict({k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(name + ".")})
    read = dequantize_gemm(reader.qweight, reader.qzeros, reader.scales, 4, 32)
    exact = layer.unpacked().float() - layer.zero_points().float().repeat_interleave(32, 1)
    exact = (
        exact * layer.steps.half().float().repeat_interleave(32, 1)
    ).half()  # autoawq multiplies in float16
    assert torch.equal(read.T, exact)


@pytest.mark.skipif(find_spec("awq") is None, reason="autoawq is not installed")
def test_autoawq_packs_a_layer_into_the_same_words():
    from awq.modules.linear.gemm import WQLinear_GEMM

    layer = packed_linears(both(4)[1])["model.layers.0.self_attn.q_proj"]
    scales = layer.steps.T.half().contiguous()
    zeros = layer.zero_points().T.contiguous()
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    codes = layer.unpacked().float() - zeros.T.float().repeat_interleave(32, 1)
    linear.weight.data = codes * scales.T.float().repeat_interleave(32, 1)
    theirs = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales, zeros=zeros.float())
    ours = awq_tensors(layer)
    assert torch.equal(theirs.qweight.cpu(), ours["qweight"])
    assert torch.equal(theirs.qzeros.cpu(), ours["qzeros"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "4 bits, not 3"),
        ({"routed": True}, "routers"),
        ({"lm_head_bits": 4}, "lm_head"),
        ({"group_size": -1}, "group size"),
    ],
)
def test_what_awq_cannot_hold_is_refused(settings, message, tmp_path):
    _, model = both(**settings)
    with pytest.raises(UserError, match=message):
        export_awq(model, tmp_path, TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_unpacked_odd_or_overflowing_models_are_not_exported(tmp_path):
    with pytest.raises(UserError, match="not packed"):
        export_awq(make_model(), tmp_path, TOKENIZER)
    odd = make_model(intermediate_size=100)
    with pytest.raises(UserError, match="100 outputs"):
        export_awq(pack(quantize(odd, method="rtn", group_size=4)), tmp_path, TOKENIZER)
    _, large = both(4)
    large.model.norm.weight.data[0] = 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight does not fit into float16"):
        export_awq(large, tmp_path, TOKENIZER)
