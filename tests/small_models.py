"""A word-level tokenizer, random Llamas of a few thousand weights, and questions for them."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtale_lib.adaptive import RouterConfig, add_routers
from qtale_lib.data.schema import Example

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


TOKENIZER = word_tokenizer()


def questions(count: int, seed: int = 0) -> list[Example]:
    """Questions of 2 to 9 words with four choices of one to three words."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        text = {"question": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))}
        first = draw.choice(WORDS)  # a shared first word makes choices that differ in their last token only
        choices = [" ".join([first, *draw.choices(WORDS, k=draw.randint(0, 2))]) for _ in range(4)]
        rows.append(
            Example(str(index), "arc_easy", text, tuple(choices), draw.randrange(4), facts=(f"f{index}",))
        )
    return rows


def responses(count: int, seed: int = 0) -> list[Example]:
    """Instructions of 1 to 6 words with responses of 1 to 8."""
    draw = random.Random(seed)
    return [
        Example(
            str(index),
            "alpaca",
            {"instruction": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))), "input": ""},
            response=" ".join(draw.choices(WORDS, k=draw.randint(1, 8))),
        )
        for index in range(count)
    ]


def routed_llama(seed: int = 0, reserved: int = 2) -> LlamaForCausalLM:
    """A random routed model whose routers pass and block in about equal parts."""
    model = tiny_llama(len(TOKENIZER), layers=5, seed=seed)
    add_routers(model, RouterConfig(bypass_bias=0.0, execute_bias=0.0, always_run_tokens=reserved)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name and parameter.ndim > 1:
                parameter.mul_(5)
    return model
