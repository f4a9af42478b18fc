"""The report of a profile: results/<profile>/report/index.html, static, for people who will run nothing.

    python -m qtale_lib report --profile tiny

What the executed notebooks show, without their code, under a scoreboard; every notebook also as a page with
its code; tables and figures to download beside them. It is built by nbconvert with a template of ours
(`report_templates/notebook`) and jinja2: both come with JupyterLab, need neither Node nor the network, and
leave pages without scripts, which open from a disk. MyST and Jupyter Book would bring a JavaScript
application and a theme, and know nothing of a run store.

Nothing is trusted: Markdown is rendered with its HTML escaped, outputs as `text/html` and scripts are left
out, and a content security policy forbids the pages to load or run anything.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from qtale_lib import exporting, origins, report_stamp
from qtale_lib.claim_tables import scoreboard
from qtale_lib.claims import tally
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, needs
from qtale_lib.lab import Lab
from qtale_lib.notebooks import choose
from qtale_lib.provenance import git_commit

TEMPLATES = report_stamp.TEMPLATES
FILE_TYPES = ("pdf", "svg", "csv", "tex", "md")
SHOWN_TYPES = ["text/markdown", "image/png", "text/plain"]
FOLD_FROM = 40  # rows of a table
WIDGET = "application/vnd.jupyter.widget-view+json"
NEEDS_JUPYTER = "A panel to work with, in JupyterLab alone: open the notebook there and run all cells."


@dataclass
class Book:
    """A notebook in the report; `section`, `page` and `setting` are HTML, empty without an executed copy."""

    stem: str
    title: str
    section: str = ""
    page: str = ""
    setting: str = ""
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> str:
        return self.stem[:2]

    @property
    def short(self) -> str:
        """The title up to its colon."""
        return self.title.partition(":")[0]


def build(lab: Lab) -> Path:
    """Write the report anew; returns its index.html. UserError if no notebook has been executed."""
    sources = choose()
    if not any(_copy(lab, path).is_file() for path in sources):
        raise UserError(
            f"No notebook has been executed for profile {lab.profile.name} yet; "
            f"run `python -m qtale_lib run --profile {lab.profile.name}` first."
        )
    inputs, folder = report_stamp.made_from(lab), report_stamp.folder(lab)
    told = cache(lambda job: list(map(origins.told, lab.stored([job], origins.KINDS))))
    books = sorted((_book(lab, path, told) for path in sources), key=lambda book: book.number)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    (folder / "files").mkdir()
    for path in _artefacts(lab):
        if path.suffix[1:] in FILE_TYPES:
            shutil.copyfile(path, folder / "files" / path.name)
    pages = _pages()
    for book in books:
        if book.page:
            page = pages.get_template("notebook.html.j2").render(book=book, profile=lab.profile.name)
            (folder / "notebooks" / f"{book.stem}.html").write_text(page, encoding="utf-8")
    index = pages.get_template("index.html.j2").render(
        profile=lab.profile.name, facts=_facts(lab), board=_board(lab), books=books
    )
    (folder / "index.html").write_text(index, encoding="utf-8")
    report_stamp.stamp(lab, inputs)
    return folder / "index.html"


def _pages() -> Environment:
    pages = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    pages.globals["css"] = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    pages.filters["slug"] = lambda text: re.sub(r"[^a-z]+", "-", text.lower()).strip("-")
    pages.filters["tally"] = lambda claims: Counter(claim["verdict"] for claim in claims).most_common()
    return pages


def _copy(lab: Lab, source: Path) -> Path:
    return lab.directory / "notebooks" / source.name


def _artefacts(lab: Lab) -> list[Path]:
    folders = [folder for folder in (lab.figures, lab.tables) if folder.is_dir()]
    return sorted(path for folder in folders for path in folder.iterdir() if path.is_file())


def _facts(lab: Lab) -> dict[str, str]:
    profile, base = lab.profile, lab.base()
    return {
        "Base model": f"{base['name']}, {base['parameters']['total'] / 1e6:,.1f} M parameters",
        "Methods": ", ".join(profile.methods),
        "Bits": ", ".join(map(str, profile.bits)),
        "Seeds": ", ".join(map(str, profile.seeds)),
        "Tasks": ", ".join(profile.tasks),
        "Commit": (git_commit() or "no checkout")[:12],
    }


def _board(lab: Lab) -> dict[str, Any] | None:
    """The claims by family, the tally of verdicts; None if notebook 00 has not written them."""
    path = lab.tables / "scoreboard.csv"
    if not path.is_file():
        return None
    frame = pd.read_csv(path, dtype={"notebook": str})
    text = scoreboard(frame).text.replace("", pd.NA).ffill()  # an empty cell says what the one above does
    claims = frame.assign(
        tasks=text.tasks, power=text.power, effect=text["effect [95 %]"], measured=text.measured
    )
    claims = claims[
        ["family", "quote", "source", "measured", "tasks", "effect", "power", "verdict", "notebook"]
    ]
    families = {family: part.to_dict("records") for family, part in claims.groupby("family", sort=False)}
    return {"tally": tally(frame), "families": families}


# A notebook.


def _book(lab: Lab, source: Path, told: Callable[[Job], list[dict[str, Any]]]) -> Book:
    first = nbformat.read(source, as_version=4).cells[0].source
    book = Book(source.stem, first.splitlines()[0].removeprefix("# "))
    if not _copy(lab, source).is_file():
        return book
    executed = nbformat.read(_copy(lab, source), as_version=4)
    page, section = _shown(executed, lab, "../"), _shown(executed, lab, "")
    settings = _take_settings(section)
    section.cells[0].source = section.cells[0].source.partition("\n")[2]
    book.page = _html(page, with_code=True)
    book.section = _html(section, with_code=False)
    book.setting = _html(settings, with_code=False)
    results = [result for job in needs(lab.profile, source.name) for result in told(job)]
    book.provenance = origins.of_notebook(lab, source, results)
    return book


def _shown(executed: NotebookNode, lab: Lab, root: str) -> NotebookNode:
    """The notebook with what is to be shown of each output, in its metadata.

    root: the way from the page to the report's folder.
    """
    book, heading = nbformat.from_dict(executed), ""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.M) or [heading])[-1]
        for output in cell.get("outputs", []):
            if WIDGET in output.get("data", {}):
                output.data = {"text/markdown": NEEDS_JUPYTER}
            data = output.get("data", {})
            if "image/png" in data:
                output.metadata["shown"] = _drawn(output, heading, lab, root)
            elif "text/markdown" in data:
                output.metadata["shown"] = _tabled(data["text/markdown"], lab, root)
    return book


def _drawn(output: NotebookNode, heading: str, lab: Lab, root: str) -> dict[str, Any]:
    """A picture: the SVG of the figure whose PNG it is, with its files; else the picture itself."""
    data, width = output.data["image/png"], output.metadata.get("image/png", {}).get("width")
    picture = base64.b64decode(data)
    for path in lab.figures.glob("*.png") if lab.figures.is_dir() else ():
        if path.stat().st_size == len(picture) and path.read_bytes() == picture:
            drawing = path.with_suffix(".svg")
            if drawing.is_file():
                data = base64.b64encode(drawing.read_bytes()).decode()
            mime = "image/svg+xml" if drawing.is_file() else "image/png"
            alt, files = _described(path.stem, heading), _files(lab.figures, path.stem)
            return {
                "mime": mime,
                "data": data,
                "alt": alt,
                "width": width,
                "stem": path.stem,
                "files": files,
                "root": root,
            }
    return {"mime": "image/png", "data": data.replace("\n", ""), "alt": heading, "width": width, "files": []}


def _described(stem: str, heading: str) -> str:
    """What a figure shows, in a sentence: its drawing function's, or the heading above it."""
    draw = exporting.DRAWN.get(stem)
    said = draw.__doc__.split("\n\n")[0].split("\n    `frame`")[0] if draw and draw.__doc__ else heading
    return " ".join(said.split())


