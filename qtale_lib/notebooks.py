"""Executing the notebooks by papermill: a process each, skipped while nothing that they show has changed.

A failing notebook stops no other; its executed copy holds the error. The scoreboard, 00, goes last.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qtale_lib import benchmark_report, studies
from qtale_lib.errors import UserError
from qtale_lib.jobs import needs
from qtale_lib.lab import PATIENCE, READ_ONLY, Lab
from qtale_lib.pool import THREAD_VARIABLES, Outcome, Task, Watcher
from qtale_lib.provenance import ROOT
from qtale_lib.store import digest, file_digest, locked, read_json, write_json

NOTEBOOKS = ROOT / "notebooks"
KERNEL = "python3"
SCOREBOARD = "00"
SCORED = ("08", "09")  # notebooks whose studies' verdicts it has beside the profile's
AT_ONCE = 2


def choose(only: str | None = None) -> list[Path]:
    """The notebooks in the order of their execution; `only`: their numbers, such as "03,05".

    Raises:
        UserError: if a part of `only` is empty or no number, or the number of no notebook.
    """
    found = {path.name[:2]: path for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))}
    wanted = list(found) if only is None else _numbers(only)
    unknown = [number for number in wanted if number not in found]
    if unknown:
        raise UserError(f"There is no notebook {', '.join(unknown)}; choose from {', '.join(found)}.")
    return [
        found[number] for number in sorted(set(wanted), key=lambda number: (number == SCOREBOARD, number))
    ]


def _numbers(only: str) -> list[str]:
    parts = [part.strip() for part in only.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f'--only (= "{only}") must be numbers with commas between them, such as 03,05.')
    return [part.zfill(2) for part in parts]


class Executions:
    """The notebooks of one profile: which are up to date, and executing the others."""

    def __init__(self, lab: Lab, parameters: dict[str, str | int]) -> None:
        """parameters: values for names in the notebooks' cell of parameters."""
        self.lab, self.parameters = lab, parameters
        self.directory = lab.directory / "notebooks"
        self.library = file_digest(*library_files())

    def stale(self, notebooks: Iterable[Path]) -> list[Path]:
        """Those whose source, library, profile or results changed since, or whose products are gone."""
        return [path for path in notebooks if not self._up_to_date(path)]

    def forget(self, notebooks: Iterable[Path]) -> None:
        """Make them stale."""
        for notebook in notebooks:
            self._stamp(notebook).unlink(missing_ok=True)

    def _up_to_date(self, notebook: Path) -> bool:
        stamp = read_json(self._stamp(notebook))
        if not isinstance(stamp, dict) or stamp.get("inputs") != self._inputs(notebook):
            return False
        return all(Path(product).exists() for product in stamp["products"])

    def _stamp(self, notebook: Path) -> Path:
        return self.directory / f"{notebook.stem}.json"

    def _inputs(self, notebook: Path) -> str:
        results = [self.lab.fingerprint(job) for job in needs(self.lab.profile, notebook.name)]
        if notebook.name[:2] == benchmark_report.NOTEBOOK:
            results.append(benchmark_report.fingerprint(self.lab))
        results += [study.fingerprint() for study in self.studies(notebook)]
        return digest(
            file_digest(notebook), self.library, self.lab.profile.digest(), self.parameters, results
        )

    def studies(self, notebook: Path) -> list[studies.Study]:
        """The study that a notebook shows, if it shows one; the scoreboard has the verdicts of several."""
        own = notebook.name[:2]
        numbers = SCORED if own == SCOREBOARD else [own] if own in studies.NAMES else []
        given = {name.lower(): value for name, value in self.parameters.items()}
        given = {name: value for name, value in given.items() if name in ("profile", "data_dir", "seeds")}
        profile, root = given.pop("profile", "tiny"), self.lab.directory.parent
        return [studies.study_of(number, profile, root, **given) for number in numbers]

    def execute(self, notebooks: list[Path], watcher: Watcher) -> list[Outcome]:
        """Execute them, two at a time, the scoreboard after the others."""
        early = [path for path in notebooks if path.name[:2] != SCOREBOARD]
        late = [path for path in notebooks if path.name[:2] == SCOREBOARD]
        outcomes = []
        for group in (early, late):
            with ThreadPoolExecutor(AT_ONCE) as threads:
                outcomes += threads.map(lambda path: self._watched(path, watcher), group)
        return outcomes

    def _watched(self, notebook: Path, watcher: Watcher) -> Outcome:
        task = as_task(notebook)
        watcher.started(task)
        outcome = self._execute(notebook)
        watcher.ended(task, outcome)
        return outcome

    def _execute(self, notebook: Path) -> Outcome:
        """Alone at it, where several reproductions share these results; done by another, it is done."""
        started = time.monotonic()
        with locked(self.lab.store.root / "locks" / f"notebook-{notebook.stem}"):
            if time.monotonic() - started > PATIENCE and self._up_to_date(notebook):
                return Outcome(notebook.stem, "done", time.monotonic() - started)
            return self._execute_alone(notebook)

    def _execute_alone(self, notebook: Path) -> Outcome:
        copy, started, began = self.directory / notebook.name, time.monotonic(), time.time()
        self._stamp(notebook).unlink(missing_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        inputs = self._inputs(notebook)
        done = subprocess.run(
            self._command(notebook, copy),
            cwd=NOTEBOOKS,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        seconds, name = time.monotonic() - started, notebook.stem
        if done.returncode:
            return Outcome(name, "failed", seconds, f"{_last_line(done.stderr)} (see {copy})", done.stderr)
        products = [str(copy), *map(str, self._written_since(began))]
        write_json(self._stamp(notebook), {"inputs": inputs, "seconds": seconds, "products": products})
        return Outcome(name, "done", seconds)

    def _command(self, notebook: Path, copy: Path) -> list[str]:
        papermill = [sys.executable, "-m", "papermill", str(notebook), str(copy), "--kernel", KERNEL]
        given = [("-p" if isinstance(v, int) else "-r", name, str(v)) for name, v in self.parameters.items()]
        return [*papermill, "--log-output", "--no-progress-bar", *(word for words in given for word in words)]

    def _written_since(self, began: float) -> list[Path]:
        """Figures and tables of the time of execution: if one is gone, the notebook is executed again.

        Two notebooks at once each list the other's as well: that executes one too many, never too few.
        """
        places = (self.lab.figures, self.lab.tables)
        files = [path for place in places if place.is_dir() for path in place.iterdir()]
        written = [path for path in files if not path.name.startswith(".")]  # half written
        return [path for path in written if path.stat().st_mtime >= began - 1]


def as_task(notebook: Path) -> Task:
    """The notebook as something that a watcher can show."""
    return Task(notebook.stem, as_task, cost=8.0, stage="notebooks")


def environment() -> dict[str, str]:
    """The environment of a notebook's process: this library, one thread, nothing left to compute."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, "1"),
        "PYTHONPATH": os.pathsep.join(paths),
        READ_ONLY: "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def library_files() -> list[Path]:
    """The sources that a notebook's output may depend on."""
    package = ROOT / "qtale_lib"
    return [path for pattern in ("*.py", "*.yaml") for path in package.rglob(pattern)]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "papermill gave no reason"
