"""From a float model to its quantized self: what may be quantized, the search, its application."""

from collections.abc import Sequence

from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.awq import (
    clip_weight,
    folded_linears,
    outgoing_scales,
    output_error,
    search_layer,
)
from qtale_lib.quantization.report import Grid, QuantizationReport
from qtale_lib.quantization.rtn import (
    BITS,
    check_grid,
    dequantize_groups,
    fake_quantize,
    quantize_groups,
)
from qtale_lib.quantization.statistics import READERS, InputStatistics, gather, layer_blocks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHOICES = {"method": ("awq", "rtn"), "backend": ("native", "autoawq"), "lm_head_bits": (*BITS, 16)}
LAYER = "model.layers.{}.{}"  # the full name of a module in a decoder layer


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that quantization touches, by full name."""
    names = [name for readers in READERS.values() for name in readers]
    layers = enumerate(model.model.layers)
    return {LAYER.format(i, name): layer.get_submodule(name) for i, layer in layers for name in names}


def check_quantizable(model: nn.Module, report: QuantizationReport) -> None:
    """Raise UserError unless `model` is merged, float, of a known family, and fits the report's settings."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError("the model carries an unmerged LoRA; quantize what merge_and_unload() returns.")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise UserError(f"cannot quantize a {family} model; known families: {', '.join(FAMILIES)}.")
    if hasattr(model, "quantization"):
        bits = model.quantization.bits
        raise UserError(f"the model is already quantized to {bits} bits; load its float weights again.")
    for key, allowed in CHOICES.items():
        if getattr(report, key) not in allowed:
            raise UserError(f"{key} is {getattr(report, key)!r}; allowed: {', '.join(map(str, allowed))}.")
    linears = decoder_linears(model)
    if report.lm_head_bits != 16:
        linears["lm_head"] = model.lm_head
    check_grid(linears, report.bits, report.group_size)


def search_model(model: nn.Module, rows: Sequence[Sequence[int]], report: QuantizationReport) -> None:
    """Fill `report` from token `rows`: every layer's search, unless there already, and every output error."""
    searching = report.method == "awq" and not report.scales
    for block in layer_blocks(model):
        statistics = gather(model, rows, block)
        unchosen = [i for i in block if statistics[i]["input_layernorm"].chosen == 0]
        if unchosen:
            statistics |= gather(model, rows, unchosen, executed_only=False)
        report.unchosen_layers += unchosen
        for i in block:
            layer = model.model.layers[i]
            alphas = _search_into(report, i, layer, statistics[i]) if searching else {}
            report.linears += _measure(report, i, layer, statistics[i], alphas)


def apply_report(model: nn.Module, report: QuantizationReport) -> nn.Module:
    """Fold the report's scales, clip, round every decoder linear of `model`; leaves `model.quantization`."""
    for i, layer in enumerate(model.model.layers):
        scales = _of_layer(report.scales, i, layer)
        for linear in folded_linears(layer, scales):
            clipped = _clipped(report, i, linear.name, linear.weight)
            _round_into(layer.get_submodule(linear.name), clipped, report, LAYER.format(i, linear.name))
        fold_into_producers(layer, scales)
    if report.lm_head_bits != 16:
        _untie_lm_head(model)
        _round_into(model.lm_head, model.lm_head.weight.float(), report, "lm_head", report.lm_head_bits)
    model.quantization = report
    return model


def fold_into_producers(layer: nn.Module, scales: dict[str, Tensor]) -> None:
    """Divide norm weights and linear biases by their outputs' scales (linear weights: `folded_linears`)."""
    for name, scale in outgoing_scales(layer, scales).items():
        producer = layer.get_submodule(name)
        parameter = producer.bias if isinstance(producer, nn.Linear) else producer.weight
        if parameter is not None:
            parameter.data = (parameter.float() / scale).to(parameter.dtype)


def _search_into(
    report: QuantizationReport, i: int, layer: nn.Module, statistics: dict[str, InputStatistics]
) -> dict[str, float | None]:
    found = search_layer(layer, statistics, report.bits, report.group_size)
    report.scales |= {LAYER.format(i, name): scale for name, scale in found.scales.items()}
    report.clips |= {LAYER.format(i, name): clip for name, clip in found.clips.items()}
    return found.alphas


def _measure(
    report: QuantizationReport,
    i: int,
    layer: nn.Module,
    statistics: dict[str, InputStatistics],
    alphas: dict[str, float | None],
) -> list[dict]:
    """One row of `report.linears` for each linear of the layer, which is still unquantized."""
    producers = {name: producer for producer, readers in READERS.items() for name in readers}
    found = []
    for linear in folded_linears(layer, _of_layer(report.scales, i, layer), statistics):
        name, folded = linear.name, linear.weight
        weight, inputs = layer.get_submodule(name).weight.float(), statistics[producers[name]]
        rtn = output_error(fake_quantize(weight, report.bits, report.group_size) - weight, inputs.moment)
        error = output_error(_rounded(report, i, name, folded) - folded, linear.moment)
        if linear.row_scale is not None:
            error = error * linear.row_scale**2  # back to the unscaled output
        found.append(
            {
                "name": LAYER.format(i, name),
                "tokens": inputs.tokens,
                "alpha": alphas.get(producers[name]),
                "clip": _kept_range(report, i, name, folded),
                "error": error.mean().item(),
                "error_rtn": rtn.mean().item(),
                "power": output_error(weight, inputs.moment).mean().item(),
            }
        )
    return found


def _rounded(report: QuantizationReport, i: int, name: str, folded: Tensor) -> Tensor:
    return fake_quantize(_clipped(report, i, name, folded), report.bits, report.group_size)


def _clipped(report: QuantizationReport, i: int, name: str, folded: Tensor) -> Tensor:
    clip = report.clips.get(LAYER.format(i, name))
    return folded if clip is None else clip_weight(folded, clip.to(folded.device))


def _round_into(
    linear: nn.Linear, weight: Tensor, report: QuantizationReport, name: str, bits: int | None = None
) -> None:
    """Give `linear` its `weight` [out, in] rounded, and the report the grid that it now lies on."""
    bits = bits or report.bits
    codes, step, zero = quantize_groups(weight, bits, report.group_size)
    linear.weight.data = dequantize_groups(codes, step, zero).to(linear.weight.dtype)
    report.grids[name] = Grid(step.squeeze(-1), zero.squeeze(-1).byte(), bits)


def _kept_range(report: QuantizationReport, i: int, name: str, folded: Tensor) -> float | None:
    """Mean over groups of clip / largest magnitude; None for a linear that is not clipped."""
    clip = report.clips.get(LAYER.format(i, name))
    if clip is None:
        return None
    largest = folded.abs().unflatten(1, (clip.shape[1], -1)).amax(-1)
    return (clip.to(folded.device) / largest.clamp(min=1e-30)).mean().item()


def _of_layer(scales: dict[str, Tensor], i: int, layer: nn.Module) -> dict[str, Tensor]:
    device = layer.input_layernorm.weight.device
    keys = {producer: LAYER.format(i, producer) for producer in READERS}
    return {producer: scales[key].to(device) for producer, key in keys.items() if key in scales}


def _untie_lm_head(model: nn.Module) -> None:
    """A parameter of its own for lm_head, since the embedding that it may share keeps 16 bits."""
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach(), requires_grad=head.requires_grad)
    model.config.tie_word_embeddings = False