def _tabled(text: str, lab: Lab, root: str) -> dict[str, Any]:
    """A table as tables.to_markdown wrote it: caption, body, rows, and its files if it was saved."""
    found = re.match(r"\*\*(.+)\*\*\n\n(.*)", text, re.S)
    if not found:
        return {"caption": ""}
    caption, body = found[1].replace("\\|", "|"), found[2]
    shown = {
        "caption": caption,
        "body": body,
        "rows": max(len(re.findall(r"^\|", body, re.M)) - 2, 0),
        "files": [],
    }
    for path in lab.tables.glob("*.md") if lab.tables.is_dir() else ():
        if path.read_text(encoding="utf-8") == text:
            return {**shown, "stem": path.stem, "files": _files(lab.tables, path.stem), "root": root}
    return shown


def _files(folder: Path, stem: str) -> list[str]:
    names = (f"{stem}.{kind}" for kind in FILE_TYPES)
    return [name for name in names if (folder / name).is_file()]


def _take_settings(book: NotebookNode) -> NotebookNode:
    """Take out the table of settings, which is returned, and the scoreboard, which stands on top."""
    taken = nbformat.v4.new_notebook()
    for cell in book.cells:
        outputs = cell.get("outputs", [])
        setting = [o for o in outputs if o.get("metadata", {}).get("shown", {}).get("caption") == "Setting"]
        if setting:
            taken.cells.append(nbformat.v4.new_code_cell(outputs=setting))
        if outputs:
            cell.outputs = [
                o
                for o in outputs
                if o not in setting and o.get("metadata", {}).get("shown", {}).get("stem") != "scoreboard"
            ]
    return taken


def _html(book: NotebookNode, with_code: bool) -> Markup:
    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="notebook",
        exclude_input=not with_code,
        filters={
            "escaped_markdown": lambda text, label="Table": _markdown(text, label, 0 if with_code else 1)
        },
    )
    exporter.display_data_priority = SHOWN_TYPES  # nbconvert's HTML exporters prefer text/html otherwise
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data = {kind: value for kind, value in output.data.items() if kind in SHOWN_TYPES}
    body, _ = exporter.from_notebook_node(book, resources={"fold_from": FOLD_FROM})
    return Markup(body)


class _Renderer(IPythonRenderer):
    """Markdown without HTML of its own; headings are lowered, tables lie in a box that scrolls."""

    def __init__(self, label: str, lowered: int) -> None:
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)
        self.label, self.lowered = label, lowered

    def heading(self, text: str, level: int, **_: Any) -> str:
        level += self.lowered
        return f"<h{level}>{text}</h{level}>\n"

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return str(escape(text))

    def table(self, text: str) -> str:
        box = f'<div class="scroll" role="group" tabindex="0" aria-label="{escape(self.label)}">'
        return f"{box}<table>{text}</table></div>\n"

    def table_cell(self, text: str, align: str | None = None, head: bool = False) -> str:
        return f'<th scope="col">{text or "&nbsp;"}</th>' if head else f"<td>{text}</td>"


def _markdown(text: str, label: str, lowered: int) -> str:
    return MarkdownWithMath(renderer=_Renderer(label, lowered)).render(text)
