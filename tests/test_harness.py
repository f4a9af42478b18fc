"""lm-eval's own tasks, its configs whole, on local rows in the place of its datasets."""

import datasets
import pytest
from lm_eval import api
from small_models import TOKENIZER, WORDS, routed_llama, tiny_llama

from qtale_lib.adaptive import set_threshold
from qtale_lib.config import TASKS, load_profile
from qtale_lib.data.encoding import encode_pairs
from qtale_lib.errors import UserError
from qtale_lib.evaluation import score
from qtale_lib.harness import TASKS as OWN
from qtale_lib.harness import evaluate_own_task
from qtale_lib.lab import Lab

COUNT = 6


def words(index: int, count: int = 3) -> str:
    return " ".join(WORDS[(7 * index + k) % len(WORDS)] for k in range(count))


def row(task: str, i: int) -> dict:
    """A made-up row in the columns of the dataset that lm-eval's task reads."""
    four = [words(i + k, 1 + k % 2) for k in range(4)]
    return {
        "piqa": {"goal": words(i), "sol1": four[0], "sol2": four[1], "label": i % 2},
        "boolq": {"passage": words(i, 5), "question": words(i + 9), "label": i % 2},
        "siqa": {"context": words(i), "question": words(i + 1), "answerA": four[0], "answerB": four[1],
                 "answerC": four[2], "label": str(1 + i % 3)},
        "arc": {"question": words(i), "choices": {"text": four, "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4]},
        "winogrande": {"sentence": f"{words(i)} _ {words(i + 5)}", "option1": four[0], "option2": four[1],
                       "answer": str(1 + i % 2)},
        "openbookqa": {"question_stem": words(i), "choices": {"text": four, "label": list("ABCD")},
                       "answerKey": "ABCD"[i % 4]},
        "mmlu": {"question": words(i), "choices": four, "answer": i % 4},
    }["arc" if task.startswith("arc") else task]  # fmt: skip


@pytest.fixture
def local(monkeypatch):
    """Every dataset that lm-eval asks for is made of made-up rows; what it asked for is kept."""
    asked, wanted = [], {}

    def load(path, name=None, **_):
        asked.append((path, name))
        rows = datasets.Dataset.from_list([row(wanted["task"], i) for i in range(COUNT)])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), rows))

    monkeypatch.setattr(api.task.datasets, "load_dataset", load)
    wanted["asked"] = asked
    return wanted


@pytest.mark.parametrize("task", OWN)
def test_every_task_is_scored_by_its_own_config(task, local):
    local["task"] = task
    model = routed_llama()
    set_threshold(model, 0.5)
    found = evaluate_own_task(model, TOKENIZER, task, batch_size=8)
    subjects = 57 if task == "mmlu" else 1
    assert found["count"] == COUNT * subjects == len(found["correct"]) == len(set(found["ids"]))
    assert found["acc"] == pytest.approx(sum(found["correct"]) / found["count"])
    assert 0 < found["execution_ratio"] < 1 and found["nll"] > 0
    assert (found["protocol"]["name"], found["protocol"]["task"]) == ("lm_eval", OWN[task][0])
    assert local["asked"] and all(path.count("/") == 1 for path, _ in local["asked"])


def test_its_answers_are_those_of_plain_scoring(local):
    local["task"] = "piqa"
    model = tiny_llama(len(TOKENIZER))
    found = evaluate_own_task(model, TOKENIZER, "piqa")
    for index, right in enumerate(found["correct"]):
        asked = row("piqa", index)
        texts = [(f"Question: {asked['goal']}\nAnswer:", f" {asked[name]}") for name in ("sol1", "sol2")]
        first, second = (v.sum() for v in score(model, encode_pairs(TOKENIZER, texts)).log_probabilities)
        assert right == int((second > first) == bool(asked["label"]))


def test_a_limit_takes_the_first_rows_and_the_hub_may_be_away(local, monkeypatch):
    local["task"] = "boolq"
    assert evaluate_own_task(tiny_llama(len(TOKENIZER)), TOKENIZER, "boolq", limit=2)["count"] == 2
    with pytest.raises(UserError, match="lm-eval has no task for alpaca"):
        evaluate_own_task(tiny_llama(len(TOKENIZER)), TOKENIZER, "alpaca")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(api.task.datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="boolq: the dataset of lm-eval's task boolq cannot be had"):
        evaluate_own_task(tiny_llama(len(TOKENIZER)), TOKENIZER, "boolq")


def test_the_protocol_enters_only_the_keys_of_evaluations_that_it_alters(tmp_path):
    assert set(OWN) == set(TASKS) - {"alpaca"}
    spec = {"task": "piqa", "method": "full", "seed": 0, "bits": 4, "theta": "none"}
    usual, own = (Lab(load_profile("tiny", protocol=name), tmp_path) for name in ("likelihood", "lm_eval"))
    assert "protocol" not in usual.settings("evaluation", spec)
    assert own.settings("evaluation", spec)["protocol"] == "lm_eval"
    for kind in ("finetune", "quantization", "threshold"):
        assert own.settings(kind, spec) == usual.settings(kind, spec)
