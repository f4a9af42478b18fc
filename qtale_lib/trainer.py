"""The paper's loss (Sec. 3.2; Eq. 4, 7, 8) in a transformers Trainer, LoRA by peft, checkpoints, divergence.

The methods differ in one thing each: "full" is the same LoRA without routers, "dllm" has routers and no
entropy term (λ2 = 0), "qtale" has both. "noisy_full", a control that the paper lacks, has the noise of
routers and none of their decisions (see `only_noise`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from qtale_lib import checkpoints
from qtale_lib.adaptive import NoiseKey, Routes, record_routes, reserved_tokens, set_noise_key
from qtale_lib.data.encoding import IGNORED
from qtale_lib.errors import UserError
from qtale_lib.losses import (
    counted_tokens,
    entropy_loss,
    lambda1_at,
    rate_loss,
    share_of_mean_rate,
    total_loss,
)

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
    """Tokens of one optimizer step, all micro-batches and processes: what CE and what the routing losses
    average over; and the execution rate over the latter, where the loss needs it before any backward pass.
    """

    response: Tensor
    rated: Tensor
    rate: Tensor | None = None


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
    """The causal language model itself, taken out of peft's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """The decoder without lm_head; its forward gives hidden states."""
    return causal_of(model).base_model


def response_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy over the response tokens; lm_head runs on their positions only. Inputs [B, T]."""
    hidden = decoder_of(model)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state  # [B, T, d]
    targets = labels[:, 1:]
    answered = targets != IGNORED
    hidden = hidden[:, :-1][answered]  # [response tokens, d]
    logits = causal_of(model).get_output_embeddings()(hidden)
    return cross_entropy(logits.float(), targets[answered], reduction="sum")


class RoutedTrainer(Trainer):
    """Trainer with CE + λ1(e)·L_rate − λ2·L_entropy (Eq. 8), every mean taken over the effective batch.

    CE is weighted by response token and the routing terms by rated token over all accumulated micro-batches
    of all processes, so that 4×1 gives 1×4, and two processes what one does. L_rate of kind "mean" is the
    absolute value of a mean over them all: the rate is found first, in a forward pass without gradients.
    keyed: whether the noise of gates follows from seed, step and row; several processes need it to.
    """

    # compute_loss divides by the counts of the whole optimizer step, so training_step must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, objective: Objective, router_lr: float, keyed: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.keyed = objective, keyed and objective.routed
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
        counts = self._over_processes(torch.stack([response, rated]).to(device))
        return batches, self._with_rate(batches, TokenCounts(counts[0], counts[1].clamp_min(1)))

    def _over_processes(self, values: Tensor) -> Tensor:
        """Their sum over all processes."""
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values

    def _with_rate(self, batches: list[dict[str, Tensor]], counts: TokenCounts) -> TokenCounts:
        """The counts, with the rate where a mean over several parts is asked for.

        The random numbers that the passes use are drawn again in training.
        """
        parts = len(batches) * self.accelerator.num_processes
        if not self.objective.routed or self.objective.rate_kind != "mean" or parts == 1:
            return counts
        devices = [self.args.device.index or 0] if self.args.device.type == "cuda" else []
        self.model.train()
        with torch.random.fork_rng(devices), torch.no_grad():
            open_ = sum(self._open(self._prepare_inputs(dict(batch))) for batch in batches)
        return counts._replace(rate=self._over_processes(open_) / counts.rated)

    def _open(self, inputs: dict[str, Tensor]) -> Tensor:
        """Sum over rated tokens of the share of layers that their gates open."""
        rated = self._rated(inputs)
        with self._recorded(inputs) as routes:
            self._cross_entropy(inputs)
        return routes.gates.mean(0)[rated].sum()

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
            terms = self._routed_terms(inputs, counts)
        else:
            ce = self._cross_entropy(inputs) / counts.response
            terms = {"ce": ce, "total": ce}
        if self._over_processes((~torch.isfinite(terms["total"].detach())).long()):
            raise UserError(describe_divergence(self.model, _texts(inputs), self.state.global_step))
        self._add_up({name: value.detach() for name, value in terms.items() if name != "total"})
        processes = self.accelerator.num_processes  # gradients are averaged over them
        return terms["total"] * processes if processes > 1 else terms["total"]

    def _cross_entropy(self, inputs: dict[str, Tensor]) -> Tensor:
        return response_loss(self.model, **_texts(inputs))

    @contextmanager
    def _recorded(self, inputs: dict[str, Tensor]) -> Iterator[Routes]:
        """The routes of a forward pass in this context, under noise by key if so asked for."""
        if self.keyed:
            key = NoiseKey(self.args.seed, self.state.global_step, inputs["example"].tolist())
            set_noise_key(self.model, key)
        try:
            with record_routes(self.model) as routes:
                yield routes
        finally:
            set_noise_key(self.model, None)

    def _routed_terms(self, inputs: dict[str, Tensor], counts: TokenCounts) -> dict[str, Tensor]:
        aim = self.objective
        with self._recorded(inputs) as routes:
            ce = self._cross_entropy(inputs) / counts.response
        rated = self._rated(inputs)  # [B, T]
        share = rated.sum() / counts.rated
        if counts.rate is None:
            rate = rate_loss(routes.gates, rated, aim.rate_target, aim.rate_kind) * share
        else:
            rate = share_of_mean_rate(routes.gates, rated, aim.rate_target, counts.rate, counts.rated)
        entropy = entropy_loss(routes.soft, rated) * share
        lambda1 = lambda1_at(self.state.global_step / self.state.max_steps, aim.lambda1)
        loss_ratio = routes.gates.detach().mean(0)[rated].mean() * share
        total = total_loss(ce, rate, entropy, lambda1, aim.lambda2)
        return {"ce": ce, "rate": rate, "entropy": entropy, "loss_ratio": loss_ratio, "total": total}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's; the last one before an optimizer step averages gradients over the processes."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            self._average_gradients()
        return loss

    def _average_gradients(self) -> None:
        """DistributedDataParallel would do it in a forward pass of the whole model; the loss has its own."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        mean = self.accelerator.reduce(torch.cat([g.flatten() for g in flat]), "mean")
        for parameter, part in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)

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
        sums = {name: float(self._over_processes(value)) for name, value in self._sums.items()}
        logs = {**logs, **{name: value / steps for name, value in sums.items()}}
        self._sums, self._summed_from = {}, self.state.global_step
        if self.objective.routed:
            logs["lambda1"] = lambda1_at(
                self.state.global_step / self.state.max_steps, self.objective.lambda1
            )
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted here: Trainer's count walks every parameter in every step; see efficiency.py."""
        return 0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing is clipped (D-LLM), and an unused norm over all gradients costs milliseconds a step."""
        return None

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Safetensors and JSON where Trainer pickles; none at the last step, as the model is saved next."""
        if self.state.global_step >= self.state.max_steps:
            return
        folder, first = Path(self.args.output_dir), self.is_world_process_zero()
        directory = checkpoints.place(folder, self.state.global_step)
        if first:
            checkpoints.begin(directory)
        self.accelerator.wait_for_everyone()
        rank = self.accelerator.process_index
        checkpoints.save_generators(directory, rank)
        checkpoints.save_sums(directory, {**self._sums, "loss": self._tr_loss}, self._summed_from, rank)
        self.accelerator.wait_for_everyone()
        if first:
            self._save(str(directory))
            checkpoints.save_optimizer(directory, self.optimizer, self.lr_scheduler)
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
            checkpoints.finish(directory)
        self.accelerator.wait_for_everyone()

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
            rank = self.accelerator.process_index
            checkpoints.load_generators(Path(checkpoint), rank)
            self._sums, self._summed_from = checkpoints.load_sums(Path(checkpoint), self.args.device, rank)
            self._tr_loss = self._sums.pop("loss")
            self._globalstep_last_logged = self._summed_from


