"""Mixed precision: layers that calibration finds sensitive get 4 bits, others 3 or 2, at a stated mean width.

A layer's sensitivity to a width is what the loss on the calibration texts rises by if that layer alone is
quantized to it. All decoder layers have the same shape, so of all choices whose mean width is at most the
stated one, the one with the least sum of rises is found exactly. It is as large a file as one of uniform
width, and the same quantizer rounds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.apply import apply_to_layer, search_model
from qtale_lib.quantization.report import TENSORS, QuantizationReport
from qtale_lib.quantization.statistics import calibration_loss

WIDTHS = (4, 3, 2)


def search_mixed(model: nn.Module, rows: Sequence[Sequence[int]], report: QuantizationReport) -> None:
    """Fill `report` from token `rows`: `layer_bits` whose mean is at most `bits`, and each layer's search.

    Raises:
        UserError: if no mixture of WIDTHS has this mean.
    """
    if not min(WIDTHS) < report.bits < max(WIDTHS):
        raise UserError(
            f"mixed widths are {', '.join(map(str, WIDTHS))}, of which none mix to {report.bits} bits; "
            "use bits 3, or widths uniform."
        )
    searches = [_empty(report, width) for width in WIDTHS]
    for search in searches:
        search_model(model, rows, search)
    usual = calibration_loss(model, rows)
    for i in range(len(model.model.layers)):
        report.sensitivity.append([])
        for search in searches:
            with quantized_layer(model, i, search):
                report.sensitivity[i].append(calibration_loss(model, rows) - usual)
    report.layer_bits = allocate(report.sensitivity, WIDTHS, report.bits)
    report.unchosen_layers = searches[0].unchosen_layers
    for i, width in enumerate(report.layer_bits):
        _take_layer(report, i, searches[WIDTHS.index(width)])


def allocate(rises: Sequence[Sequence[float]], widths: Sequence[int], mean: float) -> list[int]:
    """A width for each layer, of mean at most `mean`, with the least sum of rises [layers, widths]."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the sum of the widths so far
    for row in rises:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (cost, chosen) in best.items():
            for width, rise in zip(widths, row, strict=True):
                entry = (cost + rise, (*chosen, width))
                reached[total + width] = min(entry, reached.get(total + width, entry))
        best = reached
    return list(min(entry for total, entry in best.items() if total <= mean * len(rises))[1])


@contextmanager
def quantized_layer(model: nn.Module, i: int, report: QuantizationReport) -> Iterator[None]:
    """Layer `i` as the report has it meanwhile; its weights are put back, not copied."""
    kept = [(parameter, parameter.data) for parameter in model.model.layers[i].parameters()]
    apply_to_layer(model, i, report)
    try:
        yield
    finally:
        report.grids.clear()
        for parameter, data in kept:
            parameter.data = data


def _empty(report: QuantizationReport, width: int) -> QuantizationReport:
    """A report with the same settings at a uniform width, to be filled."""
    return replace(
        report, bits=width, linears=[], unchosen_layers=[], grids={}, **{kind: {} for kind in TENSORS}
    )


def _take_layer(report: QuantizationReport, i: int, search: QuantizationReport) -> None:
    """What a search found for layer `i` becomes the report's."""
    mine = f"model.layers.{i}."
    report.linears += [row for row in search.linears if row["name"].startswith(mine)]
    for kind in TENSORS:
        found = getattr(search, kind).items()
        getattr(report, kind).update({name: tensor for name, tensor in found if name.startswith(mine)})
