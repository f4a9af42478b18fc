"""Figures drawn again in a paper's width, font and colours; tables copied out."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_study
import pandas as pd
import pytest
import test_quantizers
from fake_bench import made_up
from fake_lab import FakeLab
from matplotlib.image import imread
from typer.testing import CliRunner

from qtale_lib import (
    benchmark_report,
    execution_ratio,
    explore_figures,
    exporting,
    figures,
    noise,
    overview,
    quantizers,
    sensitivity,
    theta_aims,
)
from qtale_lib.cli import app, artefacts
from qtale_lib.errors import UserError
from qtale_lib.exporting import DRAWN, Look, export_figures, export_tables, inches
from qtale_lib.measurements import Measurements
from qtale_lib.studies import NAMES, SHIPPED

STORE = Measurements(FakeLab(tasks=["arc_easy", "siqa"], seeds=[0, 1]))
# with no more than a task and two seeds, of the tasks of both
SMALL = {"tasks": ["arc_easy"], "seeds": 2}
STUDIES = {
    number: fake_study.study(SHIPPED / f"{name}.yaml", questions=30, **SMALL)
    for number, name in NAMES.items()
}


def effects_of(factor: str) -> pd.DataFrame:
    """A factor's rows."""
    found = sensitivity.effects(STUDIES["10"])
    return found[found.factor == factor]


def win_rates() -> pd.DataFrame:
    """Two matches, one without an interval."""
    rows = [("A against B", 60.0, 50.0, 70.0, 6, 0, 4), ("A against C", 50.0, None, None, 1, 2, 1)]
    return pd.DataFrame(rows, columns=["match", "win_rate", "low", "high", "wins", "ties", "losses"])


def skipping() -> pd.DataFrame:
    """Two methods, places and kinds, three layers."""
    names = [("place", "0"), ("place", "1"), ("kind", "name"), ("kind", "word")]
    rows = [
        (method, by, name, 5, layer, (1 + layer) / 4)
        for method in ("dllm", "qtale")
        for by, name in names
        for layer in range(3)
    ]
    return pd.DataFrame(rows, columns=["method", "by", "name", "tokens", "layer", "ratio"])


def explored() -> pd.DataFrame:
    """Two tokens by three layers in two models, one of which reads "NA"; two tokens to come."""
    rows = [
        ("route", side, f"{side}\nR 50 %", place, f"{place} {token}", layer, (place + layer) % 2)
        for side in explore_figures.SIDES
        for place, token in enumerate(("NA", "$x$"))
        for layer in range(3)
    ]
    rows += [
        ("next", side, side, place, f"“{token}”", None, (1 + place) / 4)
        for side in explore_figures.LOOKS
        for place, token in enumerate(("NA", "x"))
    ]
    return pd.DataFrame(rows, columns=explore_figures.COLUMNS)


