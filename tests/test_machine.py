"""What a machine is taken to have: its cores under a quota, its GPUs by their ids, its speed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qtale_lib import machine
from qtale_lib.machine import Gpu

CARDS = [["A", 80, 70], ["B", 40, 30]]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """Stands for the root of the file system, and nothing is remembered of the machine before."""
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    machine.gpus.cache_clear()
    machine.multiplications.cache_clear()
    yield tmp_path
    machine.gpus.cache_clear()
    machine.multiplications.cache_clear()


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 6), ("250000 100000\n", 2), ("40000 100000\n", 1), ("9900000 100000\n", 6), (None, 6)],
)
def test_cores_are_those_of_the_affinity_within_the_containers_quota(files, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    if quota:
        write(files / "sys/fs/cgroup/cpu.max", quota)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(("known", "cores"), [(3, 3), (None, 1)])
def test_where_no_affinity_is_told_all_cores_count(monkeypatch, known, cores):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: known)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize("node", ["dev/nvidiactl", "dev/kfd"])
@pytest.mark.parametrize(("visible", "ids"), [(None, ("0", "1")), ("3,1", ("3", "1")), ("", ("0", "1"))])
def test_gpus_are_named_as_the_system_names_them_and_asked_for_once(files, monkeypatch, node, visible, ids):
    write(files / node)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    asked = []
    monkeypatch.setattr(machine, "_asked", lambda code: asked.append(code) or json.dumps(CARDS))
    assert machine.gpus() == machine.gpus() == (Gpu(ids[0], "A", 80, 70), Gpu(ids[1], "B", 40, 30))
    assert asked == [machine.ASK_GPUS] and machine.look().device == "gpu"


@pytest.mark.parametrize("answer", ["", "[]"])
def test_a_driver_that_torch_cannot_use_is_no_gpu(files, monkeypatch, answer):
    write(files / "dev/nvidiactl")
    monkeypatch.setattr(machine, "_asked", lambda code: answer)
    assert machine.gpus() == () and machine.look().device == "cpu"


def test_without_a_driver_torch_is_not_asked(monkeypatch):
    monkeypatch.setattr(machine, "_asked", lambda code: pytest.fail("asked"))
    assert machine.gpus() == ()


def test_speed_is_measured_in_a_process_of_its_own_and_unknown_where_that_fails(monkeypatch):
    monkeypatch.setattr(machine, "ASK_SPEED", machine.ASK_SPEED.replace("768", "64"))
    assert machine.multiplications("float32") > 1e6
    assert machine.multiplications("float31") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_what_is_asked_of_torch_is_its_list_of_gpus():
    assert machine._asked(machine.ASK_GPUS) == "[]"
