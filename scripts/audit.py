"""Asks osv.dev, the database of known vulnerabilities, about every version that this repository pins.

    python scripts/audit.py

Exit code 0: none is known; 1: some are, a line for each package; 4: no answer, which says nothing.
One question for all of them; names and versions are what is sent.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx
from environment import ON_REQUEST, pins

ROOT = Path(__file__).parent.parent
URL = "https://api.osv.dev/v1/querybatch"
SECONDS = 60.0
NO_ANSWER = (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError)  # or another than agreed
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)", re.M)


def pinned() -> list[tuple[str, str]]:
    """(name, version) of all pins: those of the locks, and the direct ones, of which torch is in no lock."""
    locked = [pin for lock in ROOT.glob("requirements*.lock") for pin in PIN.findall(lock.read_text())]
    return sorted({*locked, *pins(ON_REQUEST).items()})


def known(asked: list[tuple[str, str]]) -> list[list[str]]:
    """The names of the vulnerabilities that are known of each; one of NO_ANSWER if that cannot be told."""
    queries = [{"package": {"ecosystem": "PyPI", "name": name}, "version": v} for name, v in asked]
    answer = httpx.post(URL, json={"queries": queries}, timeout=SECONDS)
    results = answer.raise_for_status().json()["results"]
    pairs = zip(asked, results, strict=True)
    return [[found["id"] for found in result.get("vulns", [])] for _, result in pairs]


def main() -> int:
    asked = pinned()
    try:
        answers = known(asked)
    except NO_ANSWER as error:
        why = str(error).partition("\n")[0]
        print(f"The audit could not run: {URL} gave no answer ({why}); run it where that is reached.",
              file=sys.stderr)  # fmt: skip
        return 4
    for (name, version), found in zip(asked, answers, strict=True):
        if found:
            print(f"{name} {version}: {', '.join(found)}")
    vulnerable = sum(map(bool, answers))
    print(f"{vulnerable} of {len(asked)} pinned packages have known vulnerabilities.", file=sys.stderr)
    return int(vulnerable > 0)


if __name__ == "__main__":
    sys.exit(main())
