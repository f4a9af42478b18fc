"""What stands in the way of a profile on this machine, and what it will take: `python -m qtale_lib doctor`.

Every line is "ok", a "warning", or a "refusal" that a run would end with; the latter two say the cure. The
checks are those of preflight.py; here all are made, none stops the others, and nothing large is fetched.
"""

from __future__ import annotations

import platform
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil

from qtale_lib import efficiency, estimates, hub, machine, workload
from qtale_lib.base import EMBEDDED, read_config, tensor_shapes
from qtale_lib.config import Profile
from qtale_lib.efficiency import Shape
from qtale_lib.errors import UserError
from qtale_lib.estimates import Speed, Stage
from qtale_lib.jobs import Job, all_jobs
from qtale_lib.lab import Lab
from qtale_lib.machine import Machine
from qtale_lib.preflight import (
    at_hand,
    capacity,
    check_base,
    check_disk,
    check_folders,
    check_settings,
    check_stage,
    config_of,
    existing,
    gib,
    workloads,
)
from qtale_lib.provenance import ROOT
from qtale_lib.workload import Workload

Status = Literal["ok", "warning", "refusal"]
NEARLY = 0.85  # of what can be had: an estimate that may be a fifth off
LONG = 60 * 24 * 3600.0  # seconds of a stage


@dataclass(frozen=True)
class Line:
    """One thing looked at."""

    status: Status
    subject: str
    text: str


Finding = tuple[Status, str]


def examine(lab: Lab, now: Machine | None = None, speed: Speed | None = None) -> list[Line]:
    """All lines on a profile; `now` and `speed` are this machine's, measured, unless given."""
    profile, now = lab.profile, now or machine.look()
    jobs, base = all_jobs(profile), _line("base", lambda: _base(profile))
    shape, work = _shape(profile, base), _work(lab, jobs)
    lines = [
        _line("versions", _versions),
        _line("processor", lambda: _processor(now)),
        _line("memory", lambda: ("ok", f"{gib(now.free)} of {gib(now.total)} free")),
        _line("folders", lambda: _folders(lab)),
        base,
        _line("token", lambda: _token(profile)),
        _line("data", lambda: _data(lab, jobs)),
        _line("settings", lambda: _settings(profile, jobs)),
    ]
    if shape is None:
        return [*lines, Line("warning", "estimates", "none, as they need the base's config.json")]
    speed = speed or _speed(profile, now)
    for stage in estimates.stages(profile, shape, work, jobs, now.device, speed):
        lines.append(_line(stage.name, lambda stage=stage: _stage(profile, stage, now)))
    return [*lines, _line("disk", lambda: _disk(lab, shape, work, jobs))]


def _line(subject: str, look: Callable[[], Finding]) -> Line:
    try:
        status, text = look()
    except UserError as error:
        status, text = "refusal", str(error).removesuffix(".")
    return Line(status, subject, text)


def _shape(profile: Profile, base: Line) -> Shape | None:
    """The base's shape: by its config.json, or as known of a base in profiles/; None without either."""
    if base.status == "refusal":
        return efficiency.ON_THE_HUB.get(profile.base)
    return estimates.shape_of(config_of(profile))


def _work(lab: Lab, jobs: list[Job]) -> list[Workload]:
    """By the data, or typical where they cannot be read."""
    try:
        return workloads(lab, jobs)
    except UserError:
        return [workload.typical(lab.profile, task) for task in lab.profile.tasks]


def _speed(profile: Profile, now: Machine) -> Speed | None:
    own, float32 = machine.multiplications(profile.dtype), machine.multiplications("float32")
    return Speed(own, float32, len(now.gpus) or now.cores) if own and float32 else None


def _versions() -> Finding:
    script = ROOT / "scripts" / "environment.py"
    if not script.is_file():
        return "warning", "not held against the pins, which lie in the checkout only; run from there"
    tools = runpy.run_path(str(script))
    pins = tools["pins"](())
    others = [f"{name} is {tools['installed'](name) or 'missing'}, not {pin}"
              for name, pin in pins.items() if tools["installed"](name) != pin]  # fmt: skip
    if others:
        return "warning", f"{'; '.join(others)}; ./run_all.sh makes a .venv that holds the pins"
    return "ok", f"Python {platform.python_version()} and {len(pins)} packages as pinned"


def _processor(now: Machine) -> Finding:
    if not now.gpus:
        return "ok", f"no GPU that torch can use; {now.cores} cores"
    cards = (f"GPU {card.id}: {card.name}, {gib(card.free)} of {gib(card.total)} free" for card in now.gpus)
    return "ok", "; ".join(cards)


def _folders(lab: Lab) -> Finding:
    check_folders(lab)
    return "ok", f"{lab.directory} and {lab.figures} can be written to"


def _base(profile: Profile) -> Finding:
    if at_hand(profile) is None:
        size = estimates.download_bytes(estimates.shape_of(config_of(profile)))
        return "warning", f"{profile.base} is not here yet; a run fetches it, {gib(size)}"
    return "ok", f"{profile.base} in {check_base(profile)}"


def _token(profile: Profile) -> Finding:
    if hub.has_token():
        return "ok", "the hub's client has one"
    needed = profile.base != EMBEDDED and at_hand(profile) is None
    if not needed:
        return "ok", "none, and none is needed"
    return "warning", "none; a gated base needs one: set HF_TOKEN, or call `hf auth login`"


def _data(lab: Lab, jobs: list[Job]) -> Finding:
    work = workloads(lab, jobs)
    train, test = sum(one.train for one in work), sum(one.test for one in work)
    return "ok", f"{len(work)} tasks, {train:,} rows to train on and {test:,} to evaluate"


def _settings(profile: Profile, jobs: list[Job]) -> Finding:
    directory = at_hand(profile)
    if directory is None:
        return "warning", "not held against the base, which is not here yet"
    check_settings(profile, read_config(directory), tensor_shapes(directory), jobs)
    return "ok", "they fit the base"


def _stage(profile: Profile, stage: Stage, now: Machine) -> Finding:
    check_stage(profile, stage, now)
    share = stage.peak / capacity(now)
    time = f"roughly {estimates.roughly(stage.seconds)}" if stage.seconds else "time unknown"
    text = f"{time}; peak about {gib(stage.peak)} of {gib(capacity(now))} ({stage.worst})"
    if share > NEARLY:
        return "warning", f"{text}: little room, as estimates may be a fifth off; lower training.batch_size"
    if (stage.seconds or 0) > LONG:
        return "warning", f"{text}: longer than anybody waits; use a GPU, fewer tasks, rows or methods"
    return "ok", text


def _disk(lab: Lab, shape: Shape, work: list[Workload], jobs: list[Job]) -> Finding:
    needs = check_disk(lab, shape, work, jobs)
    text = f"results about {gib(needs['results'])}" + f", the base {gib(needs['base'])}" * bool(needs["base"])
    return "ok", f"{text}; {gib(psutil.disk_usage(str(existing(lab.directory))).free)} free"
