"""The audit of the pins: what it asks, what it says, and that no answer is never taken for a good one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest

from qtale_lib.errors import MachineError
from qtale_lib.provenance import ROOT


class Database:
    """Answers as osv.dev does, with what is `known` of each name and version; or always with `answer`."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], list[str]] = {}
        self.asked: list[tuple[str, str]] = []
        self.answer: tuple[int, str] | None = None
        database = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                code, text = database.answer or (200, json.dumps(database.results(query)))
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def results(self, query: dict) -> dict:
        assert {each["package"]["ecosystem"] for each in query["queries"]} == {"PyPI"}
        self.asked = [(each["package"]["name"], each["version"]) for each in query["queries"]]
        found = [[{"id": name, "modified": ""} for name in self.known.get(pin, ())] for pin in self.asked]
        return {"results": [{"vulns": each} if each else {} for each in found]}


@pytest.fixture
def database() -> Iterator[Database]:
    served = Database()
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture
def audit(database, monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import audit

    monkeypatch.setattr(audit, "URL", f"http://127.0.0.1:{database.http.server_port}/v1/querybatch")
    return audit


def test_every_pin_is_asked_about_once_torch_and_ray_too(audit, database, capsys):
    assert audit.main() == 0
    assert re.match(r"0 of \d+ pinned packages have known", capsys.readouterr().err)
    assert len(set(database.asked)) == len(database.asked)
    locks = [path.read_text() for path in ROOT.glob("requirements*.lock")]
    lines = [line for lock in locks for line in lock.splitlines() if re.match(r"[a-z0-9]", line)]
    for line in lines:
        name, version = re.split(r"==|[ ;\\]", line)[:2]
        assert (name, version) in database.asked
    names = {name for name, _ in database.asked}
    assert len(locks) == 3 and names == {re.split("==", line)[0] for line in lines} | {"torch"}


def test_what_is_known_is_listed(audit, database, capsys):
    torch = next(pin for pin in audit.pinned() if pin[0] == "torch")
    database.known = {torch: ["GHSA-1", "CVE-2"], ("torch", "1.0"): ["CVE-3"]}
    assert audit.main() == 1
    said = capsys.readouterr()
    assert said.out == f"torch {torch[1]}: GHSA-1, CVE-2\n" and said.err.startswith("1 of ")


@pytest.mark.parametrize(
    "answer",
    [
        (503, "{}"),
        (200, "<html>"),
        (200, "{}"),
        (200, "[]"),
        (200, '{"results": []}'),
        (200, '{"results": null}'),
    ],
)
def test_another_answer_than_agreed_is_none(audit, database, capsys, answer):
    database.answer = answer
    assert audit.main() == MachineError.exit_code
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch("The audit could not run: .*\n", said.err)


def test_without_a_network_it_says_that_it_could_not_run(audit, database, capsys):
    database.http.server_close()
    assert audit.main() == MachineError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("The audit could not run: ") and len(said.splitlines()) == 1


@pytest.mark.slow
def test_of_what_is_pinned_no_vulnerability_is_known():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "audit.py"], capture_output=True, text=True, check=False
    )
    if done.returncode == MachineError.exit_code:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
