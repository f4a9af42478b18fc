"""Weight quantization of a merged, possibly routed, Hugging Face model (paper, Sec. 4; METHOD, Quantization).

    quantize(model, tokenizer, texts, bits=3)      # in place, fake-quantized
    print(model.quantization.as_dict())
    save_search(model.quantization, "search"); apply_search(the_same_float_model, "search")

Only the linear weights of the decoder layers are quantized; routers, norms and embeddings keep 16 bits, and so does
lm_head unless told otherwise. AWQ folds its scales into the norm *after* the point where a router reads the residual
stream, so folding alone changes no route.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from qtale_lib.errors import UserError
from qtale_lib.quantization.apply import apply_report, check_quantizable, search_model
from qtale_lib.quantization.report import QuantizationReport, load_search, model_hash, save_search
from qtale_lib.quantization.rtn import fake_quantize
from qtale_lib.quantization.statistics import tokenize

__all__ = ["QuantizationReport", "apply_search", "fake_quantize", "load_search", "model_hash", "quantize", "save_search"]


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
) -> nn.Module:
    """Fake-quantize `model` in place, calibrated on `texts`; its QuantizationReport is left in `model.quantization`.

    Round-to-nearest (`method="rtn"`) needs no texts; with them its output errors are measured. Texts that are empty or
    longer than `max_length` tokens are left out and counted. `group_size` −1 is one group per row.
    Raises UserError for an unmerged LoRA, an unknown model family, bits or group size that do not fit, or no texts.
    """
    report = QuantizationReport(method, backend, bits, group_size, lm_head_bits)
    check_quantizable(model, report)
    if method == "awq" and (tokenizer is None or texts is None):
        raise UserError("AWQ calibrates on text; pass a tokenizer and a list of texts, or use method='rtn'.")
    report.model_sha256 = model_hash(model)
    if texts is not None:
        rows, record = tokenize(tokenizer, texts, min(max_length, model.config.max_position_embeddings))
        report.calibration = record.as_dict()
        search_model(model, rows, report)
    return apply_report(model, report)


@torch.no_grad()
def apply_search(model: nn.Module, directory: str | Path) -> nn.Module:
    """Quantize `model` in place by a kept search; UserError if the search was made from another model."""
    report = load_search(directory)
    check_quantizable(model, report)
    if model_hash(model) != report.model_sha256:
        raise UserError(f"the search in {directory} was made from another model; quantize this one anew.")
    return apply_report(model, report)
