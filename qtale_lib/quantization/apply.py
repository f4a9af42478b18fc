"""From a float model to its quantized self: what may be quantized, the search, its application."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qtale_lib.errors import UserError
from qtale_lib.finite import is_finite, place
from qtale_lib.quantization import awq, gptq, magr
from qtale_lib.quantization.awq import clip_weight, folded_linears, outgoing_scales, output_error
from qtale_lib.quantization.bitpack import unpack_codes
from qtale_lib.quantization.report import TENSORS, Grid, QuantizationReport
from qtale_lib.quantization.rtn import (
    BITS,
    by_rows,
    check_grid,
    dequantize_groups,
    quantize_groups,
)
from qtale_lib.quantization.statistics import (
    READERS,
    Batch,
    InputStatistics,
    enter,
    is_routed,
    run_layer,
    tokenize,
)

# A quantizer by name: its search in a layer, given (layer, statistics, bits, group size); None: it has none.
SEARCHES = {"rtn": None, "awq": awq.search_layer, "gptq": gptq.search_layer, "magr_gptq": magr.search_layer}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHOICES = {"method": tuple(SEARCHES), "backend": ("native", "autoawq"), "lm_head_bits": (*BITS, 16)}
LAYER = "model.layers.{}.{}"  # the full name of a module in a decoder layer


def decoder_linears(model: nn.Module, layers: Iterable[int] | None = None) -> dict[str, nn.Linear]:
    """The linear layers that quantization touches, by full name, of some decoder layers or all."""
    layers = range(len(model.model.layers)) if layers is None else layers
    readers = [name for names in READERS.values() for name in names]
    names = (LAYER.format(i, name) for i in layers for name in readers)
    return {name: model.get_submodule(name) for name in names}


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


def check_same_model(sha256: str, report: QuantizationReport, search: str | Path) -> None:
    """UserError unless the report in folder `search` was made from the model of this hash."""
    if sha256 != report.model_sha256:
        raise UserError(f"the search in {search} was made from another model; quantize this one anew.")


def prepare(
    model: nn.Module, report: QuantizationReport, tokenizer, texts: Iterable[str] | None, max_length: int
) -> list[list[int]] | None:
    """Token rows to calibrate on, as the report then says; None without texts.

    Raises:
        UserError: as `check_quantizable`; for a search without texts, or texts that are no list of texts.
    """
    check_quantizable(model, report)
    if SEARCHES[report.method] and (tokenizer is None or texts is None):
        name = report.method.upper().replace("_", "+")
        raise UserError(
            f"{name} calibrates on text; pass a tokenizer and a list of texts, or use method='rtn'."
        )
    if is_routed(model):
        report.threshold = model.model.routing.theta
    if texts is None:
        return None
    longest = min(max_length, model.config.max_position_embeddings)
    rows, record = tokenize(tokenizer, _listed(texts), longest)
    report.calibration = record.as_dict()
    return rows


def _listed(texts: Iterable[str]) -> list[str]:
    listed = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [None]
    if not all(isinstance(text, str) for text in listed):
        raise UserError(f"texts ({type(texts).__name__}) must be a list of texts; put a single one into [ ].")
    return listed


def search_model(model: nn.Module, rows: Sequence[Sequence[int]], report: QuantizationReport) -> None:
    """Fill `report` from token `rows`: every layer's search, unless there already, and every output error."""
    batches = enter(model, rows)
    for i in range(len(model.model.layers)):
        search_in_layer(model, i, batches, report)


def search_in_layer(model: nn.Module, i: int, batches: Sequence[Batch], report: QuantizationReport) -> None:
    """Search layer `i`, unless the report has its scales; measure its errors; take `batches` through it."""
    statistics, outputs = run_layer(model, i, batches)
    if statistics["input_layernorm"].chosen == 0:
        statistics, outputs = run_layer(model, i, batches, executed_only=False)
        report.unchosen_layers.append(i)
    if not is_finite(*outputs):
        raise UserError(
            f"The model gives numbers that are not finite {place(i)}, on the texts that its quantizer sees; "
            "its weights are damaged or too large for their type."
        )
    for batch, output in zip(batches, outputs, strict=True):
        batch.hidden = output
    layer, alphas = model.model.layers[i], {}
    if SEARCHES[report.method] and LAYER.format(i, "input_layernorm") not in report.scales:
        alphas = _search_into(report, i, layer, statistics)
    report.linears += _measure(report, i, layer, statistics, alphas)


def apply_report(model: nn.Module, report: QuantizationReport) -> nn.Module:
    """Fold the report's scales, clip, round every decoder linear of `model`; leaves `model.quantization`."""
    for i in range(len(model.model.layers)):
        apply_to_layer(model, i, report)
    apply_to_head(model, report)
    model.quantization = report
    return model


