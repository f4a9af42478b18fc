"""Exceptions for what a user can cause and cure; the command line prints their sentence, no traceback."""

from __future__ import annotations

import errno
import os

# Of the system: for each, what helps. Packages in Rust give its number in their message only.
CURES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "allow it",
    errno.EPERM: "allow it",
}


class UserError(Exception):
    """One sentence that names the cause and the cure; the command line exits with ``exit_code``.

    This one: something was asked for that cannot be, such as an unknown setting or a result not computed yet.
    """

    exit_code = 2


class DamagedError(UserError):
    """A file is missing, damaged, or does not belong to the others."""

    exit_code = 3


class MachineError(UserError):
    """The machine lacks something: memory, disk, the right to write, a GPU, a network."""

    exit_code = 4


def of_machine(error: Exception) -> MachineError | None:
    """A system's refusal to read or write as one sentence; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    number = number or next((n for n in CURES if f"(os error {n})" in str(error)), None)
    if number not in CURES:
        return None
    place = getattr(error, "filename", None) or "A file cannot be written"
    return MachineError(
        f"{place}: {os.strerror(number)}; {CURES[number]} and run again: what is finished is kept."
    )
