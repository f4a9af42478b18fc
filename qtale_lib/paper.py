"""The numbers that the paper prints (QTALE, arXiv 2602.10431, Tables 1-4), beside which ours stand.

The tables were copied from an extraction of the PDF's text; paper_arithmetic.py recomputes what follows from
other numbers, so that a slip of the copy or of the print shows.
"""

from __future__ import annotations

import pandas as pd

SOURCE = "Printed in the paper (arXiv 2602.10431); our copy came through text extraction of the PDF."
MODELS = {"table1": "LLaMA2-7B", "table2": "LLaMA3.1-8B"}
METHODS = {"full": "Full", "dllm": "D-LLM", "qtale": "QTALE", "noisy_full": "Full, noisy"}  # the last is ours
CSQA = ("piqa", "boolq", "siqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa")
TASK_LABELS = {
    "piqa": "PIQA", "boolq": "BoolQ", "siqa": "SIQA", "arc_easy": "ARCe", "arc_challenge": "ARCc",
    "winogrande": "Winogr.", "openbookqa": "OBQA", "avg": "CSQA avg.", "csqa": "CSQA", "mmlu": "MMLU",
    "alpaca": "Alpaca", "alpaca_ppl": "Alpaca PPL",
}  # fmt: skip
ACCURACY_COLUMNS = (*CSQA, "avg", "mmlu", "alpaca_ppl")
GROUP_SIZE = 128  # weights that share a quantization scale (Sec. 4.1)
GROUPS = ("csqa", "mmlu", "alpaca")

# bits, method, then ACCURACY_COLUMNS: accuracy in percent, and PPL
_ACCURACY = {
    "table1": """
        16 full  83.73 87.98 79.58 82.53 65.27 81.61 83.00 80.53 54.26 3.23
        16 dllm  83.51 88.17 79.02 81.06 66.04 81.22 81.40 80.06 52.83 4.33
        16 qtale 84.06 88.22 78.97 81.65 65.70 81.45 82.40 80.35 53.00 4.09
        4  full  81.34 87.67 79.53 79.97 62.37 81.14 79.40 78.77 51.74 3.22
        4  dllm  81.23 86.20 77.18 79.08 62.03 78.14 77.40 77.32 50.47 4.43
        4  qtale 83.30 87.67 78.56 79.59 66.21 79.95 80.20 79.18 51.24 3.74
        3  full  78.02 83.76 74.36 71.38 55.29 74.51 68.20 72.22 46.12 3.30
        3  dllm  74.65 80.02 73.34 71.55 55.03 74.43 65.00 70.57 42.84 5.35
        3  qtale 77.58 83.82 73.34 73.44 57.17 74.98 69.20 72.79 44.78 4.38""",
    "table2": """
        16 full  80.04 88.19 88.90 87.58 77.03 84.21 85.20 81.28 59.12 3.57
        16 dllm  79.84 86.02 89.35 86.24 75.68 83.43 84.20 80.45 58.85 5.06
        16 qtale 78.81 86.18 87.37 87.16 78.16 83.43 84.80 80.54 58.40 4.90
        4  full  79.53 86.29 87.52 86.07 75.17 83.58 83.00 79.67 56.16 3.65
        4  dllm  79.27 83.57 86.88 84.93 69.88 80.51 81.00 77.68 55.36 5.47
        4  qtale 79.27 85.26 88.13 85.56 74.83 82.08 82.40 79.17 55.86 4.11
        3  full  72.11 79.65 81.58 77.61 59.90 71.27 69.60 69.54 44.56 4.83
        3  dllm  68.99 76.88 77.33 76.09 55.29 71.19 65.20 66.81 43.49 7.24
        3  qtale 69.96 77.20 78.98 77.57 61.52 75.06 71.80 69.65 45.11 5.29""",
}

