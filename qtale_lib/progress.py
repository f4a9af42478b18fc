"""Progress with time left: a live view on a terminal, plain lines elsewhere, and in either case a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qtale_lib.log import Log, logged
from qtale_lib.pool import Outcome, Task

BAR, REST = 12, 18  # columns of the live view


def span(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 05 s, 1 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def short(path: Path) -> str:
    """A path as seen from the current folder, if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


@dataclass
class Running:
    """A task at work: what it reported first and last (share done, when), and where it said to be.

    Times are those of time.monotonic.
    """

    task: Task
    since: float
    first: tuple[float, float] | None = None
    last: tuple[float, float] = (0.0, 0.0)
    note: str = ""

    def report(self, share: float, note: str) -> None:
        """Take a report; the first one after a restart may begin anywhere."""
        self.last, self.note = (share, time.monotonic()), note
        self.first = self.first or self.last

    def progress(self) -> tuple[float, float]:
        """(share, seconds) from the first report to the last; what was before is loading."""
        first = self.first or self.last
        return self.last[0] - first[0], self.last[1] - first[1]

    def seconds_left(self) -> float | None:
        """Expected seconds until it is done; None while two reports do not tell."""
        share, seconds = self.progress()
        if share <= 0:
            return None
        whole = seconds / share
        return max(0.0, whole * (1 - self.last[0]) - (time.monotonic() - self.last[1]))

    def state(self) -> str:
        """In a clause: how much is done, where it is, and how long it will take."""
        left = self.seconds_left()
        parts = [f"{100 * self.last[0]:.0f} %", self.note, "" if left is None else f"{span(left)} left"]
        return ", ".join(part for part in parts if part)


