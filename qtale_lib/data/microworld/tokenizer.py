"""The embedded model's word-level tokenizer: one token per word or punctuation mark of the world's text."""

from __future__ import annotations

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qtale_lib.data.microworld.corpus import Corpus
from qtale_lib.data.microworld.tasks import FORMS, examples
from qtale_lib.data.microworld.world import build_world
from qtale_lib.data.prompts import render

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def vocabulary() -> list[str]:
    """Every word of the corpus and of all questions, special tokens first, sorted."""
    splitter = pre_tokenizers.Split(Regex(r"\s+|[^\w\s]"), "isolated")
    documents = islice(Corpus(build_world(), seed=0), 60_000)
    texts = [text for document in documents for pair in document for text in pair]
    for task in FORMS:
        for example in examples(task, "train"):
            rendered = render(example, "compact")
            texts.append(f"{rendered.prompt} {rendered.target}")
    found = {piece.strip() for text in texts for piece, _ in splitter.pre_tokenize_str(text)}
    return [*SPECIAL, *sorted(found - {""})]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer that puts <s> before a text and splits on white space and around punctuation."""
    words = vocabulary()
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=256,
        padding_side="right",
    )