def apply_to_layer(model: nn.Module, i: int, report: QuantizationReport) -> None:
    """Fold the report's scales, clip and round the linears of layer `i` to its width."""
    layer = model.model.layers[i]
    scales = _of_layer(report.scales, i, layer)
    for linear in folded_linears(layer, scales):
        name = LAYER.format(i, linear.name)
        _round_into(layer.get_submodule(linear.name), linear.weight, report, name, report.width(i))
    fold_into_producers(layer, scales)


def apply_to_head(model: nn.Module, report: QuantizationReport) -> None:
    """Round lm_head, if the report says so."""
    if report.lm_head_bits != 16:
        untie_lm_head(model)
        _round_into(model.lm_head, model.lm_head.weight, report, "lm_head", report.lm_head_bits)


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
    found = SEARCHES[report.method](layer, statistics, report.bits, report.group_size)
    for kind in TENSORS:
        getattr(report, kind).update(
            {LAYER.format(i, name): tensor for name, tensor in getattr(found, kind).items()}
        )
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
        weight, inputs = layer.get_submodule(name).weight, statistics[producers[name]]
        kept = _kept(report, LAYER.format(i, name), folded.device)
        error = by_rows(partial(_rounding_error, report, linear.moment), folded, *kept)
        if linear.row_scale is not None:
            error = error * linear.row_scale**2  # back to the unscaled output
        rtn = by_rows(partial(_rounding_error, report, inputs.moment), weight)
        power = by_rows(lambda rows, moment=inputs.moment: output_error(rows, moment), weight)
        found.append(
            {
                "name": LAYER.format(i, name),
                "tokens": inputs.tokens,
                "alpha": alphas.get(producers[name]),
                "clip": None if kept[0] is None else _kept_range(folded, kept[0]),
                "error": error.mean().item(),
                "error_rtn": rtn.mean().item(),
                "power": power.mean().item(),
            }
        )
    return found


def _rounding_error(
    report: QuantizationReport, moment: Tensor, weight: Tensor, *kept: Tensor | None
) -> Tensor:
    """Mean square output error [out] of `weight` [out, in] as the search has it, else rounded to nearest."""
    rounded = dequantize_groups(*_on_grid(report, report.bits, weight, *kept))
    return output_error(rounded - weight, moment)


def _kept(report: QuantizationReport, name: str, device: torch.device) -> tuple[Tensor | None, ...]:
    """What the search says of a linear: its clip, codes, steps and zeros, each None where it says nothing."""
    found = (getattr(report, kind).get(name) for kind in TENSORS[1:])
    return tuple(None if tensor is None else tensor.to(device) for tensor in found)


def _on_grid(
    report: QuantizationReport,
    bits: int,
    weight: Tensor,
    clip: Tensor | None = None,
    codes: Tensor | None = None,
    steps: Tensor | None = None,
    zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, step and zero (as `quantize_groups`) of `weight` [out, in]: those kept, or of it clipped."""
    if codes is None:
        clipped = weight if clip is None else clip_weight(weight, clip)
        return quantize_groups(clipped, bits, report.group_size)
    groups = unpack_codes(codes, weight.shape[1]).float().unflatten(1, (steps.shape[1], -1))
    return groups, steps[..., None], zeros[..., None].float()


def _round_into(linear: nn.Linear, weight: Tensor, report: QuantizationReport, name: str, bits: int) -> None:
    """Give `linear` its `weight` [out, in] as the search has it, else rounded to nearest, and the report the
    grid it now lies on.
    """
    steps, zeros = [], []

    def rounded(rows: Tensor, *kept: Tensor | None) -> Tensor:
        codes, step, zero = _on_grid(report, bits, rows, *kept)
        steps.append(step.squeeze(-1))
        zeros.append(zero.squeeze(-1).byte())
        return dequantize_groups(codes, step, zero).to(linear.weight.dtype)

    linear.weight.data = by_rows(rounded, weight, *_kept(report, name, weight.device))
    report.grids[name] = Grid(torch.cat(steps), torch.cat(zeros), bits)


def _kept_range(folded: Tensor, clip: Tensor) -> float:
    """Mean over groups of clip / largest magnitude."""
    largest = by_rows(lambda rows: rows.abs().unflatten(1, (clip.shape[1], -1)).amax(-1), folded)
    return (clip / largest.clamp(min=1e-30)).mean().item()


def _of_layer(scales: dict[str, Tensor], i: int, layer: nn.Module) -> dict[str, Tensor]:
    device = layer.input_layernorm.weight.device
    keys = {producer: LAYER.format(i, producer) for producer in READERS}
    return {producer: scales[key].to(device) for producer, key in keys.items() if key in scales}


def untie_lm_head(model: nn.Module) -> None:
    """A parameter of its own for lm_head, since the embedding that it may share keeps 16 bits."""
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach(), requires_grad=head.requires_grad)
    model.config.tie_word_embeddings = False