class Forecast:
    """Time left: of a running task from its own progress, of the others from the costs expected of them and
    what the finished ones took, or until there are any, the running ones so far.
    """

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self.waiting = {task.name: task.cost for task in tasks}
        self.workers = max(1, min(workers, len(tasks)))
        self.all_cost = sum(self.waiting.values())
        self.running: dict[str, Running] = {}
        self.expected = self.taken = 0.0

    def started(self, task: Task) -> None:
        """A task was begun, or begun again."""
        self.running[task.name] = Running(task, time.monotonic())

    def progressed(self, task: Task, fraction: float, note: str = "") -> None:
        """So much of a running task is done."""
        self.running[task.name].report(fraction, note)

    def put_off(self, task: Task) -> None:
        """A task waits again."""
        self.running.pop(task.name, None)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A task is over; a finished one tells how far costs are from seconds."""
        del self.waiting[task.name]
        self.running.pop(task.name, None)
        if outcome.status == "done":
            self.expected += task.cost
            self.taken += outcome.seconds

    def cost_left(self) -> dict[str, float]:
        """Of each task that is not over, the cost of what is to be done."""
        left = dict(self.waiting)
        for name, running in self.running.copy().items():
            left[name] = running.task.cost * (1 - running.last[0])
        return left

    def share_done(self) -> float:
        """Of everything, by cost."""
        return 1 - sum(self.cost_left().values()) / self.all_cost if self.all_cost else 1.0

    def seconds(self) -> float:
        """Expected seconds until everything is done."""
        scale, left = self._seconds_a_cost(), self.cost_left()
        left = {name: scale * cost for name, cost in left.items()}
        known = {name: running.seconds_left() for name, running in self.running.copy().items()}
        left.update({name: seconds for name, seconds in known.items() if seconds is not None})
        return max(sum(left.values()) / self.workers, max(left.values(), default=0.0))

    def _seconds_a_cost(self) -> float:
        expected, taken = self.expected, self.taken
        if not expected:
            for running in self.running.copy().values():
                share, seconds = running.progress()
                expected, taken = expected + share * running.task.cost, taken + seconds
        return taken / expected if expected > 0 else 1.0


class PlainWatcher:
    """A line per finished task, and now and then one on a task that takes long: for pipes and notebooks.

    A context manager, as LiveWatcher is; both tell the log all that they are told.
    """

    said_every = 600.0  # seconds between two lines on a running task

    def __init__(self, tasks: Sequence[Task], workers: int, log: Log | None = None) -> None:
        self.forecast, self.count, self.over = Forecast(tasks, workers), len(tasks), 0
        self.log = log
        self.awaited: set[str] = set()
        self.said: dict[str, float] = {}

    def __enter__(self) -> PlainWatcher:
        text = f"{self.count} job{'s' * (self.count != 1)}, {self.forecast.workers} at a time"
        self._note("jobs", "", text)
        self.say(text + (f"; log: {short(self.log.path)}" if self.log else ""))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def started(self, task: Task) -> None:
        """A worker took the task."""
        self.forecast.started(task)
        self.said[task.name] = time.monotonic()
        self._note("start", task.name)

    def progressed(self, task: Task, fraction: float, note: str = "") -> None:
        """The task is so far; said, if nothing was said on it for long."""
        self.forecast.progressed(task, fraction, note)
        state = self.forecast.running[task.name].state()
        self._note("at", task.name, state)
        if time.monotonic() - self.said[task.name] >= self.said_every:
            self.said[task.name] = time.monotonic()
            self.say(f"{task.name}: {state}")

    def put_off(self, task: Task) -> None:
        """Another process is at the task: said once."""
        self.forecast.put_off(task)
        self._note("put off", task.name, "another process is at it")
        if task.name not in self.awaited:
            self.awaited.add(task.name)
            self.say(f"{task.name}: another process is at it; it comes last here")

    def restarted(self, task: Task, reason: str) -> None:
        """The task begins again: say why."""
        self.forecast.started(task)
        self._note("again", task.name, f"begun again, as {reason}")
        self.say(f"{task.name}: begun again, as {reason}")

    def ended(self, task: Task, outcome: Outcome) -> None:
        """The task is over: say how, and how long the rest will take."""
        self.forecast.ended(task, outcome)
        self.over += 1
        count, how = f"[{self.over}/{self.count}]", f"{describe(outcome)}{self._rest()}"
        self._note("over", task.name, f"{count} {how}")
        self.say(f"{count} {task.name}: {how}")

    def _rest(self) -> str:
        return f"; about {span(self.forecast.seconds())} left" if self.over < self.count else ""

    def _note(self, event: str, name: str, text: str = "") -> None:
        if self.log:
            self.log.write(event, name, text)

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class LiveWatcher(PlainWatcher):
    """Below the finished tasks' lines: how many of each stage are done, a bar over everything, and of each
    running task a bar and where it is.
    """

    said_every = math.inf

    def __init__(
        self, tasks: Sequence[Task], workers: int, log: Log | None = None, console: Console | None = None
    ) -> None:
        super().__init__(tasks, workers, log)
        self.stages, self.stages_over = Counter(task.stage for task in tasks), Counter()
        self.live = Live(
            get_renderable=self.view, console=console or Console(), refresh_per_second=4, transient=True
        )

    def __enter__(self) -> LiveWatcher:
        super().__enter__()
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count it with its stage as well."""
        self.stages_over[task.stage] += 1
        super().ended(task, outcome)

    def view(self) -> Group:
        """What is seen now; called by a thread of rich's."""
        stages = (f"{name} {self.stages_over[name]} of {count}" for name, count in self.stages.items())
        lines = [Text(" · ".join(stages), style="bold")]
        lines.append(
            _row(f"all {self.over} of {self.count}", self.forecast.share_done(), self.forecast.seconds())
        )
        for name, running in sorted(self.forecast.running.copy().items()):
            lines.append(_row(name, running.last[0], running.seconds_left()))
            taken = span(time.monotonic() - running.since)
            lines.append(Text(f"  {': '.join(filter(None, (taken, running.note)))}", style="dim"))
        return Group(*lines)

    def say(self, line: str) -> None:
        """Print a line above the view."""
        self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _row(name: str, share: float, seconds_left: float | None) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1, no_wrap=True)
    row.add_column(width=BAR)
    row.add_column(width=5, justify="right")
    row.add_column(width=REST, justify="right", no_wrap=True)
    bar = ProgressBar(total=1.0, completed=share, width=BAR)
    rest = "" if seconds_left is None else f"{span(seconds_left)} left"
    row.add_row(Text(name), bar, f"{100 * share:.0f} %", rest)
    return row


@contextlib.contextmanager
def watcher(tasks: Sequence[Task], workers: int, directory: Path) -> Iterator[PlainWatcher]:
    """A live view where a person watches a terminal, plain lines elsewhere; a log in the profile's folder."""
    alive = sys.stdout.isatty() and not Console().is_dumb_terminal
    with logged(directory) as log, (LiveWatcher if alive else PlainWatcher)(tasks, workers, log) as watching:
        yield watching


def describe(outcome: Outcome) -> str:
    """One clause on how a task ended."""
    return span(outcome.seconds) if outcome.status == "done" else f"{outcome.status.upper()}, {outcome.error}"


class Stopclock:
    """Times of named stages, for the summary and the log."""

    def __init__(self, log: Log | None = None) -> None:
        self.log = log
        self.stages: list[tuple[str, float, str]] = []
        self._since = time.monotonic()

    def lap(self, stage: str, note: str) -> None:
        """Note the seconds since the lap before under the stage's name."""
        now = time.monotonic()
        self.stages.append((stage, now - self._since, note))
        if self.log:
            self.log.write("stage", stage, f"{span(now - self._since)}; {note}")
        self._since = now
