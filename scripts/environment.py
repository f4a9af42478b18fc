"""What scripts/setup_env.sh asks of an environment. Run by its Python; needs the standard library alone.

check                  say which pins of pyproject.toml this environment lacks; exit 1 if there are any
check cluster browser  the same, with these extras
forget-halves          forget packages whose installation was cut off, so that pip installs them again
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
ON_REQUEST = ("cluster", "browser")


def pins(asked: tuple[str, ...]) -> dict[str, str]:
    """Version by package name, of all that pyproject.toml pins for this system."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    wanted = [pins for extra, pins in extras if extra in asked or extra not in ON_REQUEST]
    requirements = [*project["dependencies"], *chain(*wanted)]
    split = (requirement.partition(";") for requirement in requirements)
    applying = (pin for pin, _, marker in split if "linux" not in marker or sys.platform == "linux")
    return dict(pin.strip().split("==") for pin in applying)


def installed(name: str) -> str | None:
    """Its version without the build (2.13.0+cpu is 2.13.0), or None."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check(*extra: str) -> int:
    differing = [
        f"{name} is {installed(name) or 'missing'}, not {pin}"
        for name, pin in pins(extra).items()
        if installed(name) != pin
    ]
    if differing:
        print(f"{sys.prefix}: {'; '.join(differing)}.", file=sys.stderr)
    return bool(differing)


def forget_halves() -> int:
    """pip writes RECORD last: a package without it was cut off, though pip counts it as installed."""
    for records in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not (records / "RECORD").is_file():
            shutil.rmtree(records)
    return 0


if __name__ == "__main__":
    sys.exit({"check": check, "forget-halves": forget_halves}[sys.argv[1]](*sys.argv[2:]))
