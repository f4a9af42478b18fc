"""Results on disk: one JSON each, written whole or not at all, found by a digest of what it was made from.

Nothing here knows what a result means, and nothing imports torch: notebooks read through it in milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qtale_lib.errors import DamagedError

SCHEMA = 1
POLL = 0.1  # seconds between two looks at a lock
HEAD, END = 512, b"\n}\n"  # bytes of a result in which `put` writes what it is, and its last ones
DAY = 24 * 3600.0  # seconds; no writer of one file lives that long


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(*parts: Any) -> str:
    """16 hex digits of sha256 over the canonical JSON of the parts."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """sha256 over the names and contents of files, in order of path."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write what is to be at a path: it comes there at one stroke and durably, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        yield temporary
        os.fsync(handle)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Replace the file, as `replaced` does; numbers that are not finite become null."""
    with replaced(path) as file:
        file.write_text(_lines(_finite(value)), encoding="utf-8")


def sweep(folder: Path) -> None:
    """Remove the temporary files that writers killed a day ago, or earlier, left in a folder or below it."""
    for path in folder.rglob(".*.*.????????"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if path.stat().st_mtime < time.time() - DAY:
                path.unlink()


def discard(folder: Path) -> None:
    """Empty a folder, if it is there; each thing in it goes at one stroke, so none is ever half there."""
    if not folder.is_dir():
        return
    aside = folder / ".discarded"  # within, as the folder may be a link or a mount
    aside.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path != aside:
            path.rename(aside / str(uuid.uuid4()))
    shutil.rmtree(aside)


def read_json(path: Path) -> Any:
    """The file's value, or None if it is missing, cut off or not JSON: then it is computed again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def _lines(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    items = (
        f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, allow_nan=False)}" for k, v in value.items()
    )
    return "{\n" + ",\n".join(items) + "\n}\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def locked(path: Path, patience: float | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on a file; the system releases it when its holder dies, however it dies.

    patience: seconds after which it is given up; None waits as long as it takes. Yields whether it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        yield _lock(handle, patience)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock on a file, which is only looked at."""
    try:
        with path.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(handle: IO[str], patience: float | None) -> bool:
    if patience is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    end = time.monotonic() + patience
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(POLL)


def is_sound(result: Any) -> bool:
    """Whether a JSON value has the shape of a finished result."""
    parts = ("spec", "value", "provenance")
    return (
        isinstance(result, dict)
        and result.get("schema") == SCHEMA
        and result.get("status") == "done"
        and "key" in result
        and all(isinstance(result.get(part), dict) for part in parts)
    )


def inside(folder: Path, *names: str) -> Path:
    """A path below a folder; names that come from elsewhere cannot lead out of it.

    Raises:
        DamagedError: for a name that is no single step down.
    """
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise DamagedError(f"{name!r} is no name of a file in {folder}; what it came with is damaged.")
    return folder.joinpath(*names)


@dataclass(frozen=True)
class Parcel:
    """A result on its way to another store: (kind, name, key), its JSON, and its files by relative path."""

    address: tuple[str, str, str]
    result: dict[str, Any]
    files: dict[str, bytes]


class Store:
    """Results under root/<kind>/<name>-<key>.json, with a folder of the same name for a result's files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, name: str, key: str) -> Path:
        """Where a result's JSON lies, whether or not it is there."""
        files = self.files(kind, name, key)
        return files.with_name(f"{files.name}.json")

    def holds(self, kind: str) -> bool:
        """Whether a result of this kind was ever begun."""
        return (self.root / kind).is_dir()

    def files(self, kind: str, name: str, key: str) -> Path:
        """Where a result's files lie."""
        return inside(self.root, kind, f"{name}-{key}")

    def get(self, kind: str, name: str, key: str) -> dict[str, Any] | None:
        """A finished result, or None; a damaged one, or one of another schema, counts as missing."""
        result = read_json(self.path(kind, name, key))
        return result if is_sound(result) and result["key"] == key else None

    def has(self, kind: str, name: str, key: str) -> bool:
        """Whether a result seems to be there, by its first and last bytes, which alone are read."""
        try:
            with self.path(kind, name, key).open("rb") as file:
                head = file.read(HEAD).decode(errors="replace")
                file.seek(-len(END), os.SEEK_END)
                whole = file.read() == END
        except OSError:
            return False
        said = (f'"schema": {SCHEMA},', f'"key": {json.dumps(key)},', '"status": "done",')
        return whole and all(part in head for part in said)

    def put(self, kind: str, name: str, key: str, **parts: Any) -> dict[str, Any]:
        """Write a finished result: spec, value, config and provenance."""
        result = {"schema": SCHEMA, "kind": kind, "key": key, "status": "done", **parts}
        write_json(self.path(kind, name, key), result)
        return result

    def parcel(self, kind: str, name: str, key: str) -> Parcel | None:
        """A finished result with its files, for `take` of another store; None if it is not there."""
        result, folder = self.get(kind, name, key), self.files(kind, name, key)
        if result is None:
            return None
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return Parcel((kind, name, key), result, files)

    def take(self, parcel: Parcel) -> None:
        """Put a parcel in, its JSON last, which says that the files are whole; what is there stays."""
        if self.get(*parcel.address):
            return
        for relative, content in parcel.files.items():
            path = inside(self.files(*parcel.address), *Path(relative).parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_json(self.path(*parcel.address), parcel.result)

    def remove(self, kind: str, name: str, key: str) -> None:
        """Remove a result, if it is there, then its files: what a kill leaves never counts as finished."""
        self.path(kind, name, key).unlink(missing_ok=True)
        if (files := self.files(kind, name, key)).exists():
            shutil.rmtree(files)

    def job_lock(self, name: str, patience: float) -> contextlib.AbstractContextManager[bool]:
        """The lock of all that a job computes: whoever holds it is at that job."""
        return locked(self.root / "locks" / f"job-{name}", patience)

    def lock(self, kind: str, name: str, key: str) -> contextlib.AbstractContextManager[bool]:
        """The lock under which one result is computed; look again for the result after taking it."""
        return locked(self.root / "locks" / f"{kind}-{name}-{key}")
