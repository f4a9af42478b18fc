"""Where a result, a table or a figure comes from: `python -m qtale_lib show RESULT`.

A result is looked for in the profile's store, a table or figure among what its notebooks wrote; what is not
on this machine, in the committed reference.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nbformat

from qtale_lib import benchmark_report, exporting, publishing, studies
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.jobs import Job, all_jobs, needs
from qtale_lib.lab import STAGE_VERSIONS, Lab, address_of
from qtale_lib.notebooks import choose
from qtale_lib.progress import span
from qtale_lib.provenance import ROOT
from qtale_lib.store import file_digest, is_sound, read_json

KINDS = ("finetune", "quantization", "threshold", "evaluation")
TOLD = ("git_commit", "device", "seconds", "peak_memory_bytes", "finished_at", "versions")
SUFFIXES = (".pdf", ".png", ".svg", ".pgf", ".csv", ".md", ".tex")  # of tables and figures
NUMBERED = re.compile(r"(figure|table)s?((?:_\d+)+)_")
SHORTEST = 4  # digits of a key that stand for it
FEW = 5  # names in an error


@dataclass(frozen=True)
class Origin:
    """What is known of one thing; `made_from`: the results behind a table or figure, as kind/name-key."""

    title: str
    facts: dict[str, str]
    made_from: tuple[str, ...] = ()


def find(labs: Sequence[Lab], asked: str) -> list[Origin]:
    """What a name stands for, in a profile or, with a lab for each of its settings, a study.

    asked: "table 1", "figure_7_flips.csv", "scoreboard"; a result's name, its key, or the beginning of one.
    Raises:
        UserError: if it stands for nothing, or is the beginning of several results.
    """
    lab, stems = labs[0], _stems(labs[0])
    chosen = _artefacts(asked, stems)
    if chosen:
        return [_of_artefact(labs, stem, stems[stem]) for stem in chosen]
    results = {**_committed(lab), **_stored(lab)}
    found = _matching(results, asked)
    if found:
        return [of_result(lab, _read(results[name])) for name in found]
    like = get_close_matches(asked, [*stems, *results], n=3, cutoff=0.5)
    raise UserError(
        f'There is no result, table or figure "{asked}" of profile {lab.profile.name}, here or committed'
        f"{'; there is ' + ', '.join(like) if like else ''}."
    )


# Results.


def _stored(lab: Lab) -> dict[str, Path]:
    """Every result in the store, as kind/name-key."""
    folders = [lab.store.root / kind for kind in STAGE_VERSIONS]
    return {f"{path.parent.name}/{path.stem}": path for place in folders for path in place.glob("*.json")}


def _committed(lab: Lab) -> dict[str, dict[str, Any]]:
    """Every committed result of the profile, as kind/name-key."""
    return {_called(result): result for result in publishing.committed(lab.profile.name).values()}


def _called(result: dict[str, Any]) -> str:
    kind, name, key = address_of(result)
    return f"{kind}/{name}-{key}"


def _matching(names: Iterable[str], asked: str) -> list[str]:
    """Those that are called so, with or without kind or key; else the only one that begins so."""
    wanted, names = asked.removesuffix(".json"), sorted(names)
    parts = {name: (name, *_parts(name)) for name in names}
    whole = [name for name in names if wanted in parts[name]]
    if whole:
        return whole
    begun = [name for name in names if any(part.startswith(wanted) for part in parts[name][:3])]
    if len(wanted) >= SHORTEST:
        begun += [name for name in names if name not in begun and parts[name][-1].startswith(wanted)]
    if len(begun) > 1:
        raise UserError(
            f'"{asked}" is the beginning of {len(begun)} results, such as {", ".join(begun[:FEW])}; '
            "write out one of them."
        )
    return begun


def _parts(name: str) -> tuple[str, ...]:
    """name-key, kind/name, name and key of kind/name-key."""
    kind, _, rest = name.partition("/")
    bare, _, key = rest.rpartition("-")
    return rest, f"{kind}/{bare}", bare, key


def _read(found: Path | dict[str, Any]) -> dict[str, Any]:
    if not isinstance(found, Path):
        return found
    result = read_json(found)
    if not is_sound(result):
        raise DamagedError(f"{found} is cut off or damaged; `python -m qtale_lib run` computes it again.")
    return result


def of_result(lab: Lab, result: dict[str, Any]) -> Origin:
    """A result's values, settings and provenance."""
    told, path = result["provenance"], lab.store.path(*address_of(result))
    other = publishing.committed(lab.profile.name).get(publishing.cell(result["kind"], result["spec"]))
    facts = {
        "File": str(path) if path.is_file() else f"committed, in results/reference/{lab.profile.name}",
        **{name: _text(value) for name, value in _scalars(result["value"]).items()},
        "Settings": _listed(result.get("config", {})),
        "Made from": _listed(told["made_from"]),
        "Data": ", ".join(f"{split}: {_source(source)}" for split, source in told["data"].items()),
        "Profile": f"{told['profile']}, config {told['profile_digest']}",
        "Commit": str(told["git_commit"]),
        "Device": f"{told['device']}, cores {told['cores']}, threads {told['threads']}",
        "Computed in": f"{told['seconds']:.1f} s, finished {told['finished_at']}",
        "Peak memory": f"{told['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "Versions": _listed(told["versions"]),
        "Committed": "no" if other is None else f"with {'this' if _same(other, result) else 'another'} key",
    }
    return Origin(_called(result), {name: text for name, text in facts.items() if text})


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["key"] == other["key"]


