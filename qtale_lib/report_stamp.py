"""What a report was made from, and whether that still lies there; loads nothing that makes reports."""

from __future__ import annotations

from pathlib import Path

from qtale_lib.lab import Lab
from qtale_lib.notebooks import choose, library_files
from qtale_lib.provenance import git_commit
from qtale_lib.store import digest, file_digest, read_json, write_json

TEMPLATES = Path(__file__).with_name("report_templates")
STAMP = "made_from.json"


def folder(lab: Lab) -> Path:
    """Where a profile's report lies; its first page is index.html."""
    return lab.directory / "report"


def made_from(lab: Lab) -> str:
    """Equal while notebooks, library, templates, commit and profile are, and no executed notebook, table or
    figure came, went or was written again.
    """
    code = [*choose(), *library_files(), *(path for path in TEMPLATES.rglob("*") if path.is_file())]
    shown = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for place in (lab.directory / "notebooks", lab.tables, lab.figures)
        if place.is_dir()
        for path in sorted(place.iterdir())
        if not path.name.startswith(".")  # half written
    ]
    return digest(file_digest(*code), git_commit(), lab.profile.digest(), shown)


def stamp(lab: Lab, inputs: str) -> None:
    """Note what the report was made from, `made_from` before it was begun; its last file."""
    files = [str(path.relative_to(folder(lab))) for path in folder(lab).rglob("*") if path.is_file()]
    write_json(folder(lab) / STAMP, {"made_from": inputs, "files": files})


def is_current(lab: Lab) -> bool:
    """Whether the report that is there is whole, and would come out the same."""
    noted = read_json(folder(lab) / STAMP)
    if not isinstance(noted, dict) or noted.get("made_from") != made_from(lab):
        return False
    return all((folder(lab) / name).is_file() for name in noted["files"])