def _texts(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without what the model does not read."""
    return {name: tensor for name, tensor in inputs.items() if name != "example"}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by name, detached and contiguous."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module, path: str) -> None:
    """Copy a file of trainable_state into the model; UserError if the two sets of names differ."""
    saved, own = load_file(path), trainable_state(model)
    if saved.keys() != own.keys():
        name = min(saved.keys() ^ own.keys())
        raise UserError(f"{path} is of another model: {name} is only on one side; delete it and run again.")
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)


def describe_divergence(model: nn.Module, inputs: Mapping[str, Tensor], step: int) -> str:
    """One sentence naming the step and the first decoder layer whose output is not finite."""
    layer = _first_non_finite_layer(model, inputs)
    where = "after the last layer" if layer is None else f"in layer {layer}"
    return (
        f"Training diverged at step {step}: the first non-finite numbers appear {where}; "
        "lower training.lr or training.router_lr in the profile."
    )


def _first_non_finite_layer(model: nn.Module, inputs: Mapping[str, Tensor]) -> int | None:
    bad: list[int] = []

    def watch(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not torch.isfinite(output[0] if isinstance(output, tuple) else output).all():
                bad.append(index)

        return hook

    handles = [layer.register_forward_hook(watch(i)) for i, layer in enumerate(decoder_of(model).layers)]
    with torch.no_grad():
        response_loss(model, **inputs)
    for handle in handles:
        handle.remove()
    return min(bad, default=None)