def _scalars(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if not isinstance(item, dict | list)}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_listed(value)})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _source(source: dict[str, Any]) -> str:
    return " ".join(filter(None, [str(source.get("file")), str(source.get("sha256") or "")[:16]]))


# Tables and figures.


def _stems(lab: Lab) -> dict[str, list[Path]]:
    """The files of every table and figure: of this machine or, where it has none, committed."""
    found: dict[str, list[Path]] = {}
    for here, committed in (exporting.places(lab, kind) for kind in ("figures", "tables")):
        found |= {**_by_stem(committed), **_by_stem(here)}
    return found


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix in SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def _artefacts(asked: str, stems: Iterable[str]) -> list[str]:
    """The tables and figures that are meant: by name, by file, or by number: "3", "table 3"."""
    stems, file = sorted(stems), Path(asked)
    number = re.fullmatch(r"(figure|table)?s?[ _]*(\d\d?)", asked.lower())
    if number:
        kinds = [number[1]] if number[1] else ["figure", "table"]
        return [stem for kind in kinds for stem in exporting.numbered(number[2], stems, kind)]
    name = file.stem if file.suffix in SUFFIXES else file.name
    return [stem for stem in stems if stem == name]


def _of_artefact(labs: Sequence[Lab], stem: str, files: list[Path]) -> Origin:
    lab = labs[0]
    is_here = files[0].parent in (lab.figures, lab.tables)
    title = f"{stem} ({', '.join(path.suffix[1:] for path in files)} in {files[0].parent})"
    source = _notebook(lab, stem, files)
    if source is None:
        unknown = {"Notebook": "not known: no executed notebook here shows it as it is now"}
        return Origin(title, unknown if is_here else {**unknown, **_published(lab)})
    if not is_here:
        facts = {"Notebook": source.name, **_published(lab)}
        return Origin(title, facts, tuple(_committed_of(lab, source)))
    results = _results_of(labs, source)
    names = dict.fromkeys(map(_called, results))
    return Origin(title, of_notebook(lab, source, list(map(told, results))), tuple(names))


def _notebook(lab: Lab, stem: str, files: list[Path]) -> Path | None:
    """The notebook whose executed copy shows the very table or figure; else the one that bears its number."""
    sources = choose()
    texts = {path.read_text(encoding="utf-8") for path in files if path.suffix == ".md"}
    pictures = {path.read_bytes() for path in files if path.suffix == ".png"}
    for source in sources:
        copy = lab.directory / "notebooks" / source.name
        if copy.is_file() and _shows(copy, texts, pictures):
            return source
    return next((source for source in sources if _numbers(source.stem) & _numbers(stem)), None)


def _shows(copy: Path, texts: set[str], pictures: set[bytes]) -> bool:
    cells = nbformat.read(copy, as_version=4).cells
    shown = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return any(
        data.get("text/markdown") in texts or base64.b64decode(data.get("image/png", "")) in pictures
        for data in shown
    )


