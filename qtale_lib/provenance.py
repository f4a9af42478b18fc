"""Where a result comes from: package versions, git commit, machine, time, memory. Imports no torch itself."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "lm_eval", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Version of Python, of this package and of the packages that numbers depend on."""
    from qtale_lib import __version__

    found = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "qtale_lib": __version__, **found}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def git_commit() -> str | None:
    """The checkout's commit, with "+" behind it if tracked files differ from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def last_change(path: Path) -> dict[str, str] | None:
    """{commit, date} of the last commit that changed a file, with "+" behind the commit if the file differs
    from it; None outside a checkout, or for a file that no commit has.
    """
    try:
        commit, _, date = _git("log", "-1", "--format=%H %cI", "--", str(path)).partition(" ")
        changed = _git("status", "--porcelain", "--", str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit + ("+" if changed else ""), "date": date} if commit else None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


@functools.cache
def device_name() -> str:
    """The GPU that this process computes on, if torch is loaded and sees one; else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def processor() -> str:
    """The processor's model, or its architecture where the system names none."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Let peak_memory count from now on (on Linux and GPUs; elsewhere it counts from the process's start)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the most that this process held since the reset, or that torch allocated on its GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB


def memory_in_use() -> int:
    """Bytes: what this process holds now, or torch has allocated on its GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


class Stopwatch:
    """Provenance of one piece of work: made when it starts, asked when it ends."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.started = time.monotonic()
        reset_peak_memory()

    def provenance(self, **facts: Any) -> dict[str, Any]:
        """What is known at the end, with seconds since the start, peak memory and the time of day."""
        return {
            **self.facts,
            **facts,
            "versions": versions(),
            "git_commit": git_commit(),
            "device": device_name(),
            "cores": os.cpu_count(),
            "threads": _threads(),
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_memory_bytes": peak_memory(),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None
