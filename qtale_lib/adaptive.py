"""Routers in a Hugging Face causal model: attach them, set θ, record their decisions, save and load.

QTALE Sec. 3.1 and 3.4, after D-LLM. The base model keeps its parameter names and gains
`...layers.{i}.router.*`.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from qtale_lib.base import find_base
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.routed_layers import ForwardPass, RouterConfig, RoutingState, routed_class, start_pass
from qtale_lib.routing import Router, threshold_shift
from qtale_lib.store import read_json, write_json

SUPPORTED = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def add_routers(model: nn.Module, config: RouterConfig | None = None) -> nn.Module:
    """Give a Llama, Mistral, Qwen2 or Qwen3 causal model routers, in place; returns the same model.

    Args:
        model: the causal model, bare or inside peft.
        config: see `RouterConfig`.
    Raises:
        UserError: for another class, for a model that has routers, for one with too few layers.
    """
    config = config or RouterConfig()
    decoder = _find_decoder(model)
    layers = decoder.layers
    if hasattr(decoder, "routing"):
        raise UserError("This model has routers already: start again from the base model.")
    if config.always_run_layers >= len(layers):
        raise UserError(
            f"always_run_layers {config.always_run_layers} leaves none of {len(layers)} to route: lower it."
        )
    decoder.routing = RoutingState(config, len(layers))
    for layer in list(layers)[config.always_run_layers :]:
        _add_router(layer, decoder.config.hidden_size, config)
    decoder.register_forward_pre_hook(start_pass, with_kwargs=True)
    return model


def _add_router(layer: nn.Module, d: int, config: RouterConfig) -> None:
    router = Router(d, config.hidden or max(1, d // 8), config.execute_bias, config.bypass_bias)
    layer.router = router.to(next(layer.parameters()).device)
    layer.__class__ = routed_class(type(layer))


def _find_decoder(model: nn.Module) -> PreTrainedModel:
    """The stack of decoder layers (`LlamaModel` and its like) inside a supported causal model."""
    for module in model.modules():
        if isinstance(module, SUPPORTED):
            return module.model
    names = ", ".join(cls.__name__ for cls in SUPPORTED)
    raise UserError(f"Routers cannot be added to a {type(model).__name__}: use one of {names}.")


def routing_state(model: nn.Module) -> RoutingState:
    """The routing state of a routed model, bare or inside peft.

    Raises:
        UserError: if the model has no routers.
    """
    state = _state_or_none(model)
    if state is None:
        raise UserError("This model has no routers: call add_routers first.")
    return state


def reserved_tokens(model: nn.Module) -> int:
    """How many first tokens of a sequence always run; without routers, as many as routers would leave by
    default, so that ratios of both are over the same tokens.
    """
    state = _state_or_none(model)
    return (RouterConfig() if state is None else state.config).always_run_tokens


def set_threshold(model: nn.Module, theta: float | Sequence[float]) -> None:
    """Set the execution threshold θ of evaluation mode (Sec. 3.4, Eq. 9): 0.5 is arg max, 0 runs everything.

    Several are those of the routed layers, one for each.

    Raises:
        UserError: if a θ is no number or outside [0, 1), if there are not as many as routed layers, or the
            model has no routers.
    """
    state, several = routing_state(model), isinstance(theta, list | tuple)
    for value in theta if several else [theta]:
        if not isinstance(value, Real):
            raise UserError(f"The threshold θ is {value!r}: it must be a number of at least 0 and below 1.")
        threshold_shift(value)
    if several and len(theta) != len(state.routed_layers):
        raise UserError(f"There are {len(theta)} θ for {len(state.routed_layers)} layers with routers.")
    state.theta = list(theta) if several else theta


def set_noise(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the Gumbel noise of training from `generator`; None goes back to torch's global one."""
    routing_state(model).generator = generator


@contextmanager
def keyed_noise(model: nn.Module, keys: Sequence[Sequence[int]]) -> Iterator[None]:
    """Meanwhile, each sequence of a batch gets the noise of its key (see `routing.keyed_gumbel`)."""
    state = routing_state(model)
    state.keys = keys
    try:
        yield
    finally:
        state.keys = None


def set_execution(model: nn.Module, mode: str) -> None:
    """Choose how evaluation runs; routes and results are the same but for rounding, training is always dense.

    mode: "dense" computes every layer for every token and applies the decisions; "skip" computes a layer for
        the tokens that execute it only, and caches no keys of others; "auto", at first, skips while
        evaluation.py scores and is dense elsewhere.
    Raises:
        UserError: for another mode, or if the model has no routers.
    """
    if mode not in ("auto", "dense", "skip"):
        raise UserError(f'Execution mode {mode!r} is unknown: use "auto", "dense" or "skip".')
    routing_state(model).execution = mode


