"""The search of autoawq 0.2.9 (archived; Linux) as a second AWQ, to hold ours against.

autoawq searches on a copy of the model; what it finds is applied by our own code, so that a kept search means
the same from either backend. Two things set it apart from ours, and both are its own: it joins the
calibration texts into blocks of one length, and its statistics count the tokens that bypass a layer.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from qtale_lib.errors import UserError

with warnings.catch_warnings(record=True):  # its farewell message, which no filter stops
    from awq.models.llama import LlamaAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

OUT_MULTIPLE = 64  # autoawq clips its rows in blocks of this many


class RoutedAWQ(LlamaAWQForCausalLM):
    """Any model built of Llama-like decoder layers, routed or not; routers stay as they are."""

    modules_to_not_convert = ("router",)


class RecordingQuantizer(AwqQuantizer):
    """autoawq's quantizer, keeping what it finds, and right on a CPU.

    It restores the searched weights from `state_dict()[…].cpu()`, which on a CPU is no copy: the first grid
    point then stays multiplied into the weights for good. A copy is handed to it instead.
    """

    def __init__(self, *args, **kwargs):
        self.found_scales: dict[str, Tensor] = {}
        self.found_clips: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def _search_best_scale(self, module, *args, **kwargs):
        producer, readers, scale = super()._search_best_scale(module, *args, **kwargs)
        self.found_scales[self._full_name(module, producer)] = scale.float()
        return producer, readers, scale

    def _search_best_clip(self, layer, *args, **kwargs):
        clips = super()._search_best_clip(layer, *args, **kwargs)
        # [out, in/group, 1] -> [out, in/group]
        self.found_clips |= {self._full_name(layer, name): clip.squeeze(-1).float() for name, clip in clips}
        return clips

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *args, **kwargs):
        hook = module2inspect.register_state_dict_post_hook(_clone_entries)
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args, **kwargs)
        finally:
            hook.remove()

    def _sanitize_kwargs(self, inputs_kwargs, module):
        # It drops what the signature does not name; a routed layer passes on what it does not name.
        return inputs_kwargs if hasattr(module, "router") else super()._sanitize_kwargs(inputs_kwargs, module)

    def _full_name(self, layer: nn.Module, name: str) -> str:
        index = next(i for i, known in enumerate(self.modules) if known is layer)
        return f"model.layers.{index}.{name}"


def search_with_autoawq(
    model: nn.Module, rows: Sequence[Sequence[int]], bits: int, group_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Scales by producer and clips by linear, as in QuantizationReport, and a note on the blocks of tokens
    used.

    `model` is left as it is. UserError for shapes that autoawq cannot search.
    """
    _check_shapes(model, group_size)
    length = max(map(len, rows))
    twin = copy.deepcopy(model).eval()
    twin.config.use_cache = False  # else its captured arguments hold a cache that grows through the search
    wrapped = RoutedAWQ(twin, twin.config.model_type, False, twin.config, None, None)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        wrapped.quantize(
            _NoTokenizer(),
            {"zero_point": True, "q_group_size": group_size, "w_bit": bits, "version": "GEMM"},
            calib_data=[list(row) for row in rows],
            export_compatible=True,  # scale and clip, do not pack
            max_calib_samples=len(rows),
            max_calib_seq_len=length,
            quantizer_cls=RecordingQuantizer,
        )
    quantizer = wrapped.quantizer
    blocks = quantizer.inps.shape[0]
    note = {
        "block_length": length,
        "blocks": blocks,
        "tokens_left_off": sum(map(len, rows)) - blocks * length,
    }
    return quantizer.found_scales, quantizer.found_clips, note


def _check_shapes(model: nn.Module, group_size: int) -> None:
    if group_size == -1:
        raise UserError("autoawq knows no group size -1; give a positive one, or use backend='native'.")
    for name, linear in model.model.layers[0].named_modules():
        if isinstance(linear, nn.Linear) and "router" not in name and linear.out_features % OUT_MULTIPLE:
            raise UserError(
                f"autoawq needs output widths that are multiples of {OUT_MULTIPLE}, and {name} has "
                f"{linear.out_features}; use backend='native'."
            )


def _clone_entries(module, state: dict[str, Tensor], prefix: str, metadata) -> None:
    for name, tensor in state.items():
        state[name] = tensor.clone()


class _NoTokenizer:
    """autoawq wants a tokenizer; rows are tokens already."""
