"""How much memory loading a packed model adds, at its peak, beside the bytes of its file.

python -m qtale_lib.quantization.load_memory FOLDER WARM_UP_FOLDER cpu

The model of the second folder, a small one, is loaded first: what imports and torch set up once is not the
model's. On the CPU Linux tells (resident set); on a GPU torch does (allocated there).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from qtale_lib.quantization.packed import packed_bytes
from qtale_lib.quantization.packed_files import load_packed

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_by_loading(directory: str | Path, warm_up: str | Path, device: str) -> dict[str, int | None]:
    """Bytes: "file", and "added", the most that was held while loading over what was held before.

    "added" is None where the system does not say. Meant for a fresh process: memory freed earlier would be
    used again unseen.
    """
    load_packed(warm_up, device)
    before = start_measuring(device)
    model = load_packed(directory, device)
    peak = highest(device)
    del model
    added = None if before is None or peak is None else peak - before
    return {"file": packed_bytes(directory), "added": added}


def start_measuring(device: str) -> int | None:
    """Bytes held now; `highest` counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return None
    RESET.write_text("5")  # the peak counts from here
    return _kib("VmRSS")


def highest(device: str) -> int | None:
    """The most bytes held since `start_measuring`; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _kib("VmHWM") if STATUS.exists() else None


def _kib(key: str) -> int:
    """Bytes of a line of the process's status; getrusage would hand on the peak of who started it."""
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(json.dumps(added_by_loading(*sys.argv[1:])))