@contextmanager
def skipping_if_auto(model: nn.Module) -> Iterator[None]:
    """Skip meanwhile in a model that is left on "auto"; others, and models without routers, stay as set."""
    state = _state_or_none(model)
    if state is None or state.execution != "auto":
        yield
        return
    state.execution = "skip"
    try:
        yield
    finally:
        state.execution = "auto"


class Routes:
    """The decisions of the last forward pass; steps that go on from a cache (generation) are appended to it.

    executed: bool [L, B, T] over all decoder layers; always-run ones True; False on padding.
    logits: float32 [L, B, T, 2], NaN on always-run layers; detached.
    valid: bool [B, T], False on padding.
    routed_layers: indices of the layers with routers.
    gates (training): [L, B, T], hard with straight-through gradient; ones on always-run layers.
    soft (training): b-tilde of Eq. 6, [routed layers, B, T, 2], differentiable.
    """

    def __init__(self, state: RoutingState):
        self._passes: list[ForwardPass] = []
        self.routed_layers = state.routed_layers

    def add(self, forward_pass: ForwardPass) -> None:
        """Called at the start of each forward pass."""
        self._passes = [*self._passes, forward_pass] if forward_pass.past else [forward_pass]

    @property
    def valid(self) -> Tensor:
        return torch.cat([p.valid for p in self._recorded()], dim=1)

    @property
    def executed(self) -> Tensor:
        return self._join("executed", lambda p: p.valid)

    @property
    def logits(self) -> Tensor:
        return self._join(
            "logits", lambda p: torch.full((*p.valid.shape, 2), torch.nan, device=p.valid.device)
        )

    @property
    def gates(self) -> Tensor:
        return self._join("gates", lambda p: torch.ones_like(p.valid, dtype=torch.float32))

    @property
    def soft(self) -> Tensor:
        return self._join("soft")

    def _recorded(self) -> list[ForwardPass]:
        if not self._passes:
            raise UserError("No routes are recorded: run the model inside record_routes first.")
        return self._passes

    def _join(self, name: str, always_run: Callable[[ForwardPass], Tensor] | None = None) -> Tensor:
        """[layers, B, T, ...] of what was kept per routed layer; `always_run` adds the others' values."""
        steps = []
        for step in self._recorded():
            values = getattr(step, name)
            if not values:
                raise UserError(
                    f"{name.capitalize()} are recorded in training mode only: call model.train()."
                )
            first = [always_run(step)] * self.routed_layers[0] if always_run else []
            steps.append(torch.stack([*first, *(values[layer] for layer in self.routed_layers)]))
        return torch.cat(steps, dim=2)


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Record the decisions of the forward passes inside the context; see `Routes`.

    >>> with record_routes(model) as routes:
    ...     model(**batch)
    >>> routes.executed[:, routes.valid].float().mean()  # the execution ratio R_avg
    """
    state = routing_state(model)
    outer, state.recorder = state.recorder, Routes(state)
    try:
        yield state.recorder
    finally:
        state.recorder = outer


RECORD, ROUTERS = "routed.json", "routers.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_routed(
    model: nn.Module, directory: str | Path, base: str | None = None, revision: str | None = None
) -> None:
    """Save a model with its routers, θ and RouterConfig, as safetensors and JSON; `load_routed` rebuilds it.

    A peft model with unmerged LoRA is saved without its base: LoRA, routers, and the base's name and sha256.
    Any other is saved whole, as a Hugging Face folder. A model without routers ("full") goes the same way.

    Args:
        base: name of the base for `base.find_base`; None takes the one that the model was loaded from.
        revision: of the base, if that is on the hub.
    Raises:
        UserError: for an adapter that is merged in place or no plain LoRA, or a base without a name.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (RECORD, ROUTERS, ADAPTER, ADAPTER_CONFIG):
        (directory / stale).unlink(missing_ok=True)
    state = _state_or_none(model)
    record = {"format": 1, "adapter": isinstance(model, PeftModel), "threshold": None, "routers": None}
    if state is not None:
        record |= {"threshold": state.theta, "routers": asdict(state.config)}
        save_file(_contiguous(_router_tensors(model)), directory / ROUTERS)
    if isinstance(model, PeftModel):
        record["base"] = {**_save_adapter(model, directory, base), "revision": revision}
    else:
        own = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
        model.save_pretrained(directory, state_dict=own)
    write_json(directory / RECORD, record)


