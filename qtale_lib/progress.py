"""Progress with time left: bars on a terminal, one plain line per finished task elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from qtale_lib.pool import Outcome, Task


def span(seconds: float) -> str:
    """A duration as people say it: 42 s, 3 min 05 s, 1 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Forecast:
    """Time left, from the costs expected of the tasks and what the finished ones took."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self.left = {task.name: task.cost for task in tasks}
        self.workers = max(1, min(workers, len(tasks)))
        self.expected = self.taken = 0.0

    def progressed(self, task: Task, fraction: float) -> None:
        """So much of a running task is done."""
        self.left[task.name] = task.cost * (1 - fraction)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A task is over; a finished one tells how far costs are from seconds."""
        self.left.pop(task.name)
        if outcome.status == "done":
            self.expected += task.cost
            self.taken += outcome.seconds

    def seconds(self) -> float:
        """Expected seconds until everything is done."""
        scale = self.taken / self.expected if self.expected else 1.0
        return scale * max(sum(self.left.values()) / self.workers, max(self.left.values(), default=0.0))


class PlainWatcher:
    """One line per finished task: for logs, pipes and notebooks. A context manager, as BarWatcher is."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        self.forecast, self.count, self.over = Forecast(tasks, workers), len(tasks), 0
        self.awaited: set[str] = set()

    def __enter__(self) -> PlainWatcher:
        self.say(f"{self.count} jobs, {self.forecast.workers} at a time")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def started(self, task: Task) -> None:
        """A worker took the task."""

    def progressed(self, task: Task, fraction: float) -> None:
        """The task is so far."""
        self.forecast.progressed(task, fraction)

    def put_off(self, task: Task) -> None:
        """Another process is at the task: said once."""
        self.forecast.progressed(task, 0.0)
        if task.name not in self.awaited:
            self.awaited.add(task.name)
            self.say(f"{task.name}: another process is at it; it comes last here")

    def restarted(self, task: Task, reason: str) -> None:
        """The task begins again: say why."""
        self.progressed(task, 0.0)
        self.say(f"{task.name}: begun again, as {reason}")

    def ended(self, task: Task, outcome: Outcome) -> None:
        """The task is over: say how, and how long the rest will take."""
        self.forecast.ended(task, outcome)
        self.over += 1
        self.say(f"[{self.over}/{self.count}] {describe(outcome)}{self._rest()}")

    def _rest(self) -> str:
        return f"; about {span(self.forecast.seconds())} left" if self.over < self.count else ""

    def say(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class BarWatcher(PlainWatcher):
    """A bar over everything and one per running task, below the finished tasks' lines."""

    def __init__(self, tasks: Sequence[Task], workers: int) -> None:
        super().__init__(tasks, workers)
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(ratio=2, no_wrap=True)),
            BarColumn(table_column=Column(ratio=1)),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rest]}"),
            console=Console(),
            transient=True,
        )
        self.all_cost = sum(task.cost for task in tasks)
        self.overall = self.progress.add_task("all", total=self.all_cost, rest="")
        self.bars: dict[str, int] = {}

    def __enter__(self) -> BarWatcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, task: Task) -> None:
        """Show a bar for the task."""
        self.bars[task.name] = self.progress.add_task(task.name, total=1.0, rest="")

    def progressed(self, task: Task, fraction: float) -> None:
        """Move its bar and the one over everything."""
        super().progressed(task, fraction)
        self.progress.update(self.bars[task.name], completed=fraction)
        self._move()

    def put_off(self, task: Task) -> None:
        """Take its bar away."""
        self._remove_bar(task)
        super().put_off(task)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Take its bar away and print its line."""
        self._remove_bar(task)
        super().ended(task, outcome)
        self._move()

    def _remove_bar(self, task: Task) -> None:
        if task.name in self.bars:
            self.progress.remove_task(self.bars.pop(task.name))

    def _move(self) -> None:
        done = self.all_cost - sum(self.forecast.left.values())
        self.progress.update(self.overall, completed=done, rest=f"{span(self.forecast.seconds())} left")

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(line, markup=False, highlight=False)


def watcher(tasks: Sequence[Task], workers: int) -> PlainWatcher:
    """Bars where a person watches a terminal, plain lines elsewhere."""
    return (BarWatcher if sys.stdout.isatty() else PlainWatcher)(tasks, workers)


def describe(outcome: Outcome) -> str:
    """One clause on how a task ended."""
    if outcome.status == "done":
        return f"{outcome.name}: {span(outcome.seconds)}"
    return f"{outcome.name}: {outcome.status.upper()}, {outcome.error}"


class Stopclock:
    """Times of named stages, for the summary."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, str]] = []
        self._since = time.monotonic()

    def lap(self, stage: str, note: str) -> None:
        """Note the seconds since the lap before under the stage's name."""
        now = time.monotonic()
        self.stages.append((stage, now - self._since, note))
        self._since = now
