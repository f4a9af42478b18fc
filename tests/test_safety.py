"""Nothing let in: no pickle, no code of others, no network, no way out of a folder; no token gets out."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from small_run import profile, save_base
from transformers import AutoTokenizer

from qtale_lib import checkpoints
from qtale_lib.adaptive import load_routed
from qtale_lib.base import base_facts, load_base, load_tokenizer
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.jobs import all_jobs
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT

SOURCES = sorted((ROOT / "qtale_lib").rglob("*.py")) + sorted((ROOT / "scripts").glob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "os.system", "yaml.unsafe_load",
    "yaml.full_load", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load",
}  # fmt: skip


def code_of(path: Path) -> ast.Module:
    if path.suffix == ".py":
        return ast.parse(path.read_text())
    cells = nbformat.read(path, as_version=4).cells
    return ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


@pytest.mark.parametrize(
    "path", [*SOURCES, *sorted((ROOT / "notebooks").glob("*.ipynb"))], ids=lambda path: path.name
)
def test_no_pickle_no_eval_no_shell_no_code_from_a_model_repository(path):
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}, ast.unparse(node)
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, ast.unparse(node)
            given = {word.arg: word.value for word in node.keywords}
            for name in ("trust_remote_code", "shell", "allow_pickle"):
                assert name not in given or ast.unparse(given[name]) == "False", ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_model_config_and_tokenizer_is_loaded_without_its_repositorys_code(path):
    for node in ast.walk(code_of(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.startswith("Auto") and called.endswith(("from_pretrained", "from_config")):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code") == "False", ast.unparse(node)
            if called == "AutoModelForCausalLM.from_pretrained":
                assert given.get("use_safetensors") == "True", ast.unparse(node)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def test_a_malicious_pickle_is_not_opened(sound, tmp_path):
    """In a base's folder, in place of its weights and beside them; in an adapter's; in a checkpoint's."""
    mark, base = tmp_path / "mark", shutil.copytree(sound, tmp_path / "base")
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # it would be seen
    mark.unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl", "adapter_model.bin"):
        (base / name).write_bytes(bomb)
    load_base(profile(base))
    (base / "model.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"holds no model\.safetensors"):
        base_facts(profile(base))
    with pytest.raises(OSError, match="safetensors"):
        load_base(profile(base))
    (base / "model.safetensors").write_bytes(bomb)
    with pytest.raises(DamagedError, match="no readable safetensors file"):
        base_facts(profile(base))
    with pytest.raises(UserError):
        load_routed(base)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoints.begin(checkpoint)
    checkpoints.save_generators(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (checkpoint / name).write_bytes(bomb)
    checkpoints.finish(checkpoint)
    checkpoints.load_generators(checkpoint)
    assert not mark.exists()


def test_code_in_a_models_folder_is_not_run(sound, tmp_path):
    mark, base = tmp_path / "mark", shutil.copytree(sound, tmp_path / "base")
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name, parent in (("C", "LlamaConfig"), ("M", "LlamaForCausalLM"), ("T", "PreTrainedTokenizerFast")):
        code += f"import transformers\nclass {name}(transformers.{parent}): pass\n"
    (base / "own.py").write_text(code)
    for name, places in (
        ("config.json", {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.T"]}),
    ):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**content, "auto_map": places}))
    small = profile(base)
    base_facts(small)
    load_base(small)
    load_tokenizer(base)
    assert not mark.exists()
    AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    assert mark.exists()  # it would be seen


def test_a_network_would_be_seen(tmp_path):
    """What tests/test_end_to_end.py relies on: a process with that on its path reaches this machine alone."""
    code = """
import socket, urllib.request
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
try:
    urllib.request.urlopen("http://192.0.2.1/", timeout=5)
except OSError as error:
    print(error)
"""
    log = tmp_path / "network"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "no_network"), "QTALE_TEST_NETWORK": str(log)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "unreachable" in done.stdout and "192.0.2.1" in log.read_text()


def test_a_profile_cannot_lead_out_of_the_results(tmp_path):
    from qtale_lib.config import load_profile

    for name in ("../x", "a/b", "/etc", "..", "", "a\0b", "-x", ".hidden"):
        (tmp_path / "own.yaml").write_text(f"name: {json.dumps(name)}\n")
        with pytest.raises(UserError, match="name"):
            load_profile(tmp_path / "own.yaml")
    for file in ("..yaml", "-rf.yaml", "a b;c.yaml", ".yaml"):
        (tmp_path / file).write_text("")
        own = Lab(load_profile(tmp_path / file), tmp_path / "results")
        assert own.directory.parent == tmp_path / "results" and own.directory.name not in ("", ".", "..")
        assert all_jobs(own.profile)


def test_weights_are_read_as_numbers_alone(tmp_path):
    """torch's own files are pickles, and no file of ours is one."""
    torch.save({"a": 1}, tmp_path / "x.safetensors")
    with pytest.raises(DamagedError):
        from qtale_lib.base import header

        header(tmp_path / "x.safetensors")
