"""The benchmarks from the hub: the same Examples as from the original files, by a stand-in for the hub that
serves parquet made of those files.
"""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from qtale_lib.config import TASKS, load_profile
from qtale_lib.data import BENCHMARKS, data_hash, hub, read_task
from qtale_lib.data.benchmarks import CLEANED, ROWS
from qtale_lib.data.files import read_csv_folder, read_json_array, read_jsonl, read_jsonl_with_labels
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab

pytestmark = pytest.mark.filterwarnings("ignore:.*the published file has")
DATA = os.environ.get("QTALE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="QTALE_TEST_DATA does not name a folder with the benchmarks")


def openbookqa(row: dict) -> dict:
    choices = row["question"]["choices"]
    columns = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {"id": row["id"], "question_stem": row["question"]["stem"], "choices": columns,
            "answerKey": row["answerKey"]}  # fmt: skip


def mmlu(cells: list) -> dict:
    subject, question, *choices, answer = cells
    return {"subject": subject.replace(" ", "_"), "question": question, "choices": choices,
            "answer": "ABCD".index(answer)}  # fmt: skip


# How the hub's repositories show the original rows, where it is another way.
SHOWN: dict[str, Callable] = {
    "openbookqa": openbookqa,
    "mmlu": mmlu,
    "siqa": lambda row: {**row, "label": str(row["label"])},
    "winogrande": lambda row: {name: text for name, text in row.items() if name != "qID"},
    "boolq": lambda row: {name: row[name] for name in ("question", "answer", "passage")},
    "alpaca": lambda row: {**row, "text": "not read"},
    "alpaca_eval": lambda row: {**row, "generator": "not read", "dataset": "not read"},
    "samsum": lambda row: {**row, "dialogue": row["dialogue"] or None},
}


@pytest.fixture
def served(tmp_path, monkeypatch) -> Callable:
    """served(task, split, path): the hub has, for that split, the rows of that original file."""
    there: dict[tuple, Path] = {}

    def serve(task: str, split: str, path: Path) -> hub.Copy:
        copy = hub.COPIES[task]
        rows = [SHOWN.get(task, lambda row: row)(row) for _, row in BENCHMARKS[task].read(path)]
        rows = rows[::-1] if task == "mmlu" else rows  # several files: their order is not the hub's
        kept = tmp_path / f"{task}-{split}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(kept)
        there[copy.repository, copy.config, copy.splits[split][0], copy.revision] = kept
        return copy

    whole = datasets.load_dataset

    def download(repository, file, *, repo_type, revision):
        assert (file, repo_type) == ("alpaca_eval.json", "dataset")
        kept = there[repository, None, "test", revision]
        rows = datasets.Dataset.from_parquet(str(kept), cache_dir=str(tmp_path / "cache")).to_list()
        (tmp_path / file).write_text(json.dumps(rows))
        return str(tmp_path / file)

    def load(repository, config=None, *, split, revision):
        assert repository != "tatsu-lab/alpaca_eval"  # datasets refuses it: it holds a script
        kept = there.get((repository, config, split, revision))
        if kept is None:
            raise ConnectionError("offline")
        return whole("parquet", data_files=str(kept), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    datasets.disable_progress_bars()
    return serve


def file_of(task: str, split: str, folder: Path) -> Path | None:
    """The original file of a split, under the name that the hub's rows bear."""
    name = hub.COPIES[task].splits.get(split, (None, "absent"))[1]
    path = folder / task / name
    return path if path.exists() else None


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(BENCHMARKS))
def test_real_rows_are_the_same_either_way(task, served):
    files = {split: file_of(task, split, Path(DATA)) for split in hub.COPIES[task].splits}
    for split, path in files.items():
        if path is None:
            continue
        served(task, split, path)
        ours, theirs = read_task(task, split, DATA), read_task(task, split, data="hub")
        if task == "mmlu":  # the subjects' order is the files'; within one, the stand-in's is reversed
            order = [e.fields["subject"] for e in ours.examples]
            assert order == [e.fields["subject"] for e in theirs.examples]
            assert {json.dumps(e.fields) for e in ours.examples} == {
                json.dumps(e.fields) for e in theirs.examples
            }
            continue
        assert theirs.examples == ours.examples
        assert data_hash(theirs.examples) == data_hash(ours.examples)
        assert theirs.source.get("cuts") == ours.source.get("cuts")


SMALL = {
    "piqa": {"goal": "open a jar", "sol1": "twist", "sol2": "sing"},
    "siqa": {"context": "c", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c"},
    "boolq": {"question": "is it so", "title": "t", "answer": False, "passage": "it is not so"},
    "arc_easy": {"id": "m", "question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                 "answerKey": "2"},
    "winogrande": {"qID": "X-1", "sentence": "the _ fell", "option1": "cup", "option2": "mat", "answer": "2"},
    "openbookqa": {"id": "7-1", "question": {"stem": "fog is", "choices": [{"text": "wet", "label": "A"},
                   {"text": "dry", "label": "B"}]}, "answerKey": "A"},
    "mmlu": ["q", "1", "2", "3", "4", "D"],
    "alpaca": {"instruction": "Say hi", "input": "", "output": "hi"},
    "alpaca_eval": {"instruction": "Say hi", "output": "hi"},
    "samsum": {"id": "9", "dialogue": "Bo: hi", "summary": "Bo says hi"},
}  # fmt: skip
SMALL["arc_challenge"] = SMALL["arc_easy"]


def write(task: str, split: str, folder: Path, count: int) -> Path:
    """An original file of `count` equal rows."""
    name = hub.COPIES[task].splits[split][1]
    path, rows = folder / task / name, [SMALL[task]] * count
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = BENCHMARKS[task].read
    if reader is read_csv_folder:
        path.mkdir(exist_ok=True)
        with (path / "virology_test.csv").open("w", newline="") as handle:
            csv.writer(handle).writerows(rows)
    elif reader is read_json_array:
        path.write_text(json.dumps(rows))
    else:
        assert reader in (read_jsonl, read_jsonl_with_labels)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path.with_name(f"{path.stem}-labels.lst").write_text("1\n" * count)
    return path


@pytest.mark.parametrize(("task", "split"), [(t, s) for t, c in hub.COPIES.items() for s in c.splits])
def test_rows_are_the_same_either_way(task, split, served, tmp_path):
    path = write(task, split, tmp_path, 12)
    copy = served(task, split, path)
    # equal rows are one group: all of them are cut out, for the first that takes some
    read = split if split != "train" else "test" if task == "alpaca" else "calibration"
    ours, theirs = read_task(task, read, tmp_path), read_task(task, read, data="hub")
    assert theirs.examples == ours.examples and len(ours.examples) == 12
    assert theirs.source["revision"] == copy.revision
    assert any("has 12 rows; the published file has" in note for note in theirs.source["notes"])


def test_every_benchmark_has_a_copy_at_a_whole_commit():
    assert set(hub.COPIES) == set(BENCHMARKS) and set(TASKS) <= set(hub.COPIES)
    copies = [*hub.COPIES.values(), hub.CLEANED]
    assert all(re.fullmatch("[0-9a-f]{40}", copy.revision) for copy in copies)
    for task, copy in hub.COPIES.items():
        assert set(copy.splits) == set(BENCHMARKS[task].files)


def test_what_the_hub_cannot_give_is_one_sentence(served, tmp_path):
    with pytest.raises(UserError, match=r"piqa: baber/piqa, validation, .*\(ConnectionError\).*set data_dir"):
        read_task("piqa", "test", data="hub")
    path = write("boolq", "test", tmp_path, 3)
    path.write_text(path.read_text().replace("false", '"no"'))
    served("boolq", "test", path)
    with pytest.raises(UserError, match="google/boolq, validation, row 1: label 'no' is not one of True"):
        read_task("boolq", "test", data="hub")


def test_a_profile_reads_from_the_hub_unless_it_has_a_folder(served, tmp_path):
    path = write("boolq", "test", tmp_path, 3)
    served("boolq", "test", path)
    from_hub = Lab(load_profile("tiny", data="hub"), tmp_path / "results")
    from_files = Lab(load_profile("tiny", data="hub", data_dir=str(tmp_path)), tmp_path / "results")
    assert from_hub.examples("boolq", "test") == from_files.examples("boolq", "test")
    assert from_hub.source("boolq", "test")["file"] == "google/boolq, validation"
    assert from_files.source("boolq", "test")["file"] == "dev.jsonl"


@pytest.mark.parametrize(
    ("task", "name"), [("alpaca", "alpaca_data.json"), ("alpaca_eval", "alpaca_eval.json")]
)
def test_a_file_by_its_publishers_name_has_the_same_rows(task, name, served, tmp_path):
    path = write(task, next(iter(hub.COPIES[task].splits)), tmp_path, 12)
    named = read_task(task, "test", tmp_path)
    path.rename(path.with_name(name))
    again = read_task(task, "test", tmp_path)
    assert again.examples == named.examples and again.source["file"] == name


def test_a_copys_own_number_of_rows_is_no_surprise(served, tmp_path, monkeypatch):
    served("samsum", "train", write("samsum", "train", tmp_path, 12))
    told = {"notes": read_task("samsum", "calibration", data="hub").source["notes"]}
    monkeypatch.setitem(hub.COPIES, "samsum", replace(hub.COPIES["samsum"], counts={"train.json": 12}))
    assert "the published file has 14731" in told["notes"][0]
    assert read_task("samsum", "calibration", data="hub").source["notes"] == []


def test_the_page_on_data_names_every_source():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    told = dict(re.findall(r"^\| (\w+) \| (.+) \|$", page, re.MULTILINE))
    assert set(told) - {"task"} == set(BENCHMARKS) | {"cleaned"}
    sources = {**{task: (BENCHMARKS[task], copy) for task, copy in hub.COPIES.items()},
               "cleaned": (CLEANED, hub.CLEANED)}  # fmt: skip
    for name, (benchmark, copy) in sources.items():
        files, counts, place = told[name].split(" | ")
        assert f"`{copy.repository}`" in place and f"`{copy.revision[:12]}`" in place
        assert re.findall("`([^`]+)`", files) == [f for given in benchmark.files.values() for f in given]
        task = "alpaca" if name == "cleaned" else name
        published = [ROWS[task, original] for _, original in copy.splits.values()]
        assert counts == " / ".join(f"{rows:,}" for rows in published)
