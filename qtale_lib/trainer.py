"""The paper's loss (Sec. 3.2; Eq. 4, 7, 8) in a transformers Trainer, LoRA by peft, checkpoints, divergence.

The methods differ in one thing each: "full" is the same LoRA without routers, "dllm" has routers and no
entropy term (λ2 = 0), "qtale" has both. "noisy_full", a control that the paper lacks, has the noise of
routers and none of their decisions (see `only_noise`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import SeedableRandomSampler
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from qtale_lib import checkpoints
from qtale_lib.adaptive import Routes, keyed_noise, record_routes, reserved_tokens
from qtale_lib.data.encoding import IGNORED
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.finite import first_non_finite_layer, place
from qtale_lib.losses import counted_tokens, entropy_loss, lambda1_at, rate_excess, rate_loss, total_loss

TRAINABLE_FILE = "trainable.safetensors"


class Objective(NamedTuple):
    """Weights of Eq. 8 and the rate loss's target; `routed` is False for "full", whose loss is CE alone."""

    routed: bool
    lambda1: float = 0.0
    lambda2: float = 0.0
    rate_target: float = 0.5
    rate_kind: str = "per_token"

    @classmethod
    def of(cls, method: str, training: Any) -> Objective:
        """The objective of a method under a profile's training section."""
        if method == "full":
            return cls(routed=False)
        if method == "noisy_full":
            return cls(routed=True)
        lambda2 = training.lambda2 if method == "qtale" else 0.0
        return cls(True, training.lambda1, lambda2, training.rate_target, training.rate_loss)


class TokenCounts(NamedTuple):
    """Tokens of one optimizer step, all processes' micro-batches: what CE and what the routing losses average
    over. excess: R − R_target of the step, where the rate loss is Eq. 4's and one micro-batch does not tell.
    """

    response: Tensor
    rated: Tensor
    excess: Tensor | None = None


def add_lora(model: PreTrainedModel, settings: Any) -> PeftModel:
    """The model with trainable LoRA matrices (float32) and trainable routers; everything else is frozen.

    Scale alpha/r; peft drops before A where D-LLM drops after B.
    """
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules),
            init_lora_weights="gaussian",
            task_type="CAUSAL_LM",
        ),
    )
    for name, parameter in adapted.named_parameters():
        if is_router(name):
            parameter.requires_grad_(True)
    return adapted


def only_noise(model: nn.Module) -> nn.Module:
    """Freeze the routers where they know nothing of the token: D-LLM's Gumbel noise, and nothing to learn.

    What regularises in D-LLM's training is that each layer is bypassed at random. To see that alone, the last
    weights become 0, so that every gap is the one of the biases at the start (2.0 − 0.1) and a token bypasses
    a layer with probability σ(−1.9) = 13 %, whichever token it is and throughout training; the loss is CE
    alone. Routers trained by CE would learn to execute and the noise would fade; frozen ones that read the
    hidden state would let LoRA steer them. Every layer runs when such a model is quantized and evaluated
    (θ = 0), so that it differs from "full" in the noise of its training and in nothing else. D-LLM's own
    noise changes as its gaps grow: the control has what D-LLM has at its start.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_router(name):
                parameter.requires_grad_(False)
                if name.endswith("score.weight"):
                    parameter.zero_()
    return model


def is_router(name: str) -> bool:
    """Whether a parameter's name is a router's."""
    return ".router." in name


def parameter_groups(
    model: nn.Module, lr: float, router_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: LoRA and routers at their own rates; no decay on vectors (biases and norms)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((is_router(name), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr": router_lr if router else lr,
            "weight_decay": weight_decay if matrix else 0.0,
        }
        for (router, matrix), members in groups.items()
    ]


def causal_of(model: nn.Module) -> PreTrainedModel:
    """The causal language model itself, taken out of the wrappers of peft and of several processes."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder without lm_head; its forward gives hidden states."""
    return causal_of(model).base_model


def response_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy over the response tokens; lm_head runs on their positions only. Inputs [B, T]."""
    targets = labels[:, 1:]
    answered = targets != IGNORED
    causal = causal_of(model)
    # DDP, or the root of a sharded model, must see the pass from its start; peft's wrapper has no part in it
    whole = model if isinstance(model, DistributedDataParallel) else causal
    with _reading(causal.get_output_embeddings(), answered):
        logits = whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    return cross_entropy(logits.float(), targets[answered], reduction="sum")  # [response tokens, vocabulary]


@contextmanager
def _reading(head: nn.Module, chosen: Tensor) -> Iterator[None]:
    """Let lm_head read the hidden states [B, T, d] at the chosen places only, bool [B, T - 1]."""
    handle = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][chosen],))
    try:
        yield
    finally:
        handle.remove()


class FilledOrder(Sampler[int]):
    """Each epoch's order of so many rows, then the index after the last one until whole batches are full."""

    def __init__(self, rows: int, whole: int, seed: int) -> None:
        self.order = SeedableRandomSampler(range(rows), data_seed=seed)
        self.fillers = -rows % whole

    def __len__(self) -> int:
        return len(self.order) + self.fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from [len(self.order)] * self.fillers

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.order.set_epoch(epoch)


