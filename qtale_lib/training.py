"""Fine-tuning one method on one task (paper, Sec. 4.1): data in, LoRA and routers out, probes on the way.

The recipe is D-LLM's launch script's: AdamW, no gradient clipping, linear warm-up, then cosine to 0.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from qtale_lib.adaptive import RouterConfig, add_routers, save_routed, weights_digest
from qtale_lib.base import load_base
from qtale_lib.checkpoints import last_complete
from qtale_lib.data import Example, load_task, subset
from qtale_lib.data.encoding import IGNORED, collate, encode_all
from qtale_lib.errors import UserError
from qtale_lib.probes import ProbeCallback
from qtale_lib.provenance import memory_in_use
from qtale_lib.quantization.aware import see_quantized
from qtale_lib.trainer import Objective, RoutedTrainer, add_lora, is_router, only_noise

__all__ = ["Objective", "RoutedTrainer", "add_lora", "finetune", "prepare_model", "train_rows"]

if TYPE_CHECKING:
    from qtale_lib.config import Profile

LOGGED_POINTS = 100
PROBED_SHARE = 0.45  # of an epoch's rows
CHECKPOINTS = "checkpoints"


def finetune(
    profile: Profile,
    task: str,
    method: str,
    seed: int,
    directory: Path,
    progress: Callable[[float, str], None] | None = None,
    examples: Sequence[Example] | None = None,
) -> dict[str, Any]:
    """Fine-tune and save LoRA and routers to `directory`; a checkpoint found there is gone on from.

    Returns history (one entry per logged point), probes, rows {used, dropped, cut}, steps, epochs, the number
    of trainable parameters and seconds (all of training, and those in probes). progress gets the share
    done and where it is; examples default to the profile's training rows.
    Raises UserError if training diverges or no row fits.
    """
    model, tokenizer = load_base(profile)
    if examples is None:
        rows = load_task(task, "train", profile.data_dir, profile.data, profile.alpaca)
        examples = subset(rows, profile.limit.train)
    rows, counts = train_rows(profile, task, examples, tokenizer)
    model = prepare_model(model, profile, method, seed)
    probe = ProbeCallback(probed(rows, profile.probes.samples), profile.training.eval_batch_size, seed)
    learning = [name for name, p in model.named_parameters() if p.requires_grad and is_router(name)]
    callbacks = [probe] if learning else []
    if progress:
        callbacks.append(ProgressCallback(progress))
    trainer = make_trainer(model, tokenizer, rows, profile, method, seed, directory, callbacks)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=_last_checkpoint(directory))
    seconds = time.monotonic() - started
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last pass may have left a part whole in one process and not in another
    if not trainer.is_world_process_zero():
        if profile.compute.sharding == "fsdp":
            weights_digest(model)  # its part in that of save_routed
    else:
        save_routed(model, directory, base=profile.base, revision=profile.revision)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)
    return {**_outcome(trainer, counts), "training_seconds": seconds, "probe_seconds": probe.seconds}


def train_rows(
    profile: Profile, task: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """The encoded training rows and the report {used, dropped, cut}; UserError if none is left."""
    rows, counts = encode_all(examples, tokenizer, profile.prompt, profile.max_length, profile.overlong)
    if not rows:
        raise UserError(
            f"No training row of {task} fits max_length {profile.max_length}; raise it, or set overlong: cut."
        )
    return rows, counts


def probed(rows: list[dict[str, list[int]]], samples: int) -> list[dict[str, list[int]]]:
    """The first training rows, as many as the profile says, but no more than keeps probes a small part of the
    training time: a probe after every epoch is a third of a training step's work on each of its rows.
    """
    return rows[: min(samples, max(1, int(PROBED_SHARE * len(rows))))]


def prepare_model(model: PreTrainedModel, profile: Profile, method: str, seed: int) -> PeftModel:
    """The base with routers (not for "full") and LoRA, its weights seen in the recipe's bits; LoRA starts
    equal for all methods of a seed.
    """
    if method != "full":
        set_seed(seed)
        routing = profile.routing
        add_routers(
            model,
            RouterConfig(
                hidden=routing.hidden,
                always_run_layers=routing.always_run_layers,
                always_run_tokens=routing.always_run_tokens,
                tau=profile.training.tau,
                max_pull=routing.max_pull,
            ),
        )
    set_seed(seed)
    model = add_lora(model, profile.lora)
    if profile.training.weight_bits < 16:
        widths = profile.training.weight_bits, profile.group_size, profile.quantization.lm_head_bits
        see_quantized(model.get_base_model(), *widths)
    return only_noise(model) if method == "noisy_full" else model


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    profile: Profile,
    method: str,
    seed: int,
    directory: Path,
    callbacks: list[TrainerCallback],
) -> RoutedTrainer:
    """The Trainer of one run, silent on the console."""
    arguments = trainer_arguments(profile, seed, len(rows), directory)
    trainer = RoutedTrainer(
        model=model,
        args=arguments,
        train_dataset=training_set(rows, profile.training.noise == "keyed" and method != "full", arguments),
        data_collator=functools.partial(collate, pad_id=tokenizer.pad_token_id or 0),
        callbacks=callbacks,
        objective=Objective.of(method, profile.training),
        router_lr=profile.training.router_lr,
    )
    trainer.remove_callback(PrinterCallback)
    if arguments.world_size > 1:
        set_seed(seed + arguments.process_index)  # dropout's masks differ between the processes
    return trainer


def training_set(
    rows: list[dict[str, Any]], numbered: bool, arguments: TrainingArguments
) -> list[dict[str, Any]]:
    """The rows, numbered if noise is keyed by them; several processes get one more that no loss counts."""
    if arguments.world_size > 1:
        rows = [*rows, {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}]
    return [{**row, "example": index} for index, row in enumerate(rows)] if numbered else rows


def trainer_arguments(profile: Profile, seed: int, rows: int, directory: Path) -> TrainingArguments:
    """Trainer's arguments for a profile's recipe: no clipping, no reporters, no console, resumable saves."""
    recipe = profile.training
    steps = planned_steps(recipe, rows, profile.max_steps)
    batch_size, accumulation = profile.split_batch()
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(directory / CHECKPOINTS),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=profile.compute.gradient_checkpointing,
        num_train_epochs=recipe.epochs,
        max_steps=profile.max_steps or -1,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup_fraction * steps),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=0.0,
        seed=seed,
        data_seed=seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and profile.compute.processes > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=max(1, steps // LOGGED_POINTS),
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        save_only_model=profile.compute.sharding == "fsdp",  # or Trainer refuses; RoutedTrainer saves all
        report_to=[],
        disable_tqdm=True,
    )


def planned_steps(recipe: Any, rows: int, max_steps: int | None) -> int:
    """Optimizer steps of a run over so many training rows."""
    batches = math.ceil(rows / recipe.batch_size)
    return max_steps or math.ceil(recipe.epochs * math.ceil(batches / recipe.gradient_accumulation))


def _last_checkpoint(directory: Path) -> str | None:
    checkpoint = last_complete(directory / CHECKPOINTS)
    return str(checkpoint) if checkpoint else None


def _outcome(trainer: RoutedTrainer, counts: dict[str, int]) -> dict[str, Any]:
    log = trainer.state.log_history
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        "history": [entry for entry in log if "ce" in entry],
        "probes": [entry["probe"] for entry in log if "probe" in entry],
        "rows": counts,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "trainable_parameters": sum(p.numel() for p in trainable),
    }


class ProgressCallback(TrainerCallback):
    """Reports the share of steps done and where training is, as often as Trainer logs."""

    def __init__(self, report: Callable[[float, str], None]) -> None:
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Called by Trainer with the means since it logged last; at the very end, without the loss."""
        if state.is_world_process_zero and "loss" in logs:
            self.report(state.global_step / state.max_steps, where(state, logs))


def where(state: Any, logs: dict[str, float]) -> str:
    """Epoch, step, the loss (Eq. 8), R if there are routers, and the memory of this process."""
    ratio = [f"R {logs['loss_ratio']:.3f}"] if "loss_ratio" in logs else []
    epoch = f"epoch {state.epoch:.1f} of {state.num_train_epochs}"
    step = f"step {state.global_step:,} of {state.max_steps:,}"
    return ", ".join([epoch, step, f"loss {logs['loss']:.3f}", *ratio, in_use()])


def in_use() -> str:
    """The memory that this process, or its GPU, has in use."""
    return f"{memory_in_use() / 2**30:.2f} GiB"
