"""Work for test_distributed.py, in a process that it can kill."""

from __future__ import annotations

from pathlib import Path

from qtale_lib.config import Profile
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab


def finetune(settings: Profile, root: Path, run: Run) -> dict:
    """A fine-tuning into the store."""
    from qtale_lib import stages

    return stages.finetune_run(Lab(settings, root), run, lambda share: None)["value"]
