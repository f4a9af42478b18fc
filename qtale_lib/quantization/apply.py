"""From a float model to its quantized self: what may be quantized, the search over all layers, and its application."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.awq import clip_weight, folded_linears, outgoing_scales, output_error, search_layer
from qtale_lib.quantization.report import QuantizationReport
from qtale_lib.quantization.rtn import BITS, check_grid, fake_quantize
from qtale_lib.quantization.statistics import READERS, InputStatistics, gather, layer_blocks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
METHODS = ("awq", "rtn")
BACKENDS = ("native", "autoawq")
LAYER = "model.layers.{}.{}"  # the full name of a module in a decoder layer


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that quantization touches, by full name."""
    names = [name for readers in READERS.values() for name in readers]
    layers = enumerate(model.model.layers)
    return {LAYER.format(i, name): layer.get_submodule(name) for i, layer in layers for name in names}


def check_quantizable(model: nn.Module, report: QuantizationReport) -> None:
    """Raise UserError unless `model` is a merged float model of a known family that the report's settings fit."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError("the model carries an unmerged LoRA; call merge_and_unload() first, then quantize the result.")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UserError(f"cannot quantize a {family} model; known families: {', '.join(FAMILIES)}.")
    if hasattr(model, "quantization"):
        raise UserError(f"the model is already quantized to {model.quantization.bits} bits; load its float weights again.")
    for key, allowed in {"method": METHODS, "backend": BACKENDS, "lm_head_bits": (*BITS, 16)}.items():
        if getattr(report, key) not in allowed:
            raise UserError(f"{key} is {getattr(report, key)!r}; allowed: {', '.join(map(str, allowed))}.")
    linears = decoder_linears(model)
    if report.lm_head_bits != 16:
        linears["lm_head"] = model.lm_head
    check_grid(linears, report.bits, report.group_size)


def search_model(model: nn.Module, rows: Sequence[Sequence[int]], report: QuantizationReport) -> None:
    """Fill `report` from calibration token `rows`: the search of every layer (AWQ) and every linear's output error."""
    for block in layer_blocks(model):
        statistics = gather(model, rows, block)
        unused = [i for i in block if statistics[i]["input_layernorm"].tokens == 0]
        if unused:
            statistics |= gather(model, rows, unused, executed_only=False)
        report.layers_without_tokens += unused
        for i in block:
            alphas = _search_into(report, i, model.model.layers[i], statistics[i]) if report.method == "awq" else {}
            report.linears += _measure(report, i, model.model.layers[i], statistics[i], alphas)


def apply_report(model: nn.Module, report: QuantizationReport) -> nn.Module:
    """Fold the report's scales, clip, round every decoder linear of `model` to its grid; leaves `model.quantization`."""
    for i, layer in enumerate(model.model.layers):
        scales = _of_layer(report.scales, i, layer)
        for name, weight, _, _ in folded_linears(layer, scales):
            target = layer.get_submodule(name).weight
            target.data = _rounded(report, i, name, weight).to(target.dtype)
        fold_into_producers(layer, scales)
    if report.lm_head_bits != 16:
        _round_lm_head(model, report)
    model.quantization = report
    return model


def fold_into_producers(layer: nn.Module, scales: dict[str, Tensor]) -> None:
    """Divide norm weights and linear biases by the scales of their outputs (linear weights: `folded_linears`)."""
    for name, scale in outgoing_scales(layer, scales).items():
        producer = layer.get_submodule(name)
        for parameter in (producer.bias,) if isinstance(producer, nn.Linear) else (producer.weight,):
            if parameter is not None:
                parameter.data = (parameter.float() / scale).to(parameter.dtype)


def _search_into(
    report: QuantizationReport, i: int, layer: nn.Module, statistics: dict[str, InputStatistics]
) -> dict[str, float]:
    found = search_layer(layer, statistics, report.bits, report.group_size)
    report.scales |= {LAYER.format(i, name): scale for name, scale in found.scales.items()}
    report.clips |= {LAYER.format(i, name): clip for name, clip in found.clips.items()}
    return found.alphas


def _measure(
    report: QuantizationReport, i: int, layer: nn.Module, statistics: dict[str, InputStatistics], alphas: dict[str, float]
) -> list[dict]:
    """One row of `report.linears` for each linear of the layer, still unquantized."""
    scales = _of_layer(report.scales, i, layer)
    producers = {name: producer for producer, readers in READERS.items() for name in readers}
    found = []
    for name, folded, moment, rows in folded_linears(layer, scales, statistics):
        error = output_error(_rounded(report, i, name, folded) - folded, moment)
        error = error if rows is None else error * rows**2  # back to the unscaled output
        weight, inputs = layer.get_submodule(name).weight.float(), statistics[producers[name]]
        rtn = output_error(fake_quantize(weight, report.bits, report.group_size) - weight, inputs.moment)
        found.append({
            "name": LAYER.format(i, name),
            "tokens": inputs.tokens,
            "alpha": alphas.get(producers[name]),
            "clip": _kept_range(report, i, name, folded),
            "error": error.mean().item(),
            "error_rtn": rtn.mean().item(),
            "power": output_error(weight, inputs.moment).mean().item(),
        })  # fmt: skip
    return found


def _rounded(report: QuantizationReport, i: int, name: str, folded: Tensor) -> Tensor:
    clip = report.clips.get(LAYER.format(i, name))
    clipped = folded if clip is None else clip_weight(folded, clip.to(folded.device))
    return fake_quantize(clipped, report.bits, report.group_size)


def _kept_range(report: QuantizationReport, i: int, name: str, folded: Tensor) -> float | None:
    """Mean over groups of clip / largest magnitude; None for a linear that is not clipped."""
    clip = report.clips.get(LAYER.format(i, name))
    if clip is None:
        return None
    largest = folded.abs().unflatten(1, (clip.shape[1], -1)).amax(-1)
    return (clip / largest.clamp(min=1e-30)).mean().item()


def _of_layer(scales: dict[str, Tensor], i: int, layer: nn.Module) -> dict[str, Tensor]:
    device = layer.input_layernorm.weight.device
    keys = {producer: LAYER.format(i, producer) for producer in READERS}
    return {producer: scales[key].to(device) for producer, key in keys.items() if key in scales}


def _round_lm_head(model: nn.Module, report: QuantizationReport) -> None:
    head = model.lm_head.weight
    rounded = fake_quantize(head.float(), report.lm_head_bits, report.group_size).to(head.dtype)
    model.lm_head.weight = nn.Parameter(rounded, requires_grad=head.requires_grad)  # unties it from the embedding
    model.config.tie_word_embeddings = False
