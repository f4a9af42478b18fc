"""The command line: `python -m qtale_lib run` computes every run, then executes the notebooks.

What ends it is said in one sentence on stderr, and by the exit code:

1: a job or a notebook failed; its whole error is kept in failures.txt.
2: something was asked for that cannot be: an option, a setting, a result not computed yet.
3: a file is missing, damaged, or does not belong to the others.
4: the machine lacks something: memory, disk, the right to write, a GPU, a network.
130, 143: it was stopped, by Ctrl-C or SIGTERM, and goes on when it is started again.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NoReturn

import typer

from qtale_lib.cli.common import app
from qtale_lib.errors import UserError, of_machine

# each adds its commands to the app, which lists them in this order
for _room in ("reproduction", "one_run", "artefacts", "studies", "timing"):
    importlib.import_module(f"{__name__}.{_room}")

app.info.help = __doc__


def main() -> None:
    """Entry point of `python -m qtale_lib`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except UserError as error:
        _refuse(error)
    except OSError as error:
        if refusal := of_machine(error):
            _refuse(refusal)
        raise


def _refuse(error: UserError) -> NoReturn:
    typer.echo(str(error), err=True)
    sys.exit(error.exit_code)
