"""Loaders against the formats of the benchmarks' original files, and the encoding of examples."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import WORDS, word_tokenizer
from transformers import AutoTokenizer

from qtale_lib.data import data_hash, load_task, read_task, subset
from qtale_lib.data.encoding import IGNORED, collate, encode, encode_all, encode_pairs
from qtale_lib.data.prompts import render
from qtale_lib.data.schema import Example
from qtale_lib.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*the published file has")

DATA = os.environ.get("QTALE_TEST_DATA")
MODELS = os.environ.get("QTALE_TEST_MODELS")
needs_data = pytest.mark.skipif(not DATA, reason="QTALE_TEST_DATA does not name a folder with the benchmarks")
needs_models = pytest.mark.skipif(
    not MODELS, reason="QTALE_TEST_MODELS does not name a folder with stories260K"
)

# task -> rows of (the training file, validation, test); None: no such file
PUBLISHED = {
    "piqa": (16113, None, 1838),
    "siqa": (33410, None, 1954),
    "winogrande": (2558, None, 1267),
    "arc_easy": (2251, 570, 2376),
    "arc_challenge": (1119, 299, 1172),
    "openbookqa": (4957, 500, 500),
    "boolq": (None, None, 3270),
    "mmlu": (285, None, 14042),
}


@needs_data
@pytest.mark.filterwarnings("error:.*the published file has")
@pytest.mark.parametrize("task", PUBLISHED)
def test_row_counts_of_the_real_files(task):
    training, validation, test = PUBLISHED[task]
    assert len(load_task(task, "test", DATA)) == test
    if training:
        assert len(load_task(task, "train", DATA)) + len(load_task(task, "calibration", DATA)) == training
    if validation:
        assert len(load_task(task, "validation", DATA)) == validation


@needs_data
def test_real_alpaca_is_cut_in_three():
    splits = [load_task("alpaca", split, DATA) for split in ("train", "calibration", "test")]
    assert [len(rows) for rows in splits[1:]] == [1000, 2000]
    assert sum(map(len, splits)) == 52002
    instructions = [{example.fields["instruction"] for example in rows} for rows in splits]
    assert not instructions[0] & instructions[1] and not (instructions[0] | instructions[1]) & instructions[2]


@needs_data
@pytest.mark.filterwarnings("error:.*the published file has")
def test_real_alpaca_eval_is_a_set_of_prompts():
    prompts = load_task("alpaca_eval", "test", DATA)
    assert len(prompts) == 805 and all(e.response and e.fields["input"] == "" for e in prompts)
    with pytest.raises(UserError, match="alpaca_eval has no train rows; it is a set of prompts"):
        load_task("alpaca_eval", "train", DATA)


@needs_data
def test_the_counts_are_those_of_the_datas_own_readme():
    """PUBLISHED, which the files are held to above, against the table beside them."""
    told = dict(re.findall(r"^\| (\w+) \|.*\| ([\d, /]+) \|$", (Path(DATA) / "README.md").read_text(), re.M))
    counts = {task: [int(n.replace(",", "")) for n in row.split("/")] for task, row in told.items()}
    assert counts.pop("alpaca") == [52002] and counts.pop("alpaca_eval") == [805]
    smaller = {"winogrande": [640]}  # train_s, beside the train_m that is read
    assert counts == {
        task: smaller.get(task, []) + [n for n in rows if n is not None] for task, rows in PUBLISHED.items()
    }


@needs_data
def test_real_boolq_has_no_training_file():
    with pytest.raises(UserError, match=r"boolq, train: no train\.jsonl in .*boolq"):
        load_task("boolq", "train", DATA)


@needs_data
def test_real_first_rows():
    first = load_task("arc_easy", "test", DATA)[0]
    assert first.response == "Sunlight is the source of energy for nearly all ecosystems."
    assert first.id == "Mercury_417466"
    winogrande = load_task("winogrande", "train", DATA), load_task("winogrande", "calibration", DATA)
    assert not {e.choices for e in winogrande[0]} & {e.choices for e in winogrande[1]}
    anatomy = next(e for e in load_task("mmlu", "test", DATA) if e.fields["subject"] == "anatomy")
    assert len(anatomy.choices) == 4
    piqa = load_task("piqa", "test", DATA)
    assert [e.answer for e in piqa[:3]] == [0, 1, 1]
    siqa = load_task("siqa", "test", DATA)
    assert [e.answer for e in siqa[:3]] == [2, 0, 1]
    assert {len(e.choices) for e in load_task("arc_challenge", "test", DATA)} == {3, 4, 5}


# Small files in the original formats.


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def arc(identity: str, labels: str = "ABCD", key: str = "B", question: str = "q") -> dict:
    choices = {"text": [f"text {label}" for label in labels], "label": list(labels)}
    return {"id": identity, "question": question, "choices": choices, "answerKey": key}


PIQA = {"goal": "open a jar", "sol1": "twist", "sol2": "sing"}
SIQA = {"context": "c", "question": "q?", "answerA": "a", "answerB": "b", "answerC": "c"}
WINOGRANDE = {"qID": "X-1", "sentence": "the _ fell", "option1": "cup", "option2": "mat", "answer": "2"}
OPENBOOK = {
    "id": "7-1",
    "question": {"stem": "fog is", "choices": [{"text": "wet", "label": "A"}, {"text": "dry", "label": "B"}]},
    "answerKey": "A",
}
BOOLQ = {"question": "is it so", "title": "t", "answer": False, "passage": "it is not so"}
ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}

FORMATS = {
    "piqa": ("valid.jsonl", PIQA, ({"goal": "open a jar"}, ("twist", "sing"), 1)),
    "siqa": ("dev.jsonl", SIQA, ({"context": "c", "question": "q?"}, ("a", "b", "c"), 0)),
    "winogrande": ("dev.jsonl", WINOGRANDE, ({"sentence": "the _ fell"}, ("cup", "mat"), 1)),
    "arc_easy": ("test.jsonl", arc("m", "123", "3"), ({"question": "q"}, ("text 1", "text 2", "text 3"), 2)),
    "openbookqa": ("test.jsonl", OPENBOOK, ({"question": "fog is"}, ("wet", "dry"), 0)),
    "boolq": ("dev.jsonl", BOOLQ, ({"passage": "it is not so", "question": "is it so"}, ("yes", "no"), 1)),
    "mmlu": (
        "test/high_school_physics_test.csv",
        '"a ""b"", c",1,2,3,4,D',
        ({"subject": "high school physics", "question": 'a "b", c'}, ("1", "2", "3", "4"), 3),
    ),
}


@pytest.mark.parametrize("task", FORMATS)
def test_each_format_gives_its_example(task, tmp_path):
    name, row, (fields, choices, answer) = FORMATS[task]
    write(tmp_path / task / name, row)
    write(tmp_path / task / name.replace(".jsonl", "-labels.lst"), "1") if task in ("piqa", "siqa") else None
    (example,) = load_task(task, "test", tmp_path)
    assert (example.task, example.fields, example.choices, example.answer) == (task, fields, choices, answer)
    assert example.response == choices[answer]


def test_alpaca_format_and_its_cuts(tmp_path):
    rows = [{**ALPACA, "instruction": f"Say {i // 2}", "output": f"out {i}"} for i in range(100)]
    path = tmp_path / "alpaca" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows, indent=4))
    loaded = {split: read_task("alpaca", split, tmp_path) for split in ("train", "calibration", "test")}
    assert [len(part.examples) for part in loaded.values()] == [80, 10, 10]
    assert sorted(e.response for p in loaded.values() for e in p.examples) == sorted(
        r["output"] for r in rows
    )
    said = [{e.fields["instruction"] for e in part.examples} for part in loaded.values()]
    assert not said[0] & said[1] and not said[0] & said[2] and not said[1] & said[2]
    cuts = loaded["test"].source["cuts"]
    assert [rows[i]["output"] for i in cuts["test"]] == [e.response for e in loaded["test"].examples]
    assert cuts == loaded["train"].source["cuts"] and cuts["seed"] == 0


@given(groups=st.lists(st.integers(0, 30), min_size=10, max_size=60))
@settings(max_examples=20, deadline=None)
def test_cuts_partition_the_rows_and_split_no_group(groups, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "arc_easy" / "train.jsonl", *[arc(str(i), question=str(g)) for i, g in enumerate(groups)])
    train, calibration = (load_task("arc_easy", split, folder) for split in ("train", "calibration"))
    assert sorted(int(e.id) for e in [*train, *calibration]) == list(range(len(groups)))
    assert not {e.fields["question"] for e in train} & {e.fields["question"] for e in calibration}
    assert len(calibration) >= len(groups) // 10


def test_winogrande_twins_stay_together_and_the_largest_train_file_is_read(tmp_path):
    twins = [{**WINOGRANDE, "option1": f"{cup} {i}"} for i in range(20) for cup in ("Cup", "cup")]
    write(tmp_path / "winogrande" / "train_m.jsonl", *twins)
    write(tmp_path / "winogrande" / "train_s.jsonl", *twins[:4])
    train, calibration = (read_task("winogrande", split, tmp_path) for split in ("train", "calibration"))
    assert train.source["file"] == "train_m.jsonl"
    pairs = [{e.choices[0].lower() for e in part.examples} for part in (train, calibration)]
    assert len(calibration.examples) == 4 and not pairs[0] & pairs[1]


def test_mmlu_without_auxiliary_train_says_that_it_trains_on_dev(tmp_path):
    write(tmp_path / "mmlu" / "dev" / "anatomy_dev.csv", *["q,1,2,3,4,A"] * 10)
    assert "trains on its dev questions" in read_task("mmlu", "train", tmp_path).source["notes"][0]
    write(tmp_path / "mmlu" / "auxiliary_train" / "race.csv", *[f"q{i},1,2,3,4,A" for i in range(20)])
    auxiliary = read_task("mmlu", "train", tmp_path)
    assert auxiliary.source["file"] == "auxiliary_train"
    assert {e.fields["subject"] for e in auxiliary.examples} == {""}
    assert render(auxiliary.examples[0]).prompt.startswith("question : q")
    assert "Subject" not in render(auxiliary.examples[0], "dllm").prompt


@pytest.mark.filterwarnings("error")
def test_samsum_and_the_cleaned_alpaca(tmp_path):
    rows = [
        {"id": str(i), "dialogue": f"Bo: hi {i}\r\nAl: hi", "summary": f"greeting {i}"} for i in range(20)
    ]
    for name in ("train", "val", "test"):
        write(tmp_path / "samsum" / f"{name}.json", json.dumps(rows))
    with pytest.warns(UserWarning, match="the published file has 14732"):
        train = load_task("samsum", "train", tmp_path)
    with pytest.warns(UserWarning, match="the published file has 819"):
        test = load_task("samsum", "test", tmp_path)
    assert (len(train), len(test), test[3].id, test[3].response) == (18, 20, "3", "greeting 3")
    assert test[0].fields == {"dialogue": "Bo: hi 0\nAl: hi"}
    assert render(test[0]).prompt == "dialogue : Bo: hi 0\nAl: hi summary :"
    assert "### Input:\nBo: hi 0" in render(test[0], "dllm").prompt
    write(
        tmp_path / "alpaca" / "alpaca_data_cleaned.json",
        json.dumps([{**ALPACA, "instruction": str(i), "output": "clean"} for i in range(20)]),
    )
    with pytest.raises(UserError, match=r"no train\.json or alpaca_data\.json"):
        load_task("alpaca", "test", tmp_path)
    with pytest.warns(UserWarning, match="the published file has 51760"):
        cleaned = load_task("alpaca", "test", tmp_path, alpaca="cleaned")
    assert {(e.task, e.response) for e in cleaned} == {("alpaca", "clean")}


@pytest.mark.filterwarnings("default")
def test_a_short_file_is_a_warning_and_a_note(tmp_path):
    write(tmp_path / "boolq" / "dev.jsonl", BOOLQ)
    with pytest.warns(UserWarning, match="has 1 rows; the published file has 3270"):
        loaded = read_task("boolq", "test", tmp_path)
    assert loaded.source["notes"] == ["dev.jsonl has 1 rows; the published file has 3270"]


DAMAGE = {
    "truncated line": (
        "boolq",
        "dev.jsonl",
        [BOOLQ, json.dumps(BOOLQ)[:40]],
        r"dev\.jsonl, line 2: damaged JSON",
    ),
    "not an object": ("boolq", "dev.jsonl", ["[1]"], r"dev\.jsonl, line 1: not a JSON object"),
    "missing key": (
        "boolq",
        "dev.jsonl",
        [BOOLQ, {"question": "q", "answer": True}],
        r"line 2: the key 'passage'",
    ),
    "not text": ("boolq", "dev.jsonl", [{**BOOLQ, "passage": 3}], r'line 1: "passage" is not text'),
    "wrong label": (
        "boolq",
        "dev.jsonl",
        [{**BOOLQ, "answer": "yes"}],
        r"line 1: label 'yes' is not one of True",
    ),
    "no such choice": (
        "arc_easy",
        "test.jsonl",
        [arc("a"), arc("b", key="F")],
        r"line 2: label 'F' is not one of A",
    ),
    "labels differ": (
        "arc_easy",
        "test.jsonl",
        [{**arc("a"), "choices": {"text": ["x"], "label": ["A", "B"]}}],
        "line 1: 1 choices but 2 labels",
    ),
    "no blank": (
        "winogrande",
        "dev.jsonl",
        [{**WINOGRANDE, "sentence": "it fell"}],
        r'line 1: .*not exactly one "_"',
    ),
    "columns": (
        "mmlu",
        "test/anatomy_test.csv",
        ["q,1,2,3,4,A", "q,1,2"],
        r"anatomy_test\.csv, line 2: 3 columns",
    ),
    "open quote": (
        "mmlu",
        "test/anatomy_test.csv",
        ["q,1,2,3,4,A", '"q,1,2'],
        r"anatomy_test\.csv, line 2: ",
    ),
    "bad letter": (
        "mmlu",
        "test/anatomy_test.csv",
        ["q,1,2,3,4,E"],
        r"line 1: label 'E' is not one of A, B, C, D",
    ),
    "empty": ("boolq", "dev.jsonl", [""], r"line 1: damaged JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_file_line_and_reason(case, tmp_path):
    task, name, rows, message = DAMAGE[case]
    path = write(tmp_path / task / name, *rows)
    with pytest.raises(UserError, match=message) as caught:
        load_task(task, "test", tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0", "1"], r"valid-labels\.lst, line 3: 2 labels for the 3 rows of valid\.jsonl"),
        (["0", "1", "1", "0"], r"valid-labels\.lst, line 4: 4 labels for the 3 rows"),
        (["0", "x", "1"], r"valid-labels\.lst, line 2: label 'x' is not a number"),
        (["0", "2", "1"], r"valid\.jsonl, line 2 \(label in valid-labels\.lst\): label 2 is not one of 0, 1"),
        (None, r"valid-labels\.lst is missing"),
    ],
)
def test_damaged_label_files(labels, message, tmp_path):
    write(tmp_path / "piqa" / "valid.jsonl", PIQA, PIQA, PIQA)
    if labels:
        write(tmp_path / "piqa" / "valid-labels.lst", *labels)
    with pytest.raises(UserError, match=message):
        load_task("piqa", "test", tmp_path)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda text: text[:-20], r"train\.json, line 15: damaged JSON"),
        (lambda text: text.rstrip("\n]"), r"train\.json, line 16: not a whole JSON array"),
        (
            lambda text: text.replace('"output"', '"reply"'),
            r"train\.json, line 2: the key 'output' is missing",
        ),
        (lambda text: "{}", r"train\.json, line 1: not a whole JSON array"),
    ],
)
def test_damaged_alpaca_array(cut, message, tmp_path):
    text = json.dumps([{**ALPACA, "instruction": str(i)} for i in range(3)], indent=2)
    write(tmp_path / "alpaca" / "train.json").write_text(cut(text))
    with pytest.raises(UserError, match=message):
        load_task("alpaca", "train", tmp_path)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match='no task "hellaswag"'):
        load_task("hellaswag", "test", tmp_path)
    with pytest.raises(UserError, match='no split "dev"'):
        load_task("piqa", "dev", tmp_path)
    with pytest.raises(UserError, match=r"arc_easy, test: no test\.jsonl in .*arc_easy"):
        load_task("arc_easy", "test", tmp_path)
    with pytest.raises(UserError, match="piqa has no labelled validation file"):
        load_task("piqa", "validation", tmp_path)
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "dev.jsonl").write_bytes(json.dumps(BOOLQ).encode() + b"\n\xff\n")
    with pytest.raises(UserError, match=r"dev\.jsonl, line 2: not UTF-8"):
        load_task("boolq", "test", tmp_path)


def test_an_answer_outside_the_choices_is_no_example():
    with pytest.raises(ValueError, match="answer 2 is outside its 2 choices"):
        Example("x", "piqa", {"goal": "g"}, ("a", "b"), 2)


def test_subset_is_seeded_spread_and_ordered():
    examples = [Example(str(i), "boolq", {}, ("yes", "no"), 0) for i in range(1000)]
    chosen = [int(e.id) for e in subset(examples, 100)]
    assert chosen == sorted(set(chosen)) and len(chosen) == 100 and chosen[-1] > 900
    assert chosen == [int(e.id) for e in subset(examples, 100)]
    assert chosen != [int(e.id) for e in subset(examples, 100, seed=1)]
    assert subset(examples, None) == subset(examples, 5000) == examples


def test_subset_takes_as_many_distinct_facts_as_there_are():
    def example(index: int, *facts: str) -> Example:
        return Example(str(index), "boolq", {}, ("yes", "no"), 0, facts=facts)

    examples = [example(i, f"fact{i % 40}") for i in range(400)]
    met = [e.facts[0] for e in subset(examples, 100)]
    assert {met.count(fact) for fact in met} == {2, 3} and len(set(met)) == 40
    pairs = [example(i, f"person{i}", f"town{i % 7}") for i in range(400)]
    towns = [e.facts[1] for e in subset(pairs, 70)]
    assert {towns.count(town) for town in towns} == {10}


@pytest.mark.parametrize("task", ["piqa", "boolq", "siqa", "arc_easy", "arc_challenge", "openbookqa", "mmlu"])
def test_a_thousand_training_rows_rest_on_a_thousand_facts(task):
    facts = {fact for e in subset(load_task(task, "train"), 1000) for fact in e.facts}
    assert len(facts) >= 990  # openbookqa's 4,000 rows rest on 999


def test_data_hash_sees_content_and_order():
    one, two = (Example(i, "boolq", {"question": "q"}, ("yes", "no"), 0) for i in "12")
    other = Example("1", "boolq", {"question": "q!"}, ("yes", "no"), 0)
    hashes = {data_hash(rows) for rows in ([one, two], [two, one], [one], [other, two])}
    assert len(hashes) == 4 and data_hash([one, two]) in hashes


# Encoding.


def question(words: int = 3, choices: tuple[str, ...] = ("w1", "w2 w3")) -> Example:
    return Example("q", "arc_easy", {"question": " ".join(WORDS[:words])}, choices, 1)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_encode_labels_the_response_and_the_end(bos, eos):
    tokenizer = word_tokenizer(bos, eos)
    row = encode(question(), tokenizer)
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    prompt = ["question", ":", "w0", "w1", "w2", "answer", ":"]
    assert words == ["<s>"] * bos + prompt + ["w2", "w3"] + ["</s>"] * eos
    assert row["labels"] == [IGNORED] * (bos + len(prompt)) + row["input_ids"][bos + len(prompt) :]


def test_overlong_rows_are_dropped_or_cut_and_counted():
    tokenizer, examples = word_tokenizer(), [question(3), question(20), question(3, ("w1", "w2 " * 40))]
    length = len(encode(examples[0], tokenizer)["input_ids"])
    kept, report = encode_all(examples, tokenizer, max_length=length, overlong="drop")
    assert report == {"used": 1, "dropped": 2, "cut": 0} and len(kept) == 1
    kept, report = encode_all(examples, tokenizer, max_length=length, overlong="cut")
    assert report == {"used": 2, "dropped": 1, "cut": 1}
    whole, cut = encode(examples[1], tokenizer)["input_ids"], kept[1]["input_ids"]
    assert cut == [tokenizer.bos_token_id, *whole[1 - length :]] and len(cut) == length
    assert kept[1]["labels"][-3:] == whole[-3:]
    assert encode(examples[1], tokenizer, max_length=length) is None
    with pytest.raises(UserError, match='overlong is "keep"'):
        encode(examples[0], tokenizer, overlong="keep")


def test_collate_pads_on_the_right_with_a_mask():
    batch = collate(
        [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}], 9
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@needs_models
@pytest.mark.parametrize("style", ["compact", "dllm"])
def test_a_sentencepiece_boundary_loses_nothing(style):
    tokenizer = AutoTokenizer.from_pretrained(Path(MODELS) / "stories260K")
    example = Example("q", "arc_easy", {"question": "Why did Tim cry?"}, ("He was sad.", "It was big."), 0)
    text = render(example, style)
    row = encode(example, tokenizer, style)
    assert row["input_ids"] == [
        *tokenizer(f"{text.prompt} {text.target}")["input_ids"],
        tokenizer.eos_token_id,
    ]
    answer = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(answer[:-1]).strip() == text.target
    ((prompt, continuation),) = encode_pairs(tokenizer, [(text.prompt, f" {text.target}")])
    assert prompt + continuation == row["input_ids"][:-1] and continuation == answer[:-1]