# bits, method, model size in "GB", then GFLOPs and relative for csqa, mmlu, alpaca
_EFFICIENCY = {
    "LLaMA2-7B": """
        16 full  12.6 13.0 1.00 13.0 1.00 13.0 1.00
        16 dllm  12.6 6.85 0.53 7.18 0.55 7.76 0.60
        16 qtale 12.6 6.81 0.53 7.27 0.56 8.03 0.62
        4  full  3.6  13.0 1.00 13.0 1.00 13.0 1.00
        4  dllm  3.6  7.18 0.53 7.62 0.59 7.86 0.61
        4  qtale 3.6  6.97 0.54 7.69 0.59 10.47 0.81
        3  full  2.8  13.0 1.00 13.0 1.00 13.0 1.00
        3  dllm  2.8  7.21 0.56 7.46 0.58 8.24 0.64
        3  qtale 2.8  7.13 0.55 7.63 0.59 11.01 0.85""",
    "LLaMA3.1-8B": """
        16 full  15.0 15.6 1.00 15.6 1.00 15.6 1.00
        16 dllm  15.0 8.39 0.54 8.53 0.55 9.30 0.60
        16 qtale 15.0 8.24 0.53 8.55 0.55 9.65 0.62
        4  full  4.6  15.6 1.00 15.6 1.00 15.6 1.00
        4  dllm  4.6  8.46 0.54 8.53 0.55 9.30 0.60
        4  qtale 4.6  8.44 0.54 8.57 0.55 12.53 0.80
        3  full  3.7  15.6 1.00 15.6 1.00 15.6 1.00
        3  dllm  3.7  8.44 0.54 8.59 0.55 9.49 0.61
        3  qtale 3.7  8.54 0.55 8.66 0.56 12.91 0.83""",
}

# entropy loss, theta, then metric and R_avg for csqa, mmlu, alpaca; all at 4 bits
_ABLATION = {
    "LLaMA2-7B": """
        no  0.5    77.32 0.53 50.47 0.55 4.43 0.61
        no  adjust 78.48 0.56 50.62 0.57 3.74 0.77
        yes 0.5    78.86 0.53 51.24 0.56 4.35 0.63
        yes adjust 79.18 0.54 51.24 0.59 3.74 0.81""",
    "LLaMA3.1-8B": """
        no  0.5    77.68 0.54 55.36 0.55 5.47 0.60
        no  adjust 78.14 0.59 55.36 0.56 4.30 0.76
        yes 0.5    78.86 0.53 55.80 0.55 5.01 0.63
        yes adjust 79.17 0.54 55.86 0.55 4.11 0.80""",
}


def _lines(block: str) -> list[list[str]]:
    return [line.split() for line in block.strip().splitlines()]


def accuracy() -> pd.DataFrame:
    """Tables 1 and 2, tidy: table, model, bits, method, task, value (accuracy in percent, or PPL)."""
    rows = [
        (table, MODELS[table], int(bits), method, task, float(value))
        for table, block in _ACCURACY.items()
        for bits, method, *values in _lines(block)
        for task, value in zip(ACCURACY_COLUMNS, values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["table", "model", "bits", "method", "task", "value"])


def efficiency() -> pd.DataFrame:
    """Table 3, tidy: model, bits, method, model_gb, task (a group), gflops per token, relative to Full."""
    rows = [
        (model, int(bits), method, float(size), task, float(values[2 * i]), float(values[2 * i + 1]))
        for model, block in _EFFICIENCY.items()
        for bits, method, size, *values in _lines(block)
        for i, task in enumerate(GROUPS)
    ]
    return pd.DataFrame(rows, columns=["model", "bits", "method", "model_gb", "task", "gflops", "relative"])


def ablation() -> pd.DataFrame:
    """Table 4 (4 bits), tidy: model, entropy_loss, theta, task (a group), value, execution_ratio."""
    rows = [
        (model, entropy, theta, task, float(values[2 * i]), float(values[2 * i + 1]))
        for model, block in _ABLATION.items()
        for entropy, theta, *values in _lines(block)
        for i, task in enumerate(GROUPS)
    ]
    return pd.DataFrame(rows, columns=["model", "entropy_loss", "theta", "task", "value", "execution_ratio"])


def printed(model: str, bits: int, method: str, task: str) -> float:
    """One number of Tables 1 and 2; `task` is one of ACCURACY_COLUMNS. KeyError where nothing is printed."""
    chosen = accuracy().query("model == @model and bits == @bits and method == @method and task == @task")
    if chosen.empty:
        raise KeyError(f"the paper prints no {task} for {model}, {bits} bits, {method}")
    return float(chosen.value.iloc[0])
