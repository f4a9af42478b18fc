"""A random four-layer Llama with a word-level tokenizer, and profiles that use it: without meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtale_lib.config import Profile, load_profile
from qtale_lib.data import load_task
from qtale_lib.data.prompts import render

WORDS_FROM = ("arc_easy", "alpaca")


def llama(vocabulary: int = 60, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of 4 layers and width 32."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**shape, **changes}))


def save_base(directory: Path, seed: int = 0) -> Path:
    """A base model's folder with a tokenizer that knows the words of two embedded tasks."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    texts = [render(example) for task in WORDS_FROM for example in load_task(task, "train")[:500]]
    found = {
        piece for text in texts for piece, _ in splitter.pre_tokenize_str(f"{text.prompt} {text.target}")
    }
    words = ["<pad>", "</s>", "<unk>", *sorted(found)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    llama(len(words), seed).save_pretrained(directory)
    return directory


def profile(base: Path | str = "microworld", **changes: Any) -> Profile:
    """The smoke profile cut down once more."""
    small = {
        "base": str(base),
        "max_steps": 6,
        "limit": {"train": 24, "calibration": 8, "test": 10},
        "group_size": 32,
        "quantization": {"calibration_texts": 4},
        "calibration": {"coarse_step": 0.25, "fine_step": 0.25, "questions": 8},
        "probes": {"samples": 12},
    }
    for name, value in changes.items():
        small[name] = {**small.get(name, {}), **value} if isinstance(value, dict) else value
    return load_profile("smoke", **small)


def rows(count: int, vocabulary: int = 60, seed: int = 0) -> list[dict[str, list[int]]]:
    """Encoded training rows of 6 to 14 random tokens, the last 1 to 3 of them the response."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length, answer = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, 15), (1, 4))
        )
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]})
    return made
