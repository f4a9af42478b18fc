"""What this machine has: GPUs, memory, cores, and how fast it multiplies; torch is asked in a child."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

ASK_GPUS = """
import json, torch
cards = []
for index in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(index)
    cards.append([torch.cuda.get_device_name(index), total, free])
print(json.dumps(cards))
"""
# FLOP/s of a matrix product that fills a core or a GPU, the best of several
ASK_SPEED = """
import sys, time, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
n = 8192 if device == "cuda" else 768
a = torch.randn(n, n, dtype=getattr(torch, sys.argv[1]), device=device)
best = float("inf")
for _ in range(6):
    started = time.perf_counter()
    (a @ a)[0, 0].item()
    best = min(best, time.perf_counter() - started)
print(2 * n**3 / best)
"""


@dataclass(frozen=True)
class Gpu:
    """id: as CUDA_VISIBLE_DEVICES names it; total and free: bytes."""

    id: str
    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Machine:
    """total and free: bytes of memory, not of GPUs; cores: those that may be used."""

    gpus: tuple[Gpu, ...]
    total: int
    free: int
    cores: int

    @property
    def device(self) -> str:
        """What work runs on: "gpu" or "cpu"."""
        return "gpu" if self.gpus else "cpu"


def look() -> Machine:
    """The machine as it is now."""
    memory = psutil.virtual_memory()
    return Machine(gpus(), memory.total, memory.available, usable_cores())


def usable_cores() -> int:
    """Cores that this process may use: affinity and a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (limits := quota.read_text().split())[0] != "max":
        cores = min(cores, max(1, int(limits[0]) // int(limits[1])))
    return cores


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The visible GPUs, as they were when first asked for; none where torch cannot use them."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd")):
        return ()
    cards = json.loads(_asked(ASK_GPUS) or "[]")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(index) for index in range(len(cards))]
    return tuple(Gpu(name, *card) for name, card in zip(ids, cards, strict=False))


@functools.cache
def multiplications(dtype: str) -> float | None:
    """FLOP/s of matrix products in a type on one core, or on the first GPU; None if that cannot be told."""
    answer = _asked(ASK_SPEED, dtype)
    return float(answer) if answer else None


def _asked(code: str, *arguments: str) -> str:
    """What a Python process that runs the code prints; nothing if it fails."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
