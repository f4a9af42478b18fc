"""Pretrains the embedded base model on the world's text: `python -m qtale_lib pretrain`.

Muon (matrices) with AdamW (embeddings, head, norms), packed windows, a linear decay to zero. The state is
saved every few minutes and the run resumes from it. The result is a plain `LlamaForCausalLM` directory:
bfloat16 safetensors, tokenizer, model card.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtale_lib.data.microworld import base_directory
from qtale_lib.data.microworld.corpus import Corpus, Pair
from qtale_lib.data.microworld.tasks import fingerprint
from qtale_lib.data.microworld.tokenizer import build_tokenizer
from qtale_lib.data.microworld.world import SEED, build_world


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of pretraining; `tokens` counts all positions, prompts of questions included."""

    layers: int = 10
    hidden: int = 48
    intermediate: int = 128
    heads: int = 4
    key_value_heads: int = 2
    window: int = 128
    batch: int = 16
    tokens: int = 16_000_000
    muon_lr: float = 0.025
    muon_decay: float = 0.05  # held against learning answers by heart
    adam_lr: float = 4e-3
    prompt_weight: float = 0.1  # of a prompt's words in the loss, against 1 of an answer's: names are random
    warmup_steps: int = 100
    # The curriculum grows geometrically over `growth_share` of training, from a share of the entities to all.
    first_share: float = 0.07
    growth_share: float = 0.4
    decay_share: float = 0.8  # the last part of training, over which the learning rate falls to zero
    seed: int = SEED

    @property
    def steps(self) -> int:
        return self.tokens // (self.window * self.batch)


