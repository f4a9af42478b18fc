"""One fine-tuning on several processes of this machine, each with a GPU of its own, or a core.

The pool's worker starts them by torchrun, and hears from the first of them: shares done, then how it ended.
They die with it. What they come to is what one process comes to, but for rounding: training.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtale_lib.config import Profile
from qtale_lib.errors import UserError
from qtale_lib.jobs import Run
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT
from qtale_lib.store import read_json, write_json

ORDER, OUTCOME, ERRORS = "order.json", "outcome.json", "stderr.txt"  # in the run's folder meanwhile
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
SHOWN = 2000  # characters of what a crash leaves on stderr


def finetune(lab: Lab, run: Run, directory: Path, report: Callable[[float], None]) -> dict[str, Any]:
    """training.finetune on the profile's number of processes; the same value.

    Raises:
        UserError: what a process raised.
        RuntimeError: if one ended in another way, with the end of what it said.
    """
    order = {
        "profile": lab.profile.model_dump(mode="json"), "root": str(lab.directory.parent),
        "run": [run.task, run.method, run.seed], "directory": str(directory),
    }  # fmt: skip
    write_json(directory / ORDER, order)
    (directory / OUTCOME).unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(lab.profile.compute.processes),
        "--module", "qtale_lib.distributed", str(directory / ORDER),
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    dying = _die_with_parent if sys.platform == "linux" else None
    with (directory / ERRORS).open("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=dying
        ) as processes:
            for line in processes.stdout:
                if line.startswith("share "):
                    report(float(line.split()[1]))
        errors.seek(0)
        last = errors.read()[-SHOWN:]
    said = read_json(directory / OUTCOME) or {}
    for name in (ORDER, OUTCOME, ERRORS):
        (directory / name).unlink(missing_ok=True)
    if "error" in said:
        raise UserError(said["error"])
    if processes.returncode or "value" not in said:
        raise RuntimeError(f"a process of {run.name} ended with exit code {processes.returncode}: {last}")
    return said["value"]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)


def main(path: Path) -> int:
    """What each process does: fine-tune as ordered; the first of them says how it went."""
    import torch

    from qtale_lib import stages, training

    stages.be_quiet()
    order, first = json.loads(path.read_text(encoding="utf-8")), os.environ["RANK"] == "0"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    lab, run = Lab(Profile.model_validate(order["profile"]), Path(order["root"])), Run(*order["run"])
    examples = lab.examples(run.task, "train")

    def report(share: float) -> None:
        if first:
            print(f"share {share}", flush=True)

    try:
        said = {
            "value": training.finetune(
                lab.profile, run.task, run.method, run.seed, Path(order["directory"]), report, examples
            )
        }
    except UserError as error:
        said = {"error": str(error)}
    if first:
        write_json(path.parent / OUTCOME, said)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