class RoutedTrainer(Trainer):
    """Trainer with CE + λ1(e)·L_rate − λ2·L_entropy (Eq. 8), every mean taken over the effective batch.

    CE is weighted by response token and the routing terms by rated token over all accumulated micro-batches
    and processes, so accumulation 4×1 or four processes give 1×4. L_rate of kind "mean" is |R − R_target| of
    all of them: with accumulation, a pass ahead of the step's own, by the same draws, tells R's side.
    """

    # compute_loss divides by the counts of the whole optimizer step, so training_step must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, objective: Objective, router_lr: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.router_lr = router_lr
        self._reserved = reserved_tokens(self.model)
        self._sums: dict[str, Tensor] = {}
        self._summed_from = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Fused AdamW: some 100 tiny tensors cost more in calls than in arithmetic otherwise."""
        if self.optimizer is None:
            groups = parameter_groups(
                model or self.model, self.args.learning_rate, self.router_lr, self.args.weight_decay
            )
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, TokenCounts]:
        """The micro-batches of one optimizer step and their token counts."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        response = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
        rated = sum(self._rated(batch).sum() for batch in batches)
        counts = TokenCounts(
            self._over_processes(response.to(device)), self._over_processes(rated.to(device))
        )
        counts = counts._replace(rated=counts.rated.clamp_min(1))
        if len(batches) > 1 and self.objective.routed and self.objective.rate_kind == "mean":
            counts = counts._replace(excess=self._excess_ahead(batches, counts))
        return batches, counts

    def _over_processes(self, value: Tensor) -> Tensor:
        """Summed over the processes."""
        return value if self.args.world_size == 1 else self.accelerator.reduce(value, "sum")

    def _excess_ahead(self, batches: list, counts: TokenCounts) -> Tensor:
        """R − R_target of a step, before its first backward pass, and no generator moved by it."""
        device = self.args.device
        self.model.train()
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            seen = [(self._forward(self.model, inputs)[1], self._rated(inputs)) for inputs in batches]
            return self._over_processes(sum(self._excess(*one, counts) for one in seen))

    def _excess(self, routes: Routes, rated: Tensor, counts: TokenCounts) -> Tensor:
        """A micro-batch's part of the step's R − R_target."""
        share = rated.sum() / counts.rated
        return rate_excess(routes.gates, rated, self.objective.rate_target) * share

    def _forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Routes]:
        """Summed CE of a micro-batch and its routes; numbered rows get the noise of their numbers."""
        keys = None
        if "example" in inputs:
            keys = [(self.args.seed, self.state.global_step, row) for row in inputs["example"].tolist()]
        with record_routes(model) as routes, keyed_noise(model, keys):
            return response_loss(model, **_read(inputs)), routes

    def _rated(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The tokens that the routing losses average over, bool [B, T]."""
        return counted_tokens(inputs["attention_mask"].bool(), self._reserved)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss; UserError with layer and step if it is not finite."""
        counts: TokenCounts = num_items_in_batch
        if self.objective.routed:
            terms = self._routed_terms(model, inputs, counts)
        else:
            ce = response_loss(model, **inputs) / counts.response
            terms = {"ce": ce, "total": ce}
        if not self._over_processes(terms["total"].detach()).isfinite():
            layer = self._first_of_processes(self._first_layer(model, inputs))
            raise UserError(describe_divergence(layer, self.state.global_step))
        self._add_up({name: value.detach() for name, value in terms.items() if name != "total"})
        # gradients are averaged over processes, and the terms are parts of a sum
        return terms["total"] * self.args.world_size

    def _first_layer(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> int | None:
        """The first layer whose output is not finite on a batch."""
        return first_non_finite_layer(decoder_of(model).layers, lambda: response_loss(model, **_read(inputs)))

    def _first_of_processes(self, layer: int | None) -> int | None:
        """The least layer that any process names."""
        last = len(decoder_of(self.model).layers)
        named = torch.tensor([last if layer is None else layer], device=self.args.device)
        least = int(self.accelerator.gather(named).min())
        return None if least == last else least

    def _routed_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], counts: TokenCounts
    ) -> dict[str, Tensor]:
        aim = self.objective
        ce, routes = self._forward(model, inputs)
        ce = ce / counts.response
        rated = self._rated(inputs)  # [B, T]
        share = rated.sum() / counts.rated
        if aim.rate_kind == "mean":
            part = self._excess(routes, rated, counts)
            whole = self._over_processes(part.detach()) if counts.excess is None else counts.excess
            rate = part * whole.sign()
        else:
            rate = rate_loss(routes.gates, rated, aim.rate_target) * share
        entropy = entropy_loss(routes.soft, rated) * share
        lambda1 = lambda1_at(self.state.global_step / self.state.max_steps, aim.lambda1)
        loss_ratio = routes.gates.detach().mean(0)[rated].mean().nan_to_num() * share  # nan: none is rated
        total = total_loss(ce, rate, entropy, lambda1, aim.lambda2)
        return {"ce": ce, "rate": rate, "entropy": entropy, "loss_ratio": loss_ratio, "total": total}

    def _add_up(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last logged step, and λ1, to Trainer's own entry.

        Trainer's closing summary goes: after a restart it is of the remaining steps only.
        """
        if "train_runtime" in logs:
            logs = {}
        steps = max(self.state.global_step - self._summed_from, 1)
        sums = {name: self._over_processes(value) for name, value in self._sums.items()}
        logs = {**logs, **{name: float(value) / steps for name, value in sums.items()}}
        self._sums, self._summed_from = {}, self.state.global_step
        if self.objective.routed:
            logs["lambda1"] = lambda1_at(
                self.state.global_step / self.state.max_steps, self.objective.lambda1
            )
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Several processes take the rows in the same order as one, and no row twice."""
        if self.args.world_size == 1:
            return super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset) - 1  # the last one fills up
        return FilledOrder(rows, self.args.world_size * self.args.train_batch_size, self.args.data_seed)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: Trainer's count walks every parameter in every step; see efficiency.py."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing is clipped (D-LLM), and an unused norm over all gradients costs milliseconds a step."""
        return None

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Safetensors and JSON where Trainer pickles; none at the last step, as the model is saved next.

        The first process writes; others add their generators. Sums are kept as their mean over processes:
        each goes on with it.
        """
        if self.state.global_step >= self.state.max_steps:
            return
        first, wait = self.args.process_index == 0, self.accelerator.wait_for_everyone
        directory = checkpoints.place(Path(self.args.output_dir), self.state.global_step)
        sums = {**self._sums, "loss": self._tr_loss}
        sums = {name: self._over_processes(value) / self.args.world_size for name, value in sums.items()}
        if first:
            checkpoints.begin(directory)
            self._save(str(directory))
            checkpoints.save_optimizer(directory, self.optimizer, self.lr_scheduler)
            checkpoints.save_sums(directory, sums, self._summed_from)
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
        wait()
        checkpoints.save_generators(directory, self.args.process_index)
        wait()
        if first:
            checkpoints.finish(directory)
        wait()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds LoRA and routers together; peft's own saving would leave the routers out."""
        os.makedirs(output_dir, exist_ok=True)
        save_file(trainable_state(self.model), os.path.join(output_dir, TRAINABLE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(model or self.model, os.path.join(resume_from_checkpoint, TRAINABLE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's last call before the first step; the sums come here because it zeroes its own before."""
        if checkpoint is not None:
            checkpoints.load_generators(Path(checkpoint), self.args.process_index)
            self._sums, self._summed_from = checkpoints.load_sums(Path(checkpoint), self.args.device)
            self._tr_loss = self._sums.pop("loss")
            self._globalstep_last_logged = self._summed_from


def _read(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model reads of a batch: all but the rows' own numbers."""
    return {name: tensor for name, tensor in inputs.items() if name != "example"}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by name, detached and contiguous."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module, path: str) -> None:
    """Copy a file of trainable_state into the model; UserError if the two sets of names differ."""
    saved, own = load_file(path), trainable_state(model)
    if saved.keys() != own.keys():
        name = min(saved.keys() ^ own.keys())
        raise DamagedError(
            f"{path} is of another model: {name} is only on one side; delete it and run again."
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def describe_divergence(layer: int | None, step: int) -> str:
    """One sentence naming the step and the first decoder layer whose output is not finite."""
    cure = "lower training.lr or training.router_lr in the profile" if step else "look at the base's weights"
    return f"Training diverged at step {step}: the first non-finite numbers appear {place(layer)}; {cure}."
