"""A saved model whose weights are read from their files when they are asked for, and let go of again.

    streamed = StreamedModel(folder)
    with streamed.loaded("model.layers.3") as layer:
        ...

The folder is a base, its files one or many, or what `save_routed` wrote: LoRA is then merged into each weight
as it is read, by peft. Of a model that is larger than the memory, a layer at a time can so be worked on.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qtale_lib.adaptive import (
    RECORD,
    ROUTERS,
    RouterConfig,
    add_adapter,
    add_routers,
    base_digest,
    read_record,
    set_threshold,
)
from qtale_lib.base import find_base, header, tensor_files
from qtale_lib.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class StreamedModel:
    """The "16-bit" model of a folder: LoRA merged, every weight but the routers' rounded to bfloat16.

    It computes in its own dtype: a float32 model with rounded values in float32.

    model: on meta, with routers and θ, in evaluation mode; what is loaded of it lies on `device`.

    Raises:
        UserError: if weights are missing, damaged or misshapen, or the base is not the one trained on.
    """

    def __init__(self, directory: str | Path, device: torch.device | str = "cpu"):
        directory = Path(directory)
        record = read_record(directory) if (directory / RECORD).is_file() else {"adapter": False}
        folder = (
            find_base(record["base"]["name"], record["base"].get("revision"))
            if record["adapter"]
            else directory
        )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dtype = getattr(torch, record["base"]["dtype"]) if record["adapter"] else config.dtype
        self.device = torch.device(device)
        self.model = empty_model(config, dtype, record.get("routers"), record.get("threshold"))
        self.model.requires_grad_(False)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config).to(device)  # in no file
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder)
        self._types = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        self._tied = config.tie_word_embeddings
        self._files = tensor_files(folder)
        if record.get("routers") is not None:
            self._files |= dict.fromkeys(header(directory / ROUTERS), directory / ROUTERS)
        self._check_shapes(folder)
        self._adapted: dict[str, LoraLayer] = {}
        if record["adapter"]:
            self._check_base(record["base"])
            twin = add_adapter(_weightless(self.model), directory).get_base_model()
            self._adapted = {n: layer for n, layer in twin.named_modules() if isinstance(layer, LoraLayer)}

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder layers."""
        return self.model.model.layers

    def tensor(self, name: str) -> Tensor:
        """A tensor of the 16-bit model, on the CPU; it may be mapped from its file: never write into it."""
        tensor = self._read(name)
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module in self._adapted:
            layer = copy.deepcopy(self._adapted[module])
            layer.get_base_layer().weight = nn.Parameter(tensor.clone(), requires_grad=False)
            layer.merge()
            tensor = layer.get_base_layer().weight.data
        return tensor if ".router." in name else tensor.to(torch.bfloat16).to(tensor.dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor) of the model's state, one at a time, in order of name."""
        return ((name, self.tensor(name)) for name in sorted(self._types))

    @contextmanager
    def loaded(self, *modules: str) -> Iterator[list[nn.Module]]:
        """Modules with their weights on `device` meanwhile; they go back to meta, whatever they are then."""
        try:
            for name in modules:
                self._load(name)
            yield [self.model.get_submodule(name) for name in modules]
        finally:
            for name in modules:
                self.model.get_submodule(name).to("meta")
            _trim()

    def whole(self) -> PreTrainedModel:
        """All of it, loaded for good."""
        self._load("")
        self.model.tie_weights()
        return self.model

    def _load(self, module: str) -> None:
        prefix = f"{module}." if module else ""
        target = self.model.get_submodule(module)
        # each copied before the next is read, so that no more is mapped than one tensor
        own = {name: self.tensor(prefix + name).to(self.device, copy=True) for name in target.state_dict()}
        target.load_state_dict(own, assign=True)

    def _read(self, name: str) -> Tensor:
        """A tensor as the base has it; the file is mapped anew, else what was read would stay in memory."""
        place = self._place(name)
        with safe_open(self._files[place], "pt") as file:
            return file.get_tensor(place).to(self._types[name])

    def _place(self, name: str) -> str:
        """The name of a tensor in the files: a tied lm_head is the embedding."""
        return f"{EMBEDDING}.weight" if self._tied and name == f"{HEAD}.weight" else name

    def _check_shapes(self, folder: Path) -> None:
        shapes = {path: header(path) for path in set(self._files.values())}
        for name, tensor in self.model.state_dict().items():
            place = self._place(name)
            found = shapes.get(self._files.get(place), {}).get(place)
            if found != list(tensor.shape):
                raise UserError(
                    f"{place} is missing or misshapen in {folder}; copy, download or save the model anew."
                )

    def _check_base(self, base: dict[str, str]) -> None:
        names = sorted(name for name, _ in self.model.named_parameters() if ".router." not in name)
        if base_digest((name, self._read(name)) for name in names) != base["sha256"]:
            raise UserError(f"The base {base['name']!r} is not the one trained on (sha256): restore it.")


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, routers: dict[str, Any] | None, threshold: float | None
) -> PreTrainedModel:
    """A causal model with routers (the fields of RouterConfig; None: without), no memory behind any of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if routers is not None:
            add_routers(model, RouterConfig(**routers))
            set_threshold(model, threshold)
    return model.eval()


def _trim() -> None:
    """Give freed memory back to the system; glibc would keep what lies between pieces in use."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _weightless(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the CPU, each weight one zero seen many times: peft moves LoRA to where it finds the base."""
    twin = copy.deepcopy(model)
    zeros = {name: torch.zeros(1, dtype=t.dtype).expand(t.shape) for name, t in twin.state_dict().items()}
    twin.load_state_dict(zeros, assign=True)
    return twin
