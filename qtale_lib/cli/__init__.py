"""The command line: `python -m qtale_lib run` computes every run, then executes the notebooks.

What a user can cause ends in one sentence on stderr and exit code 2; what failed on the way, in exit code 1.
"""

from __future__ import annotations

import importlib
import signal
import sys

import typer

from qtale_lib.cli.common import app
from qtale_lib.errors import UserError

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
        typer.echo(str(error), err=True)
        sys.exit(error.exit_code)
