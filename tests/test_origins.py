"""Where results, tables and figures come from: found by name, key or number, and told as they are."""

from __future__ import annotations

import base64
import shutil

import nbformat
import pytest
from small_run import profile
from test_report import DOT
from typer.testing import CliRunner

from qtale_lib import notebooks, publishing
from qtale_lib.cli import app, artefacts
from qtale_lib.errors import DamagedError, UserError
from qtale_lib.jobs import Run, runs
from qtale_lib.lab import Lab, run_spec
from qtale_lib.origins import find
from qtale_lib.provenance import ROOT, Stopwatch

NAME = "arc_easy.dllm.s0.b4.argmax"


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Lab:
    """A profile with every routed fine-tuning and one evaluation in its store; nothing was trained."""
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    made = Lab(profile(name="mine", tasks=["arc_easy"]), tmp_path / "results")
    for run in runs(made.profile):
        if run.routed:
            put(made, made.address("finetune", run_spec(run)), run_spec(run), adapter_sha256=run.name)
    spec = run_spec(Run("arc_easy", "dllm", 0), bits=4, theta="argmax")
    put(made, made.address("evaluation", spec), spec, acc=0.8125, answers=[1, 0])
    return made


def put(lab: Lab, address: tuple[str, str, str], spec: dict, **value) -> None:
    facts = {"profile": "mine", "profile_digest": "d" * 16, "made_from": lab.made_from(address[0], spec)}
    source = {"test": {"file": "rows.jsonl", "sha256": "5" * 64}}
    told = {**Stopwatch(**facts, data=source).provenance(), "threads": 1, "git_commit": "c" * 40}
    config = {"prompt": "compact", "lora": {"r": 8}}
    lab.store.put(*address, spec=spec, value=value, config=config, provenance=told)


def evaluated(lab: Lab) -> str:
    return next(path.stem for path in (lab.store.root / "evaluation").glob("*.json"))


def test_a_result_is_found_by_its_name_its_key_and_their_beginnings(lab):
    stem = evaluated(lab)
    key = stem.rpartition("-")[2]
    ways = (NAME, stem, f"{stem}.json", f"evaluation/{NAME}", f"evaluation/{stem}", key, key[:6], NAME[:-3])
    for asked in ways:
        (origin,) = find([lab], asked)
        assert origin.title == f"evaluation/{stem}", asked
    assert origin.facts["acc"] == "0.8125" and "answers" not in origin.facts
    assert origin.facts["Settings"] == "prompt compact, lora (r 8)"
    assert f"adapter {Run('arc_easy', 'dllm', 0).name}" in origin.facts["Made from"]
    assert origin.facts["Data"] == "test: rows.jsonl 5555555555555555"
    assert origin.facts["Commit"] == "c" * 40 and origin.facts["Committed"] == "no"
    assert origin.facts["File"].endswith(f"{stem}.json")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("arc_easy.", '"arc_easy." is the beginning of 3 results, such as evaluation/arc_easy.dllm.s0.b4'),
        ("nonsense", 'There is no result, table or figure "nonsense" of profile mine, here or committed.'),
        ("figure 9", 'There is no result, table or figure "figure 9" of profile mine'),
        ("evaluation/arc_easy.dllm.s0.b4.argmix", f"there is evaluation/{NAME}-"),
    ],
)
def test_what_is_not_there_is_one_sentence(lab, asked, said):
    with pytest.raises(UserError) as refused:
        find([lab], asked)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_damaged_result_says_so(lab):
    path = lab.store.root / "evaluation" / f"{evaluated(lab)}.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedError, match="is cut off or damaged"):
        find([lab], NAME)


def drawn(lab: Lab, stem: str, picture: bytes) -> None:
    lab.figures.mkdir(parents=True, exist_ok=True)
    (lab.figures / f"{stem}.png").write_bytes(picture)
    (lab.figures / f"{stem}.csv").write_text("x\n1\n")


def executed(lab: Lab, number: str, picture: bytes) -> None:
    (source,) = notebooks.choose(number)
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(picture).decode()})
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    path = lab.directory / "notebooks" / source.name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)


def test_a_figure_names_its_notebook_and_the_results_behind_it(lab):
    drawn(lab, "figure_2_layer_execution_qtale", DOT)
    drawn(lab, "loss_ratio", DOT + b"other")
    executed(lab, "03", DOT + b"other")
    for asked in (
        "figure 2",
        "2",
        "figure_2_layer_execution_qtale",
        "figures/figure_2_layer_execution_qtale.csv",
    ):
        (origin,) = find([lab], asked)  # by its number, as no executed notebook shows it
        assert origin.facts["Notebook"].startswith("02_figure_2_layer_execution.ipynb")
        assert [name.rpartition("-")[0] for name in origin.made_from] == [
            "finetune/arc_easy.dllm.s0", "finetune/arc_easy.qtale.s0"
        ]  # fmt: skip
        assert origin.facts["Results"] == "2 finetune" and origin.facts["Commits"] == "c" * 12
    (origin,) = find([lab], "loss_ratio")  # by what the notebook shows
    assert origin.facts["Notebook"].startswith("03_figures_5_6")
    executed(lab, "03", DOT)
    (origin,) = find([lab], "loss_ratio")
    assert origin.facts["Notebook"].startswith("not known") and origin.made_from == ()


@pytest.mark.parametrize("name", ["table_1_2_accuracy", "table_1_2_accuracy.tex"])
def test_what_was_not_computed_here_comes_from_the_reference(tmp_path, monkeypatch, name):
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    tiny = Lab("tiny", tmp_path)
    (origin,) = find([tiny], name)
    there = publishing.committed("tiny")
    assert origin.facts["Notebook"] == "05_tables_1_2_accuracy.ipynb"
    assert len(origin.made_from) == len(set(origin.made_from)) == len(there)
    called = origin.made_from[-1]
    (result,) = find([tiny], called)
    assert result.title == called and result.facts["Committed"] == "with this key"
    assert result.facts["File"] == "committed, in results/reference/tiny"
    assert "adapter " in result.facts["Made from"] and result.facts["Commit"] in origin.facts["Commits"]


def test_every_figure_and_table_of_the_reference_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("QTALE_FIGURES_DIR", str(tmp_path / "figures"))
    folders = (ROOT / "figures" / "reference" / "tiny", ROOT / "results" / "reference" / "tiny" / "tables")
    stems = {path.stem for folder in folders for path in folder.iterdir()}
    found = {stem: find([Lab("tiny", tmp_path)], stem) for stem in sorted(stems)[::7]}
    assert all(origin.title.startswith(f"{stem} (") for stem, (origin,) in found.items())


def test_the_command_prints_it(lab, monkeypatch):
    monkeypatch.setattr(artefacts.studies, "labs", lambda name: [lab])
    drawn(lab, "figure_2_layer_execution_qtale", DOT)
    shown = CliRunner().invoke(app, ["show", "figure", "2"]).output
    assert "  Notebook       02_figure_2_layer_execution.ipynb" in shown
    assert "  from           finetune/arc_easy.qtale.s0-" in shown
    shutil.rmtree(lab.figures)
    assert "finetune/arc_easy.qtale.s0-" in CliRunner().invoke(app, ["show", "arc_easy.qtale.s0"]).output
