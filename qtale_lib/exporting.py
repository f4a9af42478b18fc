"""Figures and tables for a paper: drawn again from their CSV in its width, font and colours, or copied out.

    python -m qtale_lib export --figure 3 --format pgf --width 3.25in --font "Times New Roman"
    python -m qtale_lib export --table 1 --format latex

A figure needs nothing but the CSV beside it: that of the profile on this machine or, without one, the
committed reference's.
"""

from __future__ import annotations

import difflib
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names

from qtale_lib import benchmark_figures, explore_figures, figures, sensitivity, study_figures
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT

# by the name of the file; a number, such as 3, means all whose name has it
DRAWN: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "figure_1_overview": figures.overview,
    "figure_2_layer_execution_dllm": figures.heatmaps,
    "figure_2_layer_execution_qtale": figures.heatmaps,
    "figure_3_ratio_and_flips": figures.ratios_and_flips,
    "figure_4_gumbel": figures.noise,
    "figure_5_router_logits_dllm": figures.logit_histograms,
    "figure_6_router_logits_qtale": figures.logit_histograms,
    "figure_7_flips": figures.flips_compared,
    "table_4_theta_curves": figures.theta_curves,
    "bench_latency": benchmark_figures.latency,
    "bench_memory": benchmark_figures.memory,
    "figure_12_win_rates": figures.win_rates,
    "figure_12_skipping": figures.token_skipping,
    "figure_13_explored": explore_figures.explored,
    "execution_ratio_curves": study_figures.pareto,
    "quantizers": study_figures.compression,
    "sensitivity_theta_aims_drawn": study_figures.aims,
    **{sensitivity.file_name(factor): study_figures.factor for factor in sensitivity.LABELS},
}
FIGURE_FORMATS = ("pdf", "png", "svg", "pgf")
TABLE_FORMATS = {"latex": ".tex", "markdown": ".md", "csv": ".csv"}
INCHES = {"in": 1.0, "cm": 1 / 2.54, "mm": 1 / 25.4, "pt": 1 / 72.27, "": 1.0}  # TeX's points
LATEX = "xelatex"  # measures the text of a PGF


@dataclass(frozen=True)
class Look:
    """How figures are drawn; None is the suite's own way.

    width: inches, the height stays; font: a family's name; size: of the smallest text, in points.
    palette: a name in figures.PALETTES, or five colours with commas between them.
    """

    width: float | None = None
    font: str | None = None
    size: float | None = None
    palette: str | None = None

    def settings(self) -> dict[str, Any]:
        """As matplotlib's settings.

        Raises:
            UserError: for a font that is not installed, a size out of bounds, or colours that are none.
        """
        found: dict[str, Any] = {}
        if self.font is not None:
            if self.font not in get_font_names():
                raise UserError(f'Font "{self.font}" is not installed here; install it or name another.')
            found["font.family"] = self.font
        if self.size is not None:
            if not 4 <= self.size <= 40:
                raise UserError(f"--size (= {self.size:g}) must be 4 to 40 points.")
            by = self.size / figures.STYLE["font.size"]
            sizes = (name for name in figures.STYLE if re.search(r"font\.?size$|\.(label|title)size$", name))
            found |= {name: by * figures.STYLE[name] for name in sizes}
        if self.palette is not None:
            found["axes.prop_cycle"] = cycler(color=_colours(self.palette))
        return found


def _colours(palette: str) -> tuple[str, ...]:
    colours = figures.PALETTES.get(palette) or tuple(part.strip() for part in palette.split(","))
    wanted = len(figures.PALETTES["okabe-ito"])
    if len(colours) != wanted or not all(map(is_color_like, colours)):
        names = ", ".join(figures.PALETTES)
        raise UserError(
            f'--palette (= "{palette}") must be {names}, or {wanted} colours with commas between them.'
        )
    return colours