FRAMES = {
    "figure_1_overview": lambda: overview.frame(STORE),
    "figure_2_layer_execution_dllm": lambda: STORE.ratios_by_layer("dllm"),
    "figure_2_layer_execution_qtale": lambda: STORE.ratios_by_layer("qtale"),
    "figure_3_ratio_and_flips": lambda: STORE.lowest_by_epoch("dllm"),
    "figure_4_gumbel": noise.frame,
    "figure_5_router_logits_dllm": lambda: STORE.histograms("dllm"),
    "figure_6_router_logits_qtale": lambda: STORE.histograms("qtale"),
    "figure_7_flips": lambda: STORE.lowest_by_epoch("dllm", "qtale"),
    "table_4_theta_curves": lambda: STORE.theta_curves(),
    "bench_latency": lambda: benchmark_report.latency_frame(made_up()),
    "bench_memory": lambda: benchmark_report.memory_frame(made_up()),
    "figure_12_win_rates": win_rates,
    "figure_12_skipping": skipping,
    "figure_13_explored": explored,
    "execution_ratio_curves": lambda: execution_ratio.frame(STUDIES["08"]),
    "quantizers": lambda: quantizers.frame(test_quantizers.study(test_quantizers.flat, 30, **SMALL)),
    "sensitivity_theta_aims_drawn": lambda: theta_aims.frame(STUDIES["10"]),
    **{sensitivity.file_name(factor): partial(effects_of, factor) for factor in sensitivity.LABELS},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> SimpleNamespace:
    """A profile whose figures and tables were made."""
    folder = tmp_path_factory.mktemp("made")
    places = {"figures": folder / "figures", "tables": folder / "tables"}
    for stem, frame in FRAMES.items():
        figures.save(DRAWN[stem](frame()), frame(), stem, places["figures"])
    places["tables"].mkdir()
    for stem in ("table_1_2_accuracy", "tables_1_2_claims", "table_3_files", "scoreboard"):
        for suffix in (".md", ".tex", ".csv"):
            (places["tables"] / (stem + suffix)).write_text(stem + suffix)
    return SimpleNamespace(profile=SimpleNamespace(name="of a test"), **places)


def test_every_figure_can_be_exported():
    assert set(FRAMES) == set(DRAWN)
    notebooks = Path(exporting.__file__).parents[1] / "notebooks"
    saved = {
        name
        for path in notebooks.glob("*.ipynb")
        for name in re.findall(r'figures\.save\(.*?, \\"(\w+)\\", lab.figures\)', path.read_text())
    }
    assert saved | {sensitivity.file_name(factor) for factor in sensitivity.LABELS} == set(DRAWN)


@pytest.mark.parametrize("stem", DRAWN)
def test_drawn_again_from_its_csv_it_is_the_same_to_the_byte(lab, stem, tmp_path):
    for form in ("svg", "png"):
        (path,) = export_figures(lab, stem, form, Look(), tmp_path)
        assert path.read_bytes() == (lab.figures / path.name).read_bytes()


def test_a_number_stands_for_all_of_its_files(lab, tmp_path):
    names = [path.name for path in export_figures(lab, "2", "svg", Look(), tmp_path)]
    assert names == ["figure_2_layer_execution_dllm.svg", "figure_2_layer_execution_qtale.svg"]
    tables = [path.name for path in export_tables(lab, "2", "latex", tmp_path)]
    assert tables == ["table_1_2_accuracy.tex", "tables_1_2_claims.tex"]
    assert [path.name for path in export_tables(lab, "scoreboard", "csv", tmp_path)] == ["scoreboard.csv"]


@pytest.mark.parametrize(("width", "found"), [("3.25in", 3.25), ("8.255 cm", 3.25), ("82.55mm", 3.25),
                                              ("234.88pt", 3.25), ("5", 5.0)])  # fmt: skip
def test_widths_are_in_the_units_of_papers(width, found):
    assert inches(width) == pytest.approx(found, abs=1e-3)


def test_width_text_and_colours_change_as_asked_and_nothing_afterwards(lab, tmp_path):
    before = dict(figures.STYLE)
    look = Look(4.0, "DejaVu Serif", 9.0, "#111111,#222222,#333333,#444444,#555555")
    (path,) = export_figures(lab, "7", "png", look, tmp_path)
    assert imread(path).shape[1] == round(4.0 * before["savefig.dpi"])
    (path,) = export_figures(lab, "7", "svg", look, tmp_path)
    drawn, own = path.read_text(), (lab.figures / "figure_7_flips.svg").read_text()
    assert "#444444" in drawn and "#555555" in drawn and "DejaVuSerif" in drawn
    assert "#444444" not in own and "DejaVuSerif" not in own
    assert before == figures.STYLE
    (path,) = export_figures(lab, "7", "svg", Look(), tmp_path)
    assert path.read_text() == own


def test_grey_is_grey(lab, tmp_path):
    (path,) = export_figures(lab, "7", "png", Look(palette="grey"), tmp_path)
    image = imread(path)[..., :3]
    assert (image.max(-1) - image.min(-1)).max() < 0.01


BAD = {
    "--figure 9": 'There is no figure "9"',
    "--table 9": 'There is no table "9"',
    "--figure 7 --format gif": '--format (= "gif") of a figure must be pdf',
    "--table 1 --format pdf": '--format (= "pdf") of a table must be latex',
    "--figure 7 --width 3m": '--width (= "3m") must be 1 to 20 inches',
    "--figure 7 --width 99in": "must be 1 to 20 inches",
    "--figure 7 --size 2": "--size (= 2) must be 4 to 40",
    "--figure 7 --font Nonesuch": 'Font "Nonesuch" is not installed',
    "--figure 7 --palette red": '--palette (= "red") must be okabe-ito',
    "--figure 1 --width 2in": "has no room at 2.00 in wide",
    "--figure 7 --size 20": "smaller --size",
    "": "Name one to export",
    "--figure 1 --table 1": "Name one to export",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_exported_is_one_sentence_and_no_file(lab, words, monkeypatch, tmp_path):
    monkeypatch.setattr(artefacts.studies, "labs", lambda profile: [lab])
    result = CliRunner().invoke(app, ["export", *words.split(), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError) and BAD[words] in str(result.exception)
    assert not list(tmp_path.rglob("*.*"))


def test_the_command_writes_where_it_says(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(artefacts.studies, "labs", lambda profile: [lab])
    words = ["export", "--figure", "4", "--format", "svg", "--width", "8cm", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and Path(result.stdout.strip()).is_file()


def test_what_was_not_made_is_taken_from_the_committed_run_or_said_to_be_missing(tmp_path):
    lab = SimpleNamespace(profile=SimpleNamespace(name="tiny"), figures=tmp_path, tables=tmp_path)
    assert export_figures(lab, "3", "svg", Look(), tmp_path / "out")
    assert export_tables(lab, "1", "markdown", tmp_path / "out")
    lab.profile.name = "nowhere"
    with pytest.raises(UserError, match="was not made yet for profile nowhere"):
        export_figures(lab, "3", "svg", Look(), tmp_path / "out")


def test_pgf_without_tex_is_refused(lab, monkeypatch, tmp_path):
    monkeypatch.setattr(exporting.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="PGF needs xelatex"):
        export_figures(lab, "7", "pgf", Look(), tmp_path)


@pytest.mark.skipif(
    shutil.which(exporting.LATEX) is None, reason="xelatex, which PGF needs, is not installed"
)
def test_pgf_is_written_with_tex(lab, tmp_path):
    (path,) = export_figures(lab, "7", "pgf", Look(3.25), tmp_path)
    assert r"\begin{pgfpicture}" in path.read_text()