def build_model(recipe: Recipe, vocabulary_size: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the recipe's shape, float32."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attn_implementation="eager",  # at this width torch's fused attention is the slower one on a CPU
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of packed documents from step `start` on: ids [batch, window + 1] and their loss weights."""
    corpus = Corpus(build_world(), recipe.seed + start)  # a resumed run draws fresh documents
    documents, rng = iter(corpus), random.Random(recipe.seed + start)
    ids: list[int] = []
    weights: list[float] = []
    need = recipe.batch * (recipe.window + 1)
    for step in count(start):
        grown = min(1.0, step / (recipe.growth_share * recipe.steps))
        corpus.share = recipe.first_share ** (1 - grown)
        while len(ids) < need:
            more_ids, more_weights = encode(recipe, tokenizer, [next(documents) for _ in range(64)])
            ids, weights = ids + more_ids, weights + more_weights
        order = list(range(recipe.batch))
        rng.shuffle(order)
        yield (
            torch.tensor(ids[:need]).view(recipe.batch, -1)[order],
            torch.tensor(weights[:need]).view(recipe.batch, -1)[order],
        )
        ids, weights = ids[need:], weights[need:]


@cache
def digest(recipe: Recipe) -> str:
    """sha256 of the recipe, the tasks and the beginning of the text: what a base of it is made from."""
    documents = list(islice(Corpus(build_world(), recipe.seed), 500))
    made_from = json.dumps([asdict(recipe), fingerprint(), documents])
    return hashlib.sha256(made_from.encode()).hexdigest()


def encode(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, documents: list[list[Pair]]
) -> tuple[list[int], list[float]]:
    """Ids and loss weights of documents, one after the other: <s>, prompts and answers in turn, </s>."""
    texts = [text for document in documents for pair in document for text in pair]
    encoded = iter(tokenizer(texts, add_special_tokens=False).input_ids)
    ids: list[int] = []
    weights: list[float] = []
    for document in documents:
        ids.append(tokenizer.bos_token_id)
        weights.append(0.0)
        for _ in document:
            for weight in (recipe.prompt_weight, 1.0):
                words = next(encoded)
                ids += words
                weights += [weight] * len(words)
        ids.append(tokenizer.eos_token_id)
        weights.append(recipe.prompt_weight)
    return ids, weights


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay_share` of the steps."""
    left = (recipe.steps - step) / (recipe.decay_share * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=recipe.muon_decay, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy of ids[:, 1:] given logits [batch, window, vocabulary]."""
    losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    return (losses * flat).sum() / flat.sum()


def multiplies_bfloat16() -> bool:
    """Whether this processor does: one that must emulate it takes ten times as long as in float32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("avx512_bw", "amx_bf16", "bf16"))  # the last is ARM's


def pretrain(recipe: Recipe, directory: Path, threads: int = 1, save_seconds: float = 300.0) -> None:
    """Runs (or resumes) pretraining; the base goes to `directory`, the state into `state/` inside it.

    Products are in bfloat16 where the processor has them, otherwise in float32; weights always in float32.
    """
    torch.set_num_threads(threads)
    mixed = multiplies_bfloat16()
    tokenizer = build_tokenizer()
    model = build_model(recipe, len(tokenizer))
    model.train()
    both = optimizers(model, recipe)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    start, spent = _resume(model, both, directory / "state")
    batches = windows(recipe, tokenizer, start)
    begin = saved = time.monotonic()
    running = None
    for step in range(start, recipe.steps):
        ids, weights = next(batches)
        for optimizer, own in zip(both, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = lr * learning_rate_factor(recipe, step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = weighted_loss(logits, ids, weights)
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - begin
            left = seconds / (step - start + 1) * (recipe.steps - step - 1)
            print(
                f"step {step}/{recipe.steps}  loss {running:.4f}  {seconds:.0f} s, about {left:.0f} s left",
                flush=True,
            )
        if time.monotonic() - saved > save_seconds:
            _save_state(model, both, directory / "state", step + 1, spent + time.monotonic() - begin)
            saved = time.monotonic()
    write_base(model, tokenizer, recipe, directory, running or float("nan"), spent + time.monotonic() - begin)


def _save_state(model, both: list[torch.optim.Optimizer], directory: Path, step: int, spent: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for number, optimizer in enumerate(both):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer{number}.{index}.{key}": value
                for key, value in state.items()
                if torch.is_tensor(value)
            }
    save_file(tensors, directory / "new.safetensors", metadata={"step": str(step), "spent": str(spent)})
    (directory / "new.safetensors").replace(directory / "state.safetensors")


def _resume(model, both: list[torch.optim.Optimizer], directory: Path) -> tuple[int, float]:
    """Loads the last state; returns (steps done, seconds spent), zeros when there is none."""
    path = directory / "state.safetensors"
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    model.load_state_dict(
        {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    )
    for number, optimizer in enumerate(both):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer{number}."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata["spent"])


def write_base(model, tokenizer, recipe: Recipe, directory: Path, loss: float, seconds: float) -> None:
    """Writes config, tokenizer, bfloat16 weights, `pretraining.json` and the model card."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    record = {
        "recipe": asdict(recipe) | {"steps": recipe.steps},
        "final_loss": round(loss, 4),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "products": "bfloat16" if multiplies_bfloat16() else "float32",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": {"model.safetensors": digest},
        "world_sha256": fingerprint(),
    }
    (directory / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    (directory / "README.md").write_text(model_card(record))


def model_card(record: dict) -> str:
    """The model card, from what `pretraining.json` records."""
    recipe, threads = record["recipe"], record["threads"]
    cores = "one core" if threads == 1 else f"{threads} cores"
    return f"""---
license: apache-2.0
library_name: transformers
---
# The embedded base model of the QTALE reproduction suite

A `LlamaForCausalLM`: {recipe["layers"]} layers, width {recipe["hidden"]}, feed-forward
{recipe["intermediate"]}, {recipe["heads"]} heads ({recipe["key_value_heads"]} for keys and values),
{record["parameters"]:,} bfloat16 parameters, and a word-level tokenizer. It knows one thing: the seeded
world of `qtale_lib/data/microworld`, whose data card is `docs/data-card.md`.

## Use

For reproducing experiments on quantization and token-adaptive execution on a laptop, by the profiles `tiny`,
`tiny-full` and `smoke`. It is of no use as a language model, and what is measured on it says nothing about
models of billions of parameters.

## Training

From random weights, on text that the world's code writes while it trains; no text by people, no personal
data and no other model's output is in it. The names of persons are drawn from a list of words.

| | |
|---|---|
| corpus | all facts and rules, in records and sentences; passages about strangers; questions |
| curriculum | {recipe["first_share"]:.0%} of entities; all after {recipe["growth_share"]:.0%} of the steps |
| tokens | {recipe["tokens"]:,} in windows of {recipe["window"]} |
| steps | {recipe["steps"]:,} of {recipe["batch"]} windows |
| optimizers | Muon (matrices, lr {recipe["muon_lr"]}), AdamW (the rest, lr {recipe["adam_lr"]}) |
| time | {record["seconds"]:,} s on {cores} (torch {record["torch"]}) |
| weights in the loss | prompts {recipe["prompt_weight"]} a word, answers 1 |
| final training loss | {record["final_loss"]} |
| sha256 of `model.safetensors` | `{record["sha256"]["model.safetensors"]}` |
| sha256 of the world's examples | `{record["world_sha256"]}` |

Facts that test questions ask for are in this text, as statements: what fine-tuning and tests ask of the base
is to recall. Their questions are not: those are about entities that only pretraining asks about.

## Evaluation

What it scores after fine-tuning, at 16 bits and quantized, is in `results/reference/<profile>`: in `tables`,
and in `results.json` with commit, device and time of each result. Why it is as small as it is, and what other
sizes lost by quantization: `docs/embedded-world.md`.

## Limits

It knows the words of its world; any other is `<unk>`. A composition of two facts from memory it hardly
learns. Most of its matrices have rows of {recipe["hidden"]} weights; the paper quantizes in groups of 128.
Pretraining that was stopped and gone on with draws other documents than one that was not.

Made by `python -m qtale_lib pretrain`; all settings are in `pretraining.json`.
"""


def main(directory: Path | None = None, tokens: int | None = None, threads: int = 1) -> None:
    """Entry point of `python -m qtale_lib pretrain`."""
    recipe = Recipe() if tokens is None else Recipe(tokens=tokens)
    pretrain(recipe, directory or base_directory(), threads)


if __name__ == "__main__":
    main()