def load_routed(directory: str | Path) -> nn.Module:
    """Rebuild what `save_routed` saved, in evaluation mode on the CPU; the base is found by its name.

    Raises:
        UserError: if the folder holds no such model, tensors are missing or left over, or the base differs.
    """
    directory = Path(directory)
    record = read_record(directory)
    model = _load_base(record["base"]) if record["adapter"] else _load_whole(directory)
    if record["routers"] is not None:
        add_routers(model, RouterConfig(**record["routers"]))
        set_threshold(model, record["threshold"])
        routers = _read_strictly(directory / ROUTERS, _router_tensors(model))
        model.load_state_dict(routers, strict=False)  # strict already: the names were compared
    if record["adapter"]:
        model = add_adapter(model, directory)
    return model.eval()


def read_record(directory: Path) -> dict[str, Any]:
    """What `save_routed` wrote beside the tensors; DamagedError if there is none, or it is another thing."""
    path = directory / RECORD
    if not path.is_file():
        raise DamagedError(f"{directory} holds no {RECORD}: point at a folder written by save_routed.")
    record = read_json(path)
    if not isinstance(record, dict) or not record.keys() >= {"adapter", "threshold", "routers"}:
        raise DamagedError(f"{path} is damaged: save the model again.")
    return record


def add_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """The model inside peft, with the LoRA saved in a folder."""
    config = PeftConfig.from_pretrained(directory)
    config.base_model_name_or_path = model.name_or_path  # the base may lie elsewhere today
    wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, _read_strictly(directory / ADAPTER, _lora_tensors(wrapped)))
    return wrapped


def weights_digest(model: nn.Module) -> str:
    """sha256 of the base's parameters (names, types, shapes, bytes); LoRA, routers, peft's names left out.

    Of a sharded model, every process has to ask: the parts of a parameter are put together.
    """
    named = ((_base_name(name), parameter) for name, parameter in model.named_parameters())
    own = [(name, tensor) for name, tensor in named if "lora_" not in name and ".router." not in name]
    return base_digest(sorted(own))


def base_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """The same of parameters by the base's names, of which each may be read when its turn comes."""
    digest = hashlib.sha256()
    for name, tensor in parameters:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _save_adapter(model: PeftModel, directory: Path, base: str | None) -> dict[str, str]:
    config = model.peft_config.get("default")
    if config is None or config.peft_type != "LORA" or config.bias != "none" or config.modules_to_save:
        raise UserError("Only one plain LoRA adapter (no biases, no modules_to_save) can be saved.")
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise UserError("The LoRA adapter is merged in place: call merge_and_unload before saving.")
    name = base or model.get_base_model().config.name_or_path
    if not name:
        raise UserError("The base model has no name to find it by: pass base= to save_routed.")
    written = copy.copy(config)
    if isinstance(written.target_modules, set):  # its order is another one in every process
        written.target_modules = sorted(written.target_modules)
    written.save_pretrained(directory)
    save_file(_contiguous(_lora_tensors(model)), directory / ADAPTER)
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "sha256": weights_digest(model)}


def _load_base(base: dict[str, str]) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        find_base(base["name"], base.get("revision")),
        dtype=getattr(torch, base["dtype"]),
        use_safetensors=True,
        trust_remote_code=False,
    )
    if weights_digest(model) != base["sha256"]:
        raise DamagedError(f"The base {base['name']!r} is not the one trained on (sha256): restore it.")
    return model


def _load_whole(directory: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise DamagedError(f"The weights in {directory} do not fit their model ({wrong}): save it again.")
    return model


def _read_strictly(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file, refused unless names and shapes are those expected."""
    if not path.exists():
        raise DamagedError(f"{path} is missing: save the model again.")
    try:
        tensors = load_file(path)
    except SafetensorError:
        raise DamagedError(f"{path} is no readable safetensors file: save the model again.") from None
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong = wrong or [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    if wrong:
        raise DamagedError(
            f"{path} does not fit: {wrong[0]} (and {len(wrong) - 1} more) missing, left over or misshapen."
        )
    return tensors


def _router_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = model.state_dict()
    return {_base_name(name): tensor for name, tensor in tensors.items() if ".router." in name}


def _lora_tensors(model: PeftModel) -> dict[str, Tensor]:
    # of LoRA alone: peft would put a sharded base together for it, which takes every process
    own = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    return get_peft_model_state_dict(model, own, save_embedding_layers=False)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _state_or_none(model: nn.Module) -> RoutingState | None:
    states = (getattr(module, "routing", None) for module in model.modules())
    return next((state for state in states if isinstance(state, RoutingState)), None)
