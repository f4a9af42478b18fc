"""Bad input by the thousand: each ends well, or in one sentence and a code, and leaves nothing half done.

Every test has a quick round, and one of thousands that is marked slow.
"""

from __future__ import annotations

import ast
import json
import lzma
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.cli import papermill
from safetensors.numpy import save
from small_run import profile, save_base
from typer.testing import CliRunner as TyperRunner

from qtale_lib import archive, cli, estimates, lab, sweep
from qtale_lib.base import base_facts, header, tensor_shapes
from qtale_lib.config import TASKS, load_profile
from qtale_lib.data import data_hash
from qtale_lib.data.benchmarks import BENCHMARKS, read_split
from qtale_lib.data.prompts import render
from qtale_lib.density import load_study
from qtale_lib.errors import DamagedError, MachineError, UserError
from qtale_lib.lab import Lab
from qtale_lib.notebooks import NOTEBOOKS, Executions
from qtale_lib.preflight import check_base, check_settings, config_of
from qtale_lib.profile_files import SHIPPED
from qtale_lib.store import SCHEMA, Store, inside

QUICK, THOUSANDS = 40, 2000

HOSTILE = (
    "", " ", "..", "../../etc/passwd", "/", "~nobody-of-that-name/x", "x" * 5000, "\ud800", "\0", "\u202ex",
    "<script>alert(1)</script>", "'; import os; os.abort() #", '"""', "{{7*7}}", "$(id)", "NaN",
    "1e999", "-0",
    "\N{PILE OF POO}" * 9, "e\u0301", "²", "\r\n", "!!python/object:os.system x",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(HOSTILE)
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def fuzzed(*strategies: st.SearchStrategy) -> Callable:
    """The test of a function(folder, values), in both rounds."""

    def wrap(function: Callable) -> Callable:
        @pytest.mark.parametrize("examples", [QUICK, pytest.param(THOUSANDS, marks=pytest.mark.slow)])
        @pytest.mark.filterwarnings("ignore:.*published file has")
        def test(examples: int, tmp_path: Path) -> None:
            @settings(
                max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
            )
            @given(st.tuples(*strategies))
            def run(values: tuple) -> None:
                function(tmp_path, *values)

            run()

        test.__doc__ = function.__doc__
        return test

    return wrap


def refused(action: Callable[[], Any], kind: type[UserError] = UserError) -> Any:
    """What an action gives, or None if it refuses: by its one sentence, short enough to be read."""
    try:
        return action()
    except kind as error:
        sentence = str(error)
        assert sentence and len(sentence) < 12_000 and len(sentence.splitlines()) <= 2, sentence
        return None


# Profiles.

DOTTED = [
    (section, key)
    for section, value in yaml.safe_load((SHIPPED / "tiny.yaml").read_text()).items()
    for key in (value if isinstance(value, dict) else [None])
]


def changed(key: tuple[str, str | None], value: Any) -> str:
    section, name = key
    return yaml.safe_dump({section: value if name is None else {name: value}}, allow_unicode=True)


@fuzzed(st.sampled_from(DOTTED), ANYTHING)
def test_any_value_of_any_setting_is_taken_or_refused(folder, key, value):
    """And what is taken fits the embedded base, or is refused before any work."""
    path = folder / "own.yaml"
    path.write_bytes(changed(key, value).encode(errors="surrogatepass"))
    taken = refused(lambda: load_profile(path))
    if taken is not None and taken.base == "microworld":
        assert load_profile(path).digest() == taken.digest()
        jobs = lab.jobs.all_jobs(taken)[:8]
        shapes = {"model.layers.0.self_attn.q_proj.weight": [48, 48]}
        refused(lambda: check_settings(taken, config_of(load_profile("tiny")), shapes, jobs))


TAGS = ("int", "float", "bool", "timestamp", "binary", "map", "set", "omap", "pairs", "seq", "merge", "null")
BROKEN = st.builds(
    "{}: !!{} {}".format,
    st.sampled_from(["tasks", "lora", "seeds", "x", "? [a]\n"]),
    st.sampled_from(TAGS),
    st.sampled_from(["x", "''", "[1]", "{a: 1}", "2020-99-99", "0x", "0b_", "[[a, b]]", "~"]),
)


@fuzzed(st.text(max_size=60).map(str.encode) | st.binary(max_size=60) | BROKEN.map(str.encode))
def test_any_bytes_for_a_profile_are_taken_or_refused(folder, content):
    (folder / "own.yaml").write_bytes(content)
    refused(lambda: load_profile(folder / "own.yaml"))
    refused(lambda: sweep.settings(sweep.load_sweep(folder / "own.yaml")))
    refused(lambda: load_study(folder / "own.yaml"))


@pytest.mark.timeout(60)
def test_huge_values_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for key in ("tasks", "seeds", "base", "training", "lora"):
        (tmp_path / "own.yaml").write_text("\n".join([*lines, f"{key}: *a11"]))
        with pytest.raises(UserError):
            load_profile(tmp_path / "own.yaml")
    for huge in (f"0x{'f' * 5000}", "9" * 5000):
        (tmp_path / "own.yaml").write_text(f"group_size: {huge}\ntasks: [{huge}]\n? {huge}\n: 1\n")
        with pytest.raises(UserError):
            load_profile(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("training: &t\n  x: *t\n  lr: *t\n")
    with pytest.raises(UserError, match="training"):
        load_profile(tmp_path / "own.yaml")


@fuzzed(st.dictionaries(st.sampled_from(["lr", "training.lr", "training", "", "x.y", "seeds"]), ANYTHING))
def test_any_factors_of_a_sweep_are_taken_or_refused(folder, factors):
    path = folder / "own.yaml"
    path.write_bytes(changed(("factors", None), factors).encode(errors="surrogatepass"))
    with path.open("a") as file:
        file.write("\nevaluated: validation\n")
    refused(lambda: sweep.settings(sweep.load_sweep(path)))


# Weights.

SOUND = save({"a": np.ones((2, 3), "float32"), "b": np.ones(4, "float32")})
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X", 3, None]),
        "shape": st.lists(st.integers(-3, 2**70) | st.floats() | st.text(max_size=2), max_size=3) | SCALARS,
        "data_offsets": st.lists(st.integers(-3, 2**70) | SCALARS, max_size=3) | SCALARS,
    },
)


