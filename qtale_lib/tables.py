"""A table once, as Markdown, LaTeX (booktabs) and CSV: formatted text for readers, tidy numbers for programs.

The CSV holds the tidy frame that the text was made from. Notes say what ± and every abbreviation mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qtale_lib.config import EARLIER, LABELS
from qtale_lib.provenance import ROOT
from qtale_lib.store import read_json, replaced

if TYPE_CHECKING:
    from qtale_lib.lab import Lab

NOT_RUN = "not run"
LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "−": "$-$",
    "×": r"$\times$", "θ": r"$\theta$", "λ": r"$\lambda$", "π": r"$\pi$", "Δ": r"$\Delta$", "σ": r"$\sigma$",
    "≤": r"$\leq$", "≥": r"$\geq$", "|": r"$|$", "→": r"$\to$", "…": r"\ldots{}", "·": r"$\cdot$", "–": "--",
    "^": r"\^{}", "<": "$<$", ">": "$>$", "~": r"\textasciitilde{}", "{": r"\{", "}": r"\}", "$": r"\$",
    "²": r"$^2$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """`text`: what readers see, strings only; `frame`: the numbers behind it, tidy, one row per `keys`."""

    name: str
    caption: str
    text: pd.DataFrame
    frame: pd.DataFrame
    keys: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def _repr_markdown_(self) -> str:
        return to_markdown(self)


def number(value: Any, digits: int = 2, sign: bool = False) -> str:
    """A number for readers, with a true minus sign; "not run" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOT_RUN
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def or_dash(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number for readers; a dash for NaN."""
    return "–" if pd.isna(value) else number(value, digits, sign)


def with_interval(value: float, low: float, high: float, sign: bool = False) -> str:
    """ "1.6 [0.5, 2.8]", without the interval where that is not known; a dash for NaN."""
    ends = "" if pd.isna(low) else f" [{number(low, 1)}, {number(high, 1)}]"
    return or_dash(value, 1, sign) + ("" if pd.isna(value) else ends)


def with_errors(value: Any, sampling: Any, spread: Any = None, digits: int = 2, sign: bool = False) -> str:
    """ "78.90 ± 1.10", and "(0.80)" behind it if a spread over seeds is known."""
    if number(value) == NOT_RUN:
        return NOT_RUN
    known = number(sampling, digits) != NOT_RUN
    text = number(value, digits, sign) + (f" ± {number(sampling, digits)}" if known else "")
    return text if number(spread) == NOT_RUN else f"{text} ({number(spread, digits)})"


def beside(frame: pd.DataFrame) -> list[str]:
    """ "83.73 (+1.60)": the paper's number and ours minus it, from the columns `paper` and `difference`."""
    return [f"{number(row.paper)} ({number(row.difference, sign=True)})" for row in frame.itertuples()]


def to_markdown(table: Table) -> str:
    """Caption, a pipe table with its header, and the notes."""
    header = [str(column) for column in table.text.columns]
    rows = [header, ["---"] * len(header), *table.text.astype(str).values.tolist()]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    notes = [f"*{note}*" for note in table.notes]
    body = ["\n".join(lines)] if header else []
    return "\n\n".join([f"**{table.caption}**", *body, *notes]) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table environment, labelled tab:<name>; the notes stand below it in small print."""
    columns, header = "l" * len(table.text.columns), _latex_row(map(str, table.text.columns))
    rows = [_latex_row(row) for row in table.text.astype(str).values.tolist()]
    notes = [rf"\par\footnotesize {_latex(note)}" for note in table.notes]
    return "\n".join([
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering",
        rf"\caption{{{_latex(table.caption)}}}", rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule",
        *rows, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}", "",
    ])  # fmt: skip


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def _latex_row(cells: Any) -> str:
    return " & ".join(_latex(cell) for cell in cells) + r" \\"


def save(table: Table, directory: Path) -> Table:
    """Write <name>.md, .tex and .csv into `directory`; returns the table, for a notebook to show."""
    csv = table.frame.to_csv(index=False, lineterminator="\n")
    for suffix, text in (("md", to_markdown(table)), ("tex", to_latex(table)), ("csv", csv)):
        with replaced(directory / f"{table.name}.{suffix}") as file:
            file.write_text(text, encoding="utf-8")
    return table


def of_numbers(
    name: str,
    caption: str,
    frame: pd.DataFrame,
    keys: tuple[str, ...],
    notes: tuple[str, ...] = (),
    digits: int = 2,
) -> Table:
    """A table whose text is its frame, numbers rounded."""
    shown = frame.select_dtypes("float").columns
    text = frame.assign(**{column: frame[column].map(lambda v: number(v, digits)) for column in shown})
    return Table(name, caption, text.astype(str), frame, keys, notes)


def beside_reference(table: Table, lab: Lab, root: Path = ROOT) -> Table:
    """Every number of a table beside the committed reference run's: here | reference | difference.

    Without a reference of the lab's profile there is only a note that says so; where the reference was made
    with other settings or another base, the note says with which. If a run of the profile's family with
    several seeds is committed (<profile>-full), its mean and spread over seeds stand beside as well, and z.
    """
    profile = lab.profile.name
    folder = root / "results" / "reference" / profile
    path = folder / "tables" / f"{table.name}.csv"
    keys = list(table.keys)
    if path.is_file():
        frame = _compared(table.frame, pd.read_csv(path), keys)
        notes = (_reference_note(lab, read_json(folder / "provenance.json")),)
    else:
        frame, notes = pd.DataFrame(), (f"No reference run of profile {profile} is committed.",)
    if family := _family(table, lab, root):
        frame, note = _among_seeds(table.frame, frame, family, keys)
        notes += (note,)
    shown = {name: frame[name].map(_four_digits) for name in frame if name in COMPARED or "-full" in name}
    caption = f"{table.caption}: here beside the committed reference run"
    return replace(table, caption=caption if len(frame) else table.caption, text=frame.assign(**shown),
                   frame=frame, notes=notes)  # fmt: skip


COMPARED = ("here", "reference", "difference", "z")
FULLER = ("methods", "seeds", "theta_sweep", "limit.test")  # in what a -full profile may differ from its own


def _four_digits(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:.4g}"


@dataclass(frozen=True)
class _Family:
    """The committed run of several seeds: its name, their number, how many there are here and how many of
    these are among them, the numbers of a table; settings that differ though they should not.
    """

    name: str
    seeds: int
    here: int
    shared: int
    frame: pd.DataFrame
    other: list[str]


def _family(table: Table, lab: Lab, root: Path) -> _Family | None:
    """The run whose profile is <profile>-full and extends the lab's; None without one of at least 2 seeds."""
    name = f"{lab.profile.name}-full"
    folder = root / "results" / "reference" / name
    path, provenance = folder / "tables" / f"{table.name}.csv", read_json(folder / "provenance.json")
    if not path.is_file() or not isinstance(provenance, dict):
        return None
    profile = provenance["profile"]
    if profile["extends"] != lab.profile.name or len(profile["seeds"]) < 2:
        return None
    other = [key for key in _other_settings(lab, provenance) if key not in FULLER]
    here, there = set(lab.profile.seeds), set(profile["seeds"])
    return _Family(name, len(there), len(here), len(here & there), pd.read_csv(path), other)


def _among_seeds(
    here: pd.DataFrame, frame: pd.DataFrame, family: _Family, keys: list[str]
) -> tuple[pd.DataFrame, str]:
    """The comparison with the family's mean, spread over seeds and z beside, and the note on them."""
    index = [*keys, "column"]
    columns = [name for name in _numbers(here, family.frame, keys) if spread_of(name) in family.frame]
    means, spreads = (_long(family.frame, keys, names, f"{family.name}{what}") for names, what in (
        (columns, ""), ({spread_of(name): name for name in columns}, " spread")))  # fmt: skip
    base = frame if len(frame) else _long(here, keys, columns, "here").dropna(subset="here")
    base = base.merge(means, "left", on=index).merge(spreads, "left", on=index)
    # of the difference of two means over seeds, some of which are in both
    share = 1 / family.here + 1 / family.seeds - 2 * family.shared / (family.here * family.seeds)
    variance = base[f"{family.name} spread"] ** 2 * share
    errors = {error_of(name): name for name in columns if error_of(name) in here}
    if errors:
        base = base.merge(_long(here, keys, errors, "error"), "left", on=index)
        variance += base.pop("error").fillna(0.0) ** 2
    z = (base.here - base[family.name]) / np.sqrt(variance.where(variance > 0))
    note = (
        f"{family.name}: mean over its {family.seeds} seeds, and their standard deviation (spread). z: here "
        f"− mean, over √({share:.3g} spread² + sampling error²), the sampling error being that of the score "
        f"or effect here; {share:.3g} is 1/{family.here} + 1/{family.seeds}, less what the seeds "
        f"in both ({family.shared}) have in common. Between −2 and 2 is what seeds drawn alike would give."
    )
    if family.other:
        return base.assign(z=np.nan), f"{note} It differs in {', '.join(family.other)}: z does not apply."
    return base.assign(z=z), note


def spread_of(column: str) -> str:
    """The column that holds a column's standard deviation over seeds."""
    return "spread" if column == "value" else f"{column}_spread"


def error_of(column: str) -> str:
    """The column that holds a column's standard error over questions."""
    return "sampling" if column == "value" else f"{column}_sampling"


def _reference_note(lab: Lab, provenance: Any) -> str:
    if not isinstance(provenance, dict) or not {"profile", "base"} <= set(provenance):
        return "The reference is a committed run of a profile of this name, with settings that are not known."
    if other := _other_settings(lab, provenance):
        return (
            "The reference is a committed run of a profile of this name, but differs from this one in "
            f"{', '.join(other)}: so may its numbers; its provenance lies beside it."
        )
    return "The reference is a committed run of the same profile; its provenance lies beside it."


def _other_settings(lab: Lab, provenance: dict[str, Any]) -> list[str]:
    """Dotted keys of the profile with other values in the reference; "base" for other weights alone."""
    here, there = _dotted(lab.profile.model_dump(mode="json")), _dotted(provenance["profile"])
    there = {**_dotted(EARLIER), **there}
    other = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    same_base = lab.base()["sha256"] == provenance["base"]["sha256"]
    names = [key for key in other if key.split(".")[0] not in (*LABELS, "base", "revision")]
    return names if same_base else ["base", *names]


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _compared(here: pd.DataFrame, reference: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The numbers of both frames in long form, matched on their keys."""
    numbers = _numbers(here, reference, keys)
    long = [_long(frame, keys, numbers, name) for frame, name in ((here, "here"), (reference, "reference"))]
    both = long[0].merge(long[1], on=[*keys, "column"]).dropna(subset=["here", "reference"])
    return both.assign(difference=both.here - both.reference)


def _numbers(here: pd.DataFrame, other: pd.DataFrame, keys: list[str]) -> list[str]:
    return [name for name in here.select_dtypes("number") if name in other and name not in keys]


def _long(frame: pd.DataFrame, keys: list[str], columns: Iterable[str], name: str) -> pd.DataFrame:
    """One row per key and column, named in `column` (by another name if `columns` maps to one)."""
    long = frame.astype(dict.fromkeys(keys, str)).melt(keys, list(columns), "column", name)
    return long.replace({"column": columns}) if isinstance(columns, dict) else long
