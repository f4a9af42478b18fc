"""The report of a profile: what it holds, that it escapes everything, and that it says what is missing."""

from __future__ import annotations

import base64
import os

import nbformat
import pandas as pd
import pytest
from small_run import profile
from test_cli import qtale

from qtale_lib import notebooks, report, report_stamp, tables
from qtale_lib.cli import reproduction
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.progress import Stopclock

HOSTILE = "<script>alert(1)</script>"
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    return Lab(profile(), tmp_path / "results")


def executed(lab: Lab, *outputs: nbformat.NotebookNode) -> None:
    """A copy of notebook 01 whose last cell has these outputs."""
    (source,) = notebooks.choose("01")
    book = nbformat.read(source, as_version=4)
    book.cells.append(nbformat.v4.new_markdown_cell(f"## A section {HOSTILE}"))
    book.cells.append(nbformat.v4.new_code_cell(f"# {HOSTILE}", outputs=list(outputs)))
    path = lab.directory / "notebooks" / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def shown(**data: str) -> nbformat.NotebookNode:
    kinds = {name.replace("_", "/"): value for name, value in data.items()}
    return nbformat.v4.new_output("display_data", kinds)


def test_without_an_executed_notebook_there_is_no_report(lab):
    with pytest.raises(UserError, match="No notebook has been executed for profile smoke yet; run `python"):
        report.build(lab)
    assert not (lab.directory / "report").exists()


def test_the_command_says_so_in_one_sentence(tmp_path):
    done = qtale("report", "--profile", "smoke", QTALE_RESULTS_DIR=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("No notebook has been executed for profile smoke yet; run `python")


def test_tables_and_figures_stand_with_their_files_and_missing_notebooks_are_named(lab):
    text = pd.DataFrame({"method": ["QTALE"], "ours": ["81.2"], "the paper's": ["82.0"]})
    table = tables.save(
        tables.Table("table_1_beside", "Beside the paper", text, text, ("method",)), lab.tables
    )
    lab.figures.mkdir(parents=True)
    (lab.figures / "figure_4_gumbel.png").write_bytes(DOT)
    (lab.figures / "figure_4_gumbel.csv").write_text("x\n1\n")
    executed(
        lab, shown(text_markdown=tables.to_markdown(table)), shown(image_png=base64.b64encode(DOT).decode())
    )
    index = report.build(lab)
    page = index.read_text()
    for name in ("table_1_beside.csv", "table_1_beside.tex", "figure_4_gumbel.csv"):
        assert f'href="files/{name}"' in page and (index.parent / "files" / name).is_file()
    assert "<figcaption>Beside the paper " in page and "<td>82.0</td>" in page
    assert 'alt="Fig. 4: histogram of Gumbel(0, 1) draws' in page
    assert 'href="notebooks/01_figure_4_gumbel.html"' in page
    assert "--profile smoke --only 05</code>" in page and "has not been executed for this profile yet" in page
    book = (index.parent / "notebooks" / "01_figure_4_gumbel.html").read_text()
    assert 'href="../files/figure_4_gumbel.csv"' in book and "import" in book


def test_in_place_of_a_panel_it_says_where_that_works(lab):
    executed(lab, shown(**{report.WIDGET.replace("/", "_"): "{}", "text_plain": "VBox(children=())"}))
    page = report.build(lab).read_text()
    assert "in JupyterLab alone" in page and "VBox" not in page


def test_nothing_from_a_notebook_is_run(lab):
    outputs = [
        shown(text_html=HOSTILE, text_plain=HOSTILE),
        shown(text_markdown=f"**{HOSTILE}**\n\n| {HOSTILE} |\n| --- |\n| [a](javascript:alert(2)) |\n"),
        shown(
            text_markdown=f"{HOSTILE}\n\n![{HOSTILE}](https://example.org/a.png) <img src=x onerror=alert(3)>"
        ),
        shown(application_javascript="alert(4)", text_plain="plain"),
        nbformat.v4.new_output("stream", text=HOSTILE),
        nbformat.v4.new_output("error", ename=HOSTILE, evalue=HOSTILE, traceback=[HOSTILE]),
    ]
    executed(lab, *outputs)
    index = report.build(lab)
    for page in (index, *index.parent.glob("notebooks/*.html")):
        text = page.read_text()
        assert "<script" not in text and "<img src=x" not in text and "alert(4)" not in text
        assert 'href="javascript' not in text and "example.org" not in text
        assert text.count("&lt;script&gt;alert(1)") >= 6
        assert "default-src 'none'" in text


def test_a_report_is_current_until_something_that_it_shows_or_is_made_by_changes(lab, monkeypatch):
    assert not report_stamp.is_current(lab)
    lab.figures.mkdir(parents=True)
    (lab.figures / "figure_4_gumbel.csv").write_text("x\n1\n")
    executed(lab)
    index = report.build(lab)
    assert report_stamp.is_current(lab)
    copy = next((lab.directory / "notebooks").glob("*.ipynb"))
    template = lab.directory / "template"
    changes = {
        "executed again": lambda: os.utime(copy),
        "a figure came": lambda: (lab.figures / "figure_4_gumbel.png").write_bytes(DOT),
        "a figure went": lambda: (lab.figures / "figure_4_gumbel.png").unlink(),
        "a table came": lambda: lab.tables.mkdir() or (lab.tables / "table_1.md").write_text("x"),
        "a page went": lambda: (index.parent / "notebooks" / f"{copy.stem}.html").unlink(),
        "another template": lambda: template.mkdir() or (template / "x.css").write_text("a {}"),
        "another commit": lambda: monkeypatch.setattr(report_stamp, "git_commit", lambda: "another"),
        "killed before its end": (index.parent / report_stamp.STAMP).unlink,
    }
    monkeypatch.setattr(report_stamp, "TEMPLATES", template)
    for what, change in changes.items():
        report.build(lab)
        assert report_stamp.is_current(lab), what
        change()
        assert not report_stamp.is_current(lab), what


def test_what_changes_while_a_report_is_written_makes_it_stale(lab, monkeypatch):
    executed(lab)
    original = report._book

    def meanwhile(*arguments):
        executed(lab)
        return original(*arguments)

    monkeypatch.setattr(report, "_book", meanwhile)
    report.build(lab)
    assert not report_stamp.is_current(lab)


def test_a_run_writes_the_report_once(lab, monkeypatch):
    executed(lab)
    first, again = Stopclock(), Stopclock()
    assert reproduction._write_report(lab, first) == []
    page = lab.directory / "report" / "index.html"
    monkeypatch.setattr(report, "build", None)  # not called
    assert reproduction._write_report(lab, again) == []
    assert [note for _, _, note in (*first.stages, *again.stages)] == [str(page), f"up to date: {page}"]
