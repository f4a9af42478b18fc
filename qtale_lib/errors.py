"""Exceptions for what a user can cause and cure; the command line prints their sentence, no traceback."""


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
