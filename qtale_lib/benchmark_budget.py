"""How long a benchmark may take: the seconds that it was given, shared by what it has to measure.

Work in rounds leaves out those that would end too late; work without rounds is stopped when its time is up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.overrides import TorchFunctionMode


class OutOfTime(Exception):
    """Work was stopped, since its time was up."""


class Budget:
    """Seconds for so many pieces of work, from now on; None: without end."""

    def __init__(self, seconds: float | None, pieces: int):
        self.end, self.pieces = time.monotonic() + (math.inf if seconds is None else seconds), pieces

    def next_end(self) -> float:
        """When the next piece should end, by time.monotonic: the time left is shared by the pieces left."""
        now = time.monotonic()
        share = (self.end - now) / self.pieces
        self.pieces -= 1
        return now + share


def rounds(repeats: int, end: float) -> Iterator[int]:
    """The first round, and those that end in time, if each takes as long as the ones before it."""
    started = time.monotonic()
    for done in range(repeats):
        now = time.monotonic()
        if done and now + (now - started) / done > end:
            return
        yield done


class Deadline(TorchFunctionMode):
    """Work within it raises OutOfTime at its first call of torch after `end`.

    A signal would stop it too, but in the main thread alone, and there is only one timer for signals.
    """

    def __init__(self, end: float):
        super().__init__()
        self.end, self.seconds = end, max(0.0, end - time.monotonic())

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call itself, if it is made in time."""
        if time.monotonic() > self.end:
            raise OutOfTime(f"it had not ended after the {self.seconds:.0f} s that --seconds left for it")
        return function(*args, **(kwargs or {}))
