"""A word-level tokenizer and random Llamas of a few thousand weights, for tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MARKS = ["<unk>", "<s>", "</s>", *":;.?", "question", "choices", "answer", "instruction", "response", "input"]
WORDS = [f"w{i}" for i in range(40)]


def word_tokenizer(
    bos: bool = True, eos: bool = True, words: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Whitespace and punctuation split; puts "<s>" before a text if `bos`; has no padding token."""
    vocabulary = {word: index for index, word in enumerate([*MARKS, *WORDS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    names = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def tiny_llama(vocabulary: int, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama in eval mode, with weights large enough that its predictions differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()
