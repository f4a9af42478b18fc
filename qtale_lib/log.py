"""The log of long work: results/<profile>/logs/<when begun>-<process>.log, one a process.

A line is written, at one stroke, when something happens, so that a kill loses none: the time, an event, the
job that it is of and a text, with tabs between. While the process is at it, it holds a lock on the file,
which the system takes back however the process ends: `status` tells the living by it.

    begin: the process and its command     jobs: how many there are      start: a job was begun
    at: how far it is                      put off, again: what became of it meanwhile
    over: how it ended                     stage: of a reproduction, done       end: of the process's work
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from qtale_lib.store import is_held, locked

BEGUN = datetime.now(UTC)
HIDDEN = "***"
SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD)$")
SECRET = re.compile(r"\b(hf_|sk-)[\w-]{16,}")
SHORTEST_SECRET = 8  # characters: an environment variable may also be called so and hold no secret

_open: dict[Path, Log] = {}


class Log:
    """What `logged` yields; without a file, where none can be written, it takes lines and keeps none."""

    def __init__(self, path: Path, file: io.RawIOBase | None) -> None:
        self.path, self._file = path, file

    def write(self, event: str, name: str = "", text: str = "") -> None:
        """Append a line. One that cannot be written is lost: work does not end for its log."""
        fields = (_now(), event, name, " ".join(without_secrets(text).split()))
        if self._file:
            with contextlib.suppress(OSError):
                self._file.write(("\t".join(fields) + "\n").encode(errors="replace"))


@contextlib.contextmanager
def logged(directory: Path) -> Iterator[Log]:
    """This process's log in a profile's folder; within another `logged` of it, the one that is open."""
    path = path_in(directory)
    if path in _open:
        yield _open[path]
        return
    with contextlib.ExitStack() as held:
        log = _open[path] = Log(path, _file(path, held))
        try:
            log.write("begin", f"process {os.getpid()} on {socket.gethostname()}", " ".join(sys.argv[1:]))
            yield log
            log.write("end", "", "finished")
        except (KeyboardInterrupt, SystemExit):
            log.write("end", "", "stopped")
            raise
        except BaseException as error:
            log.write("end", "", f"ended by {type(error).__name__}: {error}")
            raise
        finally:
            del _open[path]


def path_in(directory: Path) -> Path:
    """Where this process's log lies in a profile's folder, whether or not there is one."""
    return directory / "logs" / f"{BEGUN:%Y%m%d-%H%M%S}-{os.getpid()}.log"


def _file(path: Path, held: contextlib.ExitStack) -> io.RawIOBase | None:
    try:
        held.enter_context(locked(path))
        return held.enter_context(path.open("ab", buffering=0))
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def without_secrets(text: str) -> str:
    """The text without tokens: what environment variables with such names hold, and what looks like one."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name.upper()) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return SECRET.sub(HIDDEN, text)


# Reading it.


@dataclass(frozen=True)
class Line:
    """A line of a log."""

    at: datetime
    event: str
    name: str
    text: str


@dataclass
class Told:
    """What a log tells: whether its process is at it, its first and last line, the last of each running job
    with when that was begun, and how many jobs are over of those begun last.
    """

    path: Path
    alive: bool
    first: Line
    last: Line
    running: dict[str, tuple[datetime, Line]] = field(default_factory=dict)
    over: Line | None = None


def tell(directory: Path) -> list[Told]:
    """Of the logs in a profile's folder: those of living processes, else the latest; the oldest first."""
    paths = sorted(directory.glob("logs/*.log"))
    alive = [path for path in paths if is_held(path)]
    found = ((path, read(path)) for path in alive or paths[-1:])
    return [_told(path, bool(alive), lines) for path, lines in found if lines]


def _told(path: Path, alive: bool, lines: list[Line]) -> Told:
    told = Told(path, alive, lines[0], lines[-1])
    for line in lines:
        if line.event == "jobs":
            told.running, told.over = {}, None
        elif line.event == "start":
            told.running[line.name] = line.at, line
        elif line.event in ("at", "again") and line.name in told.running:
            told.running[line.name] = told.running[line.name][0], line
        elif line.event in ("over", "put off"):
            told.running.pop(line.name, None)
            told.over = line if line.event == "over" else told.over
    return told


def read(path: Path) -> list[Line]:
    """The lines of a log; one that is cut off, or is none, is left out."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = text.split("\t")
        with contextlib.suppress(ValueError):
            at, event, name, said = fields
            found.append(Line(datetime.fromisoformat(at), event, name, said))
    return found
