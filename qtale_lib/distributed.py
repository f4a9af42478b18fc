"""A fine-tuning in several processes of this machine, by torchrun: one GPU each, or a share of the cores.

The process that asks for it writes down what is to be trained, starts them, passes their progress on and
reads what the first of them answers. They end when it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from qtale_lib.config import Profile
from qtale_lib.errors import UserError
from qtale_lib.pool import Report
from qtale_lib.store import read_json, write_json

FOLDER = "processes"
REQUEST, ANSWER, LOG = "request.json", "answer.json", "log.txt"
SHARE = "share done: "
SHOWN_CHARACTERS = 2000


def finetune(
    profile: Profile, task: str, method: str, seed: int, directory: Path, report: Report
) -> dict[str, Any]:
    """As `training.finetune`, in `profile.compute.processes` processes.

    Raises:
        UserError: as it does.
        RuntimeError: if a process ends by anything else, with the end of what they wrote.
    """
    folder = directory / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = {"task": task, "method": method, "seed": seed}
    write_json(folder / REQUEST, {"profile": profile.model_dump(mode="json"), "run": run})
    _attend(folder, profile.compute.processes, report)
    answer = read_json(folder / ANSWER)
    if not answer:
        log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"a process of the fine-tuning failed: {log[-SHOWN_CHARACTERS:]}")
    shutil.rmtree(folder)
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer["value"]


def _attend(folder: Path, processes: int, report: Report) -> None:
    """Start the processes and stay until they are over."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    with (
        (folder / LOG).open("w", encoding="utf-8") as log,
        subprocess.Popen(
            [*torchrun, "--module", __name__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as group,
    ):
        try:
            for line in group.stdout:
                if line.startswith(SHARE):
                    share, _, note = line.removeprefix(SHARE).strip().partition(" ")
                    report(float(share), note)
        finally:
            group.stdin.close()  # theirs as well: they end if this was left early


def main(folder: Path) -> None:
    """One of the processes: train its share; the first one answers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from qtale_lib.training import finetune as train

    join()
    request = read_json(folder / REQUEST)
    profile = Profile.model_validate(request["profile"])
    try:
        value = train(profile, **request["run"], directory=folder.parent, progress=_tell)
        answer = {"value": value}
    except UserError as error:  # raised in all of them
        answer = {"refused": str(error)}
    if os.environ["RANK"] == "0":
        write_json(folder / ANSWER, answer)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def join() -> None:
    """Take part in what torchrun started, on this process's device."""
    import torch
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available()
    PartialState(cpu=on_cpu, **({"backend": "gloo"} if on_cpu else {}))


def _tell(share: float, note: str) -> None:
    print(f"{SHARE}{share} {note}", flush=True)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
