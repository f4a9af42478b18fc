"""The notebooks' house rules, and every code cell run on a made-up lab, whatever a profile runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest
from fake_bench import made_up, stopped
from fake_lab import FakeLab
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from qtale_lib import (
    benchmark_report,
    claims,
    explore,  # noqa: F401 (imported before Lab is replaced, as are the studies, which keep labs of their own)
    studies,  # noqa: F401
)
from qtale_lib.adaptive import add_routers
from qtale_lib.base import load_tokenizer
from qtale_lib.data.microworld import base_directory
from qtale_lib.jobs import Run
from qtale_lib.store import write_json

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "00_figure_1_overview",
    "01_figure_4_gumbel",
    "02_figure_2_layer_execution",
    "03_figures_5_6_router_logits",
    "04_figures_3_7_flips",
    "05_tables_1_2_accuracy",
    "06_table_3_efficiency",
    "07_table_4_ablation",
    "08_execution_ratio",
    "09_quantizers",
    "10_sensitivity",
    "11_latency_and_memory",
    "12_generation",
    "13_explore",
    "14_paper_arithmetic",
]
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem[:2])


def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook(path).cells if cell.cell_type == "code"]


def is_parameters(cell: nbformat.NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def test_one_notebook_per_artefact():
    assert [path.stem for path in PATHS] == NAMES


@each
def test_sources_are_valid_without_outputs_and_for_the_kernel_python3(path):
    book = notebook(path)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(path))


@each
def test_the_first_cell_names_the_paper_what_is_shown_and_the_cost(path):
    first = notebook(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert all(part in first.source for part in ("**The paper", "**Here.**", "**Cost.**"))
    assert path.stem[:2] in ("01", "14") or ("`smoke`" in first.source and "`tiny`" in first.source)


@each
def test_one_parameters_cell_with_literals_only(path):
    (cell,) = [cell for cell in code_cells(path) if is_parameters(cell)]
    assert cell is code_cells(path)[0] or cell.id == code_cells(path)[0].id
    body = ast.parse(cell.source).body
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    assert values == {"PROFILE": "tiny", "DATA_DIR": "", "SEEDS": 0}


@each
def test_cells_are_short_and_hold_no_code_of_their_own(path):
    lengths = [len(cell.source.strip().splitlines()) for cell in code_cells(path)]
    assert max(lengths) <= 12 and median(lengths) <= 6
    for cell in code_cells(path):
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try}


@each
def test_the_run_store_is_the_only_source(path):
    text = "\n".join(cell.source for cell in code_cells(path))
    assert f'lab.ensure("{path.stem[:2]}")' in text
    assert not re.search(r"\b(import torch|open\(|read_csv|read_json|requests)", text)
    imported = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert set(imported) <= {"sys", "IPython", "qtale_lib"}


@each
def test_it_ends_with_its_claims_and_the_setting_comes_first(path):
    sources = [cell.source for cell in code_cells(path)]
    shown = [source for source in sources if not is_set_up(source)]
    assert "results.setting(store)" in shown[0]
    ends = {"00": "claim_tables.verdict_table(verdicts", "11": "benchmark_report.target_table("}
    ends |= {"13": "tables.beside_reference("}  # of a single text no claim is made
    ends |= {
        "08": "claims.judged(study",
        "09": "claims.judged(study",
        "10": "sensitivity.verdicts(study",
        "14": "paper_arithmetic.check_table(",
    }
    verdicts = ends.get(path.stem[:2], "claims.verdicts(store")
    assert any(verdicts in source for source in sources[-2:])
    assert any("beside_reference" in source for source in sources)


def is_set_up(source: str) -> bool:
    lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
    return all(re.match(r"(import|from|sys\.path|[A-Z_]+ =)", line) for line in lines)


def test_every_claim_stands_in_a_notebook():
    shown = {
        path.stem[:2] for path in PATHS if 'claims.verdicts(store, "' in path.read_text().replace('\\"', '"')
    }
    assert {claim.notebook for claim in claims.CLAIMS} == shown


PARTS = {
    "smoke": {"tasks": ["arc_easy", "alpaca"], "bits": [16, 4]},
    "one task": {"tasks": ["boolq"], "bits": [4], "seeds": [0, 1]},
    "no routers": {"tasks": ["alpaca"], "methods": ["full"], "bits": [16]},
    "qtale alone": {"tasks": ["mmlu"], "methods": ["qtale"], "bits": [16, 3]},
}


def fake_lab(folder: Path, **parts) -> FakeLab:
    lab = FakeLab(questions=40, **parts)
    lab.figures, lab.tables, lab.directory = folder / "figures", folder / "tables", folder
    return lab


def any_model(lab: FakeLab, run: Run, bits: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The embedded base, with routers where the run has some."""
    folder = base_directory()
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    return (add_routers(model) if run.routed else model).eval(), load_tokenizer(folder)


def run_cells(path: Path, lab: FakeLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells in order, in one namespace, with a made-up lab in place of the profile's."""
    monkeypatch.setenv("QTALE_RESULTS_DIR", str(lab.directory / "results"))
    monkeypatch.setattr("qtale_lib.lab.Lab", lambda profile: lab)
    monkeypatch.setattr("qtale_lib.explore.prepared_model", any_model)
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(".")
    namespace: dict = {}
    for cell in code_cells(path):
        exec(compile(cell.source, cell.id, "exec"), namespace)


@pytest.mark.parametrize("part", PARTS)
@each
def test_every_cell_runs_on_any_part_of_a_profile(path, part, tmp_path, monkeypatch):
    lab = fake_lab(tmp_path, **PARTS[part])
    write_json(benchmark_report.folder(lab) / "tiny.json", made_up())
    run_cells(path, lab, monkeypatch)
    assert lab.ensured == [path.stem[:2]]
    written = {
        file.name for folder in (lab.figures, lab.tables) if folder.exists() for file in folder.iterdir()
    }
    assert any(
        re.match(r"((figures?|tables?)_\d|bench_|paper_|execution_ratio_|quantizers|sensitivity_)", name)
        for name in written
    )
    for name in written:
        assert {f"{Path(name).stem}.csv"} <= written


@pytest.mark.parametrize(
    ("bench", "lacks"),
    [
        (stopped(), "decode, batch 16; prefill 512; the training step; the AWQ search"),
        (stopped(decode=(), memory=None, weights=[]), "decode, batch 1; decode, batch 16; prefill 512"),
    ],
    ids=["passes begun", "no passes"],
)
def test_a_benchmark_that_was_stopped_is_shown_as_such(bench, lacks, tmp_path, monkeypatch):
    lab = fake_lab(tmp_path, **PARTS["smoke"])
    write_json(benchmark_report.folder(lab) / "tinyllama-1.1b.unfinished.json", bench)
    run_cells(PATHS[NAMES.index("11_latency_and_memory")], lab, monkeypatch)
    for name in ("bench_setting", "bench_targets"):
        written = (lab.tables / f"{name}.md").read_text().lower()
        assert "unfinished" in written and lacks.lower() in written
