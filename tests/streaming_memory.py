"""Quantizes a random Llama from files under a limit on its memory; a process of its own, started by a test.

python tests/streaming_memory.py FOLDER OUT MEGABYTES streamed|whole

The limit is on the process's data (RLIMIT_DATA): the memory that it may write to, counted by the system at
every allocation. An address-space limit would count what is only mapped to be read, such as libraries.
"""

import json
import re
import resource
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_models import TOKENIZER, WORDS
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from qtale_lib.quantization import quantize
from qtale_lib.quantization.load_memory import highest, start_measuring
from qtale_lib.quantization.streaming import quantize_streamed
from qtale_lib.streamed_model import StreamedModel, empty_model

SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
NARROW = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
LENGTH = 32
TEXTS = [" ".join(WORDS[(start + i) % len(WORDS)] for i in range(LENGTH - 1)) for start in range(16)]
SETTINGS = {"bits": 4, "group_size": 64}


def write_random_llama(folder: Path, config: PreTrainedConfig) -> int:
    """Write random weights a file a layer, so that a layer is all that is ever held; returns their bytes."""
    config.save_pretrained(folder)
    state = empty_model(config, config.dtype, None, None).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    parts = defaultdict(dict)
    for name, tensor in state.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        parts[f"model-{layer[1] if layer else 'rest'}.safetensors"][name] = tensor.shape
    torch.manual_seed(0)
    places, total = {}, 0
    for file, shapes in parts.items():
        tensors = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
        tensors = {name: tensor.to(config.dtype) for name, tensor in tensors.items()}
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def in_files(folder: Path, out: Path) -> None:
    quantize_streamed(StreamedModel(folder), out, TOKENIZER, TEXTS, **SETTINGS)


def in_memory(folder: Path, _: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    quantize(model, TOKENIZER, TEXTS, **SETTINGS)


def warm_up(work) -> None:
    """What is set up once is not the model's; a narrow one leaves little freed memory to be used again."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder), LlamaConfig(**SHAPE | NARROW, num_hidden_layers=1))
        work(Path(folder), Path(folder) / "out")


def limit(megabytes: int) -> None:
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (now + megabytes * 2**20, resource.RLIM_INFINITY))


if __name__ == "__main__":
    folder, out, megabytes, how = sys.argv[1:]
    work = {"streamed": in_files, "whole": in_memory}[how]
    warm_up(work)
    before = start_measuring("cpu")
    limit(int(megabytes))
    work(Path(folder), Path(out))
    print(json.dumps({"added": highest("cpu") - before}))