def _numbers(name: str) -> set[tuple[str, str]]:
    found = NUMBERED.search(name)
    return {(found[1], number) for number in found[2].split("_")[1:]} if found else set()


def _results_of(labs: Sequence[Lab], source: Path) -> list[dict[str, Any]]:
    """What of the results that a notebook shows is in the store; of a study, those of all its settings."""
    number = source.name[:2]
    if number in studies.NAMES:
        lab = labs[0]
        name, root = lab.profile.name, lab.directory.parent
        shown = labs if len(labs) > 1 else studies.study_of(number, name, root).labs
        wanted = [(each, all_jobs(each.profile)) for each in shown]
    else:
        wanted = [(labs[0], needs(labs[0].profile, source.name))]
    kinds = tuple(STAGE_VERSIONS)
    return list({_called(result): result for each, jobs in wanted
                 for result in each.stored(jobs, kinds)}.values())  # fmt: skip


def _committed_of(lab: Lab, source: Path) -> list[str]:
    """The same of what is committed."""
    there = publishing.committed(lab.profile.name)
    wanted: list[Job] = needs(lab.profile, source.name)
    cells = dict.fromkeys(publishing.cell(kind, spec) for kind, spec in lab.all_of(wanted))
    return [_called(there[cell]) for cell in cells if cell in there]


def _published(lab: Lab) -> dict[str, str]:
    """What the committed reference says of itself."""
    folder = ROOT / "results" / publishing.REFERENCE / lab.profile.name
    known = read_json(folder / "provenance.json") or {}
    between = known.get("finished_between", [])
    return {
        "Committed": f"{folder.relative_to(ROOT)}, published from {known.get('published_from')}",
        "Profile": f"{lab.profile.name}, config {known.get('profile_digest')}",
        "Commits": ", ".join(known.get("git_commits", [])),
        "Finished": " to ".join(between),
        "Device": ", ".join(known.get("devices", [])),
        "Versions": _listed(known.get("versions", {})),
    }


# A notebook.


def told(result: dict[str, Any]) -> dict[str, Any]:
    """What provenance says of one result, without its answers."""
    known = result["provenance"]
    data = [_source(source) for source in known.get("data", {}).values() if "file" in source]
    return {**{name: known.get(name) for name in TOLD}, "kind": result["kind"], "data": data}


def of_notebook(lab: Lab, source: Path, results: list[dict[str, Any]]) -> dict[str, str]:
    """What is known of an executed notebook and of the results that it shows, each as `told`."""
    stamp = read_json((lab.directory / "notebooks" / source.name).with_suffix(".json")) or {}
    facts = {
        "Notebook": f"{source.name}, sha256 {file_digest(source)[:12]}",
        "Executed in": span(stamp["seconds"]) if "seconds" in stamp else "not known",
        "Profile": f"{lab.profile.name}, config {lab.profile.digest()}",
        "Base": f"{lab.base()['name']}, sha256 {lab.base()['sha256'][:16]}",
    }
    bench = benchmark_report.stored(lab) if source.name[:2] == benchmark_report.NOTEBOOK else None
    if bench:
        known = bench["provenance"]
        return {**facts, "Benchmark": f"finished {known['finished_at']} at {known['git_commit']}"}
    if not results:
        return {**facts, "Results": "none of the profile's"}
    counts = Counter(result["kind"] for result in results)
    packages = {
        f"{name} {version}" for result in results for name, version in (result["versions"] or {}).items()
    }
    finished = sorted(str(result["finished_at"]) for result in results)
    return {
        **facts,
        "Results": ", ".join(f"{count} {kind}" for kind, count in counts.items()),
        "Commits": ", ".join(sorted({str(result["git_commit"])[:12] for result in results})),
        "Finished": f"{finished[0]} to {finished[-1]}",
        "Computed in": f"{span(sum(result['seconds'] for result in results))}, summed over results",
        "Peak memory": f"{max(result['peak_memory_bytes'] for result in results) / 2**20:,.0f} MiB",
        "Device": ", ".join(sorted({str(result["device"]) for result in results})),
        "Versions": ", ".join(sorted(packages)),
        "Data": ", ".join(sorted({name for result in results for name in result["data"]})) or "embedded",
    }
