"""Trainings by this process alone or, under torchrun, by several, of which the first one saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_run import llama, profile, rows

from qtale_lib import distributed, stages
from qtale_lib.base import load_base
from qtale_lib.checkpoints import last_complete
from qtale_lib.config import Profile
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab
from qtale_lib.probes import ProbeCallback
from qtale_lib.trainer import trainable_state
from qtale_lib.training import make_trainer, prepare_model

COUNT = 22  # of no effective batch a multiple


def finetune_into_store(settings: Profile, root: Path, run: Run) -> dict[str, Any]:
    """A fine-tuning as the store's job does it."""
    return stages.finetune_run(Lab(settings, root), run, lambda *done: None)["value"]


class Tokenizer:
    pad_token_id = 0


class Killed(Exception):
    pass


def train(name: str, method: str, directory: Path, stop: int | None = None, **settings: Any) -> None:
    """Train; the first process leaves NAME.safetensors and NAME.json. `stop` ends it as a kill would."""
    settings = {"max_steps": 7, "lora": {"dropout": 0.0}, **settings}
    recipe = {"noise": "keyed", **settings.pop("training", {})}
    chosen = profile(methods=[method], training=recipe, **settings)
    base = load_base(chosen)[0] if "base" in settings else llama()
    model = prepare_model(base, chosen, method, 0)
    probe = [ProbeCallback(rows(12), 8, 0)] if method != "full" else []
    trainer = make_trainer(model, Tokenizer(), rows(COUNT), chosen, method, 0, directory / name, probe)
    resumed = last_complete(directory / name / "checkpoints")
    if stop is not None:
        step = trainer.training_step

        def until_stopped(*arguments: Any, **named: Any) -> torch.Tensor:
            if trainer.state.global_step == stop:
                raise Killed
            return step(*arguments, **named)

        trainer.training_step = until_stopped
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except Killed:
        return
    if trainer.is_world_process_zero():
        save_file(trainable_state(trainer.model), directory / f"{name}.safetensors")
        (directory / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


def train_spread(cases: list[dict[str, Any]], directory: Path, processes: int = 2) -> None:
    """Every case, one after the other, in processes of torchrun."""
    listed = directory / "cases.json"
    listed.write_text(json.dumps(cases))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={processes}", __file__, str(listed)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-9000:]


if __name__ == "__main__":
    distributed.join()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        train(**case, directory=Path(sys.argv[1]).parent)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
