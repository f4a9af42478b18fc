"""What a user does at the keyboard: notebooks by hand in JupyterLab, and `run` killed and called again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from websocket import create_connection

from qtale_lib.provenance import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def own_places(folder: Path) -> dict[str, str]:
    """The environment in which results and figures go to a folder of their own."""
    places = {"QTALE_RESULTS_DIR": folder / "results", "QTALE_FIGURES_DIR": folder / "figures"}
    return {**os.environ, **{name: str(place) for name, place in places.items()}}


class Lab:
    """A JupyterLab server, spoken to as its page in the browser does."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token

    def call(self, method: str, path: str, body: dict | None = None):
        request = urllib.request.Request(
            f"{self.address}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def open(self, path: str) -> str:
        """Opens a notebook with a new kernel; returns the kernel's id."""
        body = {"path": path, "name": "", "type": "notebook", "kernel": {"name": "python3"}}
        return json.loads(self.call("POST", "/api/sessions", body))["kernel"]["id"]

    def execute(self, kernel: str, cells: list[str]) -> list[dict]:
        """Runs cells one after the other; returns the kernel's reply to each."""
        socket = create_connection(
            f"{self.address.replace('http', 'ws', 1)}/api/kernels/{kernel}/channels?token={self.token}",
            timeout=900,
        )
        replies = []
        for cell in cells:
            asked = uuid.uuid4().hex
            header = {"msg_id": asked, "msg_type": "execute_request", "username": "", "session": asked}
            content = {"code": cell, "silent": False, "allow_stdin": False, "store_history": True}
            message = {"channel": "shell", "parent_header": {}, "metadata": {}, "content": content}
            socket.send(json.dumps({**message, "header": {**header, "version": "5.3"}}))
            while True:
                answer = json.loads(socket.recv())
                if answer["msg_type"] == "execute_reply" and answer["parent_header"].get("msg_id") == asked:
                    break
            replies.append(answer["content"])
        socket.close()
        return replies


@pytest.fixture(scope="module")
def jupyterlab(tmp_path_factory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    runtime, token = folder / "runtime", uuid.uuid4().hex
    options = ("--no-browser", "--allow-root", "--ServerApp.port=0", "--ip=127.0.0.1")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={token}"],
            cwd=ROOT,
            env={**own_places(folder), "JUPYTER_RUNTIME_DIR": str(runtime)},
            stdout=log,
            stderr=log,
        )
    deadline = time.monotonic() + 120
    while not (found := list(runtime.glob("jpserver-*.json"))):
        assert time.monotonic() < deadline and server.poll() is None, (folder / "log").read_text()
        time.sleep(0.2)
    yield Lab(json.loads(found[0].read_text())["url"].rstrip("/"), token)
    server.terminate()
    server.wait(60)


def test_the_page_of_jupyterlab_is_served(jupyterlab):
    assert b"JupyterLab" in jupyterlab.call("GET", "/lab")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_by_hand_from_its_first_cell(jupyterlab, path):
    """In a kernel of its own, and then once more from the top in the same kernel."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    typed = [cell.replace('PROFILE = "tiny"', 'PROFILE = "smoke"') for cell in cells]
    assert typed != cells
    kernel = jupyterlab.open(f"notebooks/{path.name}")
    replies = jupyterlab.execute(kernel, typed + typed)
    jupyterlab.call("DELETE", f"/api/kernels/{kernel}")
    assert [reply["status"] for reply in replies] == ["ok"] * (2 * len(cells)), replies[-1]
    assert [reply["execution_count"] for reply in replies] == list(range(1, 2 * len(cells) + 1))


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL to all its processes, twice: among the runs, and among the notebooks (a stamp ends each)."""

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(ROOT / "run_all.sh"), "--profile", "smoke"],
            cwd=tmp_path,
            env=own_places(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finished(pattern: str) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "results").glob(f"smoke/{pattern}")}

    for pattern, enough in (("store/*/*.json", 6), ("notebooks/*.json", 2)):
        running = start()
        deadline = time.monotonic() + 900
        while len(before := finished(pattern)) < enough:
            assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    computed = finished("store/*/*.json")
    last = start()
    said = last.communicate(timeout=900)[0]
    assert last.returncode == 0, said
    assert re.search(r"\b0 jobs, [1-9]\d* there already", said)
    assert computed == finished("store/*/*.json") and before.items() <= finished("notebooks/*.json").items()
    assert len(finished("notebooks/*.json")) == len(NOTEBOOKS)