def inches(width: str) -> float:
    """A width such as 3.25in, 8.25cm, 82.5mm or 235pt.

    Raises:
        UserError: for another text, and for less than 1 or more than 20 inches.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(in|cm|mm|pt|)", width.strip())
    value = float(found[1]) * INCHES[found[2]] if found else 0.0
    if not 1 <= value <= 20:
        raise UserError(f'--width (= "{width}") must be 1 to 20 inches, such as 3.25in, 8.25cm or 235pt.')
    return value


def export_figures(lab: Lab, name: str, form: str, look: Look, folder: Path) -> list[Path]:
    """Draw the figures of that number or name again; returns the files written to `folder`.

    Raises:
        UserError: for an unknown figure or format, one whose data are not there, or PGF without LaTeX.
    """
    if form not in FIGURE_FORMATS:
        raise UserError(f'--format (= "{form}") of a figure must be {", ".join(FIGURE_FORMATS)}.')
    if form == "pgf" and shutil.which(LATEX) is None:
        raise UserError(f"PGF needs {LATEX}, which measures its text; install TeX, or choose pdf or svg.")
    frames = {
        stem: pd.read_csv(_source(lab, "figures", f"{stem}.csv")) for stem in _named(name, DRAWN, "figure")
    }
    settings = look.settings()
    folder.mkdir(parents=True, exist_ok=True)
    with figures.styled(look.width, settings):
        return [_drawn(stem, frame, form, look, folder) for stem, frame in frames.items()]


def _drawn(stem: str, frame: pd.DataFrame, form: str, look: Look, folder: Path) -> Path:
    figure, path = DRAWN[stem](frame), folder / f"{stem}.{form}"
    with matplotlib.rc_context(figures.STYLE):
        if not _has_room(figure):
            raise UserError(
                f"{stem} has no room at {figure.get_figwidth():.2f} in wide with a text of "
                f"{figures.STYLE['font.size']:g} points; give it a greater --width or a smaller --size."
            )
        figure.savefig(path, metadata=figures.UNDATED.get(form))
    return path


def _has_room(figure: Figure) -> bool:
    """Lay the figure out; whether its panels have a size and its legends are whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="constrained_layout not applied")
        try:
            figures.lay_out(figure)
        except UserWarning:
            return False
    frame = figure.bbox.padded(1)
    ends = [corner for legend in figure.legends for corner in legend.get_window_extent().get_points()]
    return all(frame.contains(*corner) for corner in ends)


def export_tables(lab: Lab, name: str, form: str, folder: Path) -> list[Path]:
    """Copy the tables of that number or name; returns the files written to `folder`.

    Raises:
        UserError: for an unknown table or format, or one that was not made yet.
    """
    if form not in TABLE_FORMATS:
        raise UserError(f'--format (= "{form}") of a table must be {", ".join(TABLE_FORMATS)}.')
    suffix = TABLE_FORMATS[form]
    there = sorted({path.stem for place in places(lab, "tables") for path in place.glob(f"*{suffix}")})
    sources = [_source(lab, "tables", f"{stem}{suffix}") for stem in _named(name, there, "table")]
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(source, folder / source.name)) for source in sources]


def _named(name: str, known: Any, kind: str) -> list[str]:
    """What a number, or a whole name, stands for: 1 for table_1_beside and tables_1_2_claims."""
    found = [stem for stem in known if stem == name]
    if name.isdigit():
        found = numbered(name, known, kind)
    if not found:
        like = difflib.get_close_matches(name, known, n=3, cutoff=0) or list(known)
        raise UserError(f'There is no {kind} "{name}"; choose a number, or a name such as {", ".join(like)}.')
    return found


def numbered(number: str, known: Iterable[str], kind: str) -> list[str]:
    """The names that begin with a kind, "figure" or "table", and have that number."""
    return [stem for stem in known if re.match(rf"{kind}s?(_\d+)*_{number}_", stem)]


def places(lab: Lab, kind: str) -> tuple[Path, Path]:
    """Where "figures" or "tables" lie: the profile's on this machine, and the committed reference's."""
    name = lab.profile.name
    if kind == "figures":
        return lab.figures, ROOT / "figures" / "reference" / name
    return lab.tables, ROOT / "results" / "reference" / name / "tables"


def _source(lab: Lab, kind: str, file: str) -> Path:
    """Where a file lies: with the profile's results or, without it, with the committed reference's."""
    for place in places(lab, kind):
        if (place / file).is_file():
            return place / file
    raise UserError(
        f"{file} was not made yet for profile {lab.profile.name}; run `python -m qtale_lib run "
        f"--profile {lab.profile.name}` first."
    )
