"""Weight quantization of a merged, possibly routed, Hugging Face model (QTALE, Sec. 4).

    quantize(model, tokenizer, texts, bits=3)      # in place, fake-quantized
    print(model.quantization.as_dict())
    save_search(model.quantization, "search"); apply_search(the_same_float_model, "search")

Only the linear weights of the decoder layers are quantized; routers, norms and embeddings keep 16 bits, and
so does lm_head unless told otherwise. `pack` (packed.py) then holds them in as many bits as they need. AWQ
folds its scales into the norm *after* the point where a router reads the residual stream, so folding alone
changes no route.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.apply import (
    apply_report,
    check_quantizable,
    check_same_model,
    prepare,
    search_model,
)
from qtale_lib.quantization.mixed import search_mixed
from qtale_lib.quantization.report import QuantizationReport, load_search, model_hash, save_search
from qtale_lib.quantization.rtn import fake_quantize

WIDTH_CHOICES = ("uniform", "mixed")

__all__ = [
    "QuantizationReport",
    "apply_search",
    "fake_quantize",
    "load_search",
    "model_hash",
    "quantize",
    "save_search",
]


@torch.no_grad()
def quantize(
    model: nn.Module,
    tokenizer=None,
    texts: Iterable[str] | None = None,
    method: str = "awq",
    bits: int = 4,
    group_size: int = 128,
    backend: str = "native",
    lm_head_bits: int = 16,
    max_length: int = 512,
    widths: str = "uniform",
) -> nn.Module:
    """Fake-quantize `model` in place, calibrated on `texts`; its report is then in `model.quantization`.

    Args:
        texts: calibration texts, not needed for round-to-nearest (with them its output errors are measured).
        method: "awq", "gptq", "magr_gptq" or "rtn".
        bits: 2, 3, 4 or 8.
        group_size: weights of a row that share a step and zero point; −1 is the whole row.
        backend: whose AWQ search, "native" or "autoawq".
        lm_head_bits: 16 leaves lm_head alone; others round it to nearest.
        max_length: longer texts, in tokens, are left out and counted, as are empty ones.
        widths: "uniform": every layer has `bits`; "mixed": sensitive ones have more than others (mixed.py).
    Raises:
        UserError: for an unmerged LoRA, an unknown model family, settings that do not fit, no texts, or
            texts that are no list of texts.
    """
    report = QuantizationReport(method, backend, bits, group_size, lm_head_bits)
    rows = prepare(model, report, tokenizer, texts, max_length)
    report.model_sha256 = model_hash(model)
    if widths not in WIDTH_CHOICES or (widths == "mixed" and (rows is None or backend != "native")):
        raise UserError(
            f"widths is {widths!r}; allowed: uniform or, with backend native and texts to calibrate on, "
            "mixed."
        )
    if rows is not None:
        if method == "awq" and backend == "autoawq":
            _search_with_autoawq(model, rows, report)
        search = search_mixed if widths == "mixed" else search_model
        search(model, rows, report)
    return apply_report(model, report)


def _search_with_autoawq(model: nn.Module, rows: list[list[int]], report: QuantizationReport) -> None:
    try:
        from qtale_lib.quantization.autoawq_backend import search_with_autoawq
    except ImportError:
        raise UserError(
            "backend 'autoawq' needs the package autoawq 0.2.9 (Linux only), which cannot be imported here; "
            "pip install autoawq==0.2.9, or use backend='native'."
        ) from None
    report.scales, report.clips, note = search_with_autoawq(model, rows, report.bits, report.group_size)
    report.calibration |= note


@torch.no_grad()
def apply_search(model: nn.Module, directory: str | Path) -> nn.Module:
    """Quantize `model` in place by a kept search; UserError if the search was made from another model."""
    report = load_search(directory)
    check_quantizable(model, report)
    check_same_model(model_hash(model), report, directory)
    return apply_report(model, report)
