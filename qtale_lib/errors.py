"""The exception for what a user can cause and cure; the command line prints its sentence, no traceback."""


class UserError(Exception):
    """One sentence that names the cause and the cure; the command line exits with ``exit_code``."""

    exit_code = 2