def with_header(value: Any, body: bytes = b"\0" * 40) -> bytes:
    text = json.dumps(value).encode(errors="surrogatepass") if not isinstance(value, bytes) else value
    return struct.pack("<Q", len(text)) + text + body


HEADERS = (
    st.dictionaries(st.text(max_size=3), ENTRY | ANYTHING, max_size=3)
    .map(with_header)
)  # fmt: skip
FLIPPED = st.builds(
    lambda at, byte: SOUND[:at] + bytes([byte]) + SOUND[at + 1 :],
    st.integers(0, len(SOUND) - 1), st.integers(0, 255),
)  # fmt: skip
CUT = st.integers(0, len(SOUND)).map(lambda end: SOUND[:end])


@fuzzed(HEADERS | FLIPPED | CUT | st.binary(max_size=40) | st.just(with_header(b"[" * 100_000)))
def test_any_bytes_for_weights_are_read_or_refused(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    shapes = refused(lambda: header(path), DamagedError)
    assert shapes is None or all(
        isinstance(size, int) and size >= 0 for shape in shapes.values() for size in shape
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("examples", [QUICK, pytest.param(THOUSANDS, marks=pytest.mark.slow)])
def test_any_config_and_tokenizer_of_a_base_are_taken_or_refused(examples, base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sound = {name: (base / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    config, tokenizer = (json.loads(text) for text in sound.values())
    small = profile(tmp_path)

    def check_all() -> None:
        directory = check_base(small)
        facts = base_facts(small)
        check_settings(small, facts["config"], tensor_shapes(directory), lab.jobs.all_jobs(small))
        estimates.shape_of(facts["config"])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(sorted(sound)),
        st.sampled_from(sorted({*config, *tokenizer})),
        ANYTHING,
    )
    def run(name: str, key: str, value: Any) -> None:
        content = {**json.loads(sound[name]), key: value}
        for file, text in sound.items():
            (tmp_path / file).write_bytes(text)
        (tmp_path / name).write_bytes(json.dumps(content).encode(errors="surrogatepass"))
        refused(check_all)

    run()


# Results.


def result(**changes: Any) -> dict[str, Any]:
    sound = {"schema": SCHEMA, "kind": "finetune", "key": "k", "status": "done", "spec": {}, "value": {}}
    return {**sound, "provenance": {}, **changes}


NESTED = b"[" * 100_000


@fuzzed(st.dictionaries(st.sampled_from(sorted(result())), ANYTHING).map(lambda c: result(**c)) | ANYTHING)
def test_any_json_for_a_result_is_sound_or_missing(folder, value):
    store = Store(folder)
    path = store.path("finetune", "n", "k")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json.dumps(value).encode(errors="surrogatepass"))
    found = store.get("finetune", "n", "k")
    assert found is None or all(isinstance(found[part], dict) for part in ("spec", "value", "provenance"))


def test_a_result_that_is_a_folder_or_nested_without_end_counts_as_missing(tmp_path):
    store = Store(tmp_path)
    store.path("finetune", "folder", "k").mkdir(parents=True)
    store.path("finetune", "deep", "k").write_bytes(NESTED)
    assert store.get("finetune", "folder", "k") is store.get("finetune", "deep", "k") is None


@pytest.mark.parametrize("name", ["..", "", ".", "a/b", "/etc", "a\0b", "../x"])
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    with pytest.raises(DamagedError, match="is no name of a file"):
        inside(tmp_path, "a", name)
    parts = ("finetune", name, "k") if "/" in name or "\0" in name else (name, "n", "k")
    with pytest.raises(DamagedError):
        Store(tmp_path).path(*parts)


ADDRESS = st.sampled_from(["../../x", "..", "a/b", "/tmp/x", "finetune", "\0", "n"]) | SCALARS


@fuzzed(
    st.fixed_dictionaries(
        {"kind": ADDRESS, "key": ADDRESS, "spec": st.fixed_dictionaries(
            {"task": ADDRESS, "method": ADDRESS, "seed": ADDRESS}) | ANYTHING},
    )
)  # fmt: skip
def test_nothing_in_an_archive_leads_out_of_the_store(folder, changes):
    place, own = folder / "archive" / "smoke", Lab(load_profile("smoke"), folder / "results")
    place.mkdir(parents=True, exist_ok=True)
    before = {path for path in folder.rglob("*") if own.store.root not in path.parents}
    (place / "seed-0.jsonl.xz").write_bytes(lzma.compress(json.dumps(result(**changes)).encode()))
    refused(lambda: archive.restore(own, folder / "archive"), DamagedError)
    outside = {path for path in folder.rglob("*") if own.store.root not in path.parents}
    assert outside - before <= {own.store.root, own.directory, folder / "results", place / "seed-0.jsonl.xz"}


# Benchmarks' files.

JSONL = {
    "piqa": ("train.jsonl", {"goal": "g", "sol1": "a", "sol2": "b"}),
    "boolq": ("train.jsonl", {"passage": "p", "question": "q", "answer": True}),
    "winogrande": ("train_xl.jsonl", {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}),
    "arc_easy": ("train.jsonl", {"id": "1", "question": "q", "answerKey": "A",
                                 "choices": {"text": ["a", "b"], "label": ["A", "B"]}}),
    "openbookqa": ("train.jsonl", {"id": "1", "answerKey": "A", "question": {
        "stem": "q", "choices": [{"text": "a", "label": "A"}]}}),
    "alpaca": ("train.json", {"instruction": "i", "input": "", "output": "o"}),
    "samsum": ("train.json", {"id": "1", "dialogue": "d", "summary": "s"}),
}  # fmt: skip


def rows_of(task: str, row: Any) -> bytes:
    rows = [JSONL[task][1]] * 3 + [row]
    text = json.dumps(rows) if JSONL[task][0].endswith(".json") else "\n".join(map(json.dumps, rows))
    return text.encode(errors="surrogatepass")


def read(folder: Path, task: str, content: bytes) -> None:
    place = folder / task
    place.mkdir(exist_ok=True)
    (place / JSONL[task][0]).write_bytes(content)
    if task == "piqa":
        (place / "train-labels.lst").write_text("0\n" * 4)
    loaded = refused(lambda: read_split(task, "train", folder), UserError)
    if loaded is not None:
        assert data_hash(loaded.examples) and all(render(example).prompt for example in loaded.examples)


@fuzzed(st.sampled_from(sorted(JSONL)), st.data())
def test_any_row_of_a_benchmark_is_read_or_refused(folder, task, data):
    row = dict(JSONL[task][1])
    key = data.draw(st.sampled_from(sorted(row)))
    row[key] = data.draw(ANYTHING)
    if data.draw(st.booleans()):
        del row[data.draw(st.sampled_from(sorted(row)))]
    read(folder, task, rows_of(task, data.draw(st.just(row) | ANYTHING)))  # fmt: skip


@fuzzed(
    st.sampled_from(sorted(JSONL)),
    st.integers(0, 400),
    st.binary(max_size=3) | st.sampled_from([NESTED, b"1" * 5000, b"\xef\xbb\xbf", b'"\\ud800"', b"NaN"]),
)
def test_any_damage_to_a_benchmarks_file_is_read_or_refused(folder, task, at, put):
    sound = rows_of(task, JSONL[task][1])
    read(folder, task, sound[: at % len(sound)] + put + sound[(at + len(put)) % len(sound) :])


@fuzzed(st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
def test_any_csv_and_any_labels_are_read_or_refused(folder, content):
    for place, name in (("mmlu/auxiliary_train", "x.csv"), ("piqa", "train-labels.lst")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / name).write_bytes(content)
    (folder / "piqa" / "train.jsonl").write_bytes(rows_of("piqa", JSONL["piqa"][1]))
    for task in ("mmlu", "piqa"):
        refused(lambda task=task: read_split(task, "train", folder))


def test_what_is_no_file_or_only_looks_like_a_number_is_refused(tmp_path):
    (tmp_path / "boolq" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(DamagedError, match="cannot be read"):
        read_split("boolq", "train", tmp_path)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "train.jsonl").write_bytes(rows_of("piqa", JSONL["piqa"][1]))
    for label in ("²", "9" * 5000, "٣x"):
        (tmp_path / "piqa" / "train-labels.lst").write_text(f"0\n0\n0\n{label}\n")
        with pytest.raises(DamagedError, match="line 4: label"):
            read_split("piqa", "train", tmp_path)


# The command line.

OPTIONS = (
    "--profile", "--data-dir", "--only", "--seeds", "--seed", "--bits", "--fresh", "--theta", "--tokens",
    "--prompt", "--figure", "--table", "--format", "--width", "--font", "--size", "--palette", "--out",
    "--parts", "--prefill", "--decode", "--formats", "--ratios", "--repeats", "--context", "--seconds",
    "--device", "--shape", "--help", "--nonsense",
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(("smoke", "arc_easy", "full", "qtale", "7", "0", "16", "nan", "inf", "1e400", "1,,2")),
    st.sampled_from(HOSTILE), st.text(max_size=6), st.integers().map(str),
)  # fmt: skip
COMMANDS = (
    "run", "doctor", "status", "train", "quantize", "calibrate", "evaluate", "generate", "export",
    "publish", "archive", "restore", "sweep", "density", "bench", "pretrain", "frobnicate",
)  # fmt: skip
ARGUMENTS = st.builds(
    lambda command, words: [command, *(word for pair in words for word in pair)],
    st.sampled_from(COMMANDS),
    st.lists(st.tuples(WORDS) | st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=4),
)


class Work(UserError):
    """Stands where the arguments have been taken and work would begin."""


@pytest.mark.parametrize("examples", [QUICK, pytest.param(THOUSANDS, marks=pytest.mark.slow)])
def test_any_arguments_are_taken_or_refused(examples, tmp_path, monkeypatch):
    for name in ("QTALE_RESULTS_DIR", "QTALE_FIGURES_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)

    def begin(*_: Any, **__: Any) -> None:
        raise Work("work would begin here")

    for place in ("qtale_lib.pool.run_tasks", "qtale_lib.lab.run_tasks", "qtale_lib.preflight.check_fit",
                  "qtale_lib.benchmark.bench", "qtale_lib.density.compute", "qtale_lib.sweep.compute",
                  "qtale_lib.lab.check", "qtale_lib.notebooks.subprocess.run",
                  "qtale_lib.data.microworld.pretrain.main"):  # fmt: skip
        monkeypatch.setattr(place, begin)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(ARGUMENTS)
    def run(arguments: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = TyperRunner().invoke(cli.app, arguments)
        if done.exception is not None and not isinstance(done.exception, SystemExit | UserError):
            raise AssertionError(arguments) from done.exception
        assert isinstance(done.exception, UserError) or done.exit_code in (0, 1, 2, 3, 4), arguments

    run()


def test_each_kind_of_error_has_its_own_code():
    codes = [kind.exit_code for kind in (UserError, DamagedError, MachineError)]
    assert codes == [2, 3, 4]
    assert issubclass(DamagedError, UserError) and issubclass(MachineError, UserError)


# Parameters of notebooks.


@pytest.mark.parametrize("text", [*(t for t in HOSTILE if "\0" not in t and "\ud800" not in t), "a\\", "\\'"])
def test_parameters_stay_texts_in_a_notebook(text, tmp_path):
    """As papermill writes them: literals, whatever stands in them."""
    own = Lab(load_profile("smoke"), tmp_path)
    source = sorted(NOTEBOOKS.glob("05_*.ipynb"))[0]
    given_parameters = {"PROFILE": text, "DATA_DIR": text, "SEEDS": 2}
    command = Executions(own, given_parameters)._command(source, tmp_path / "copy.ipynb")
    done = CliRunner().invoke(papermill, [*command[3:], "--prepare-only"])
    assert done.exit_code == 0, done.output
    cells = nbformat.read(tmp_path / "copy.ipynb", as_version=4).cells
    (injected,) = [cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assigned = {}
    for statement in ast.parse(injected.source).body:
        assert isinstance(statement, ast.Assign)
        assigned[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert assigned == given_parameters


def test_every_task_that_is_fuzzed_is_one():
    assert set(JSONL) <= set(BENCHMARKS) and set(JSONL) - {"samsum"} <= set(TASKS)
