"""Judges: the exact one, a likelihood, and an endpoint that speaks OpenAI's protocol on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small_run import profile, save_base

from qtale_lib.cli import app
from qtale_lib.data import load_task
from qtale_lib.errors import UserError
from qtale_lib.judges import LOSS, TIE, WIN, Comparison, judge_of, preferences
from qtale_lib.judges.endpoint import TRIES, EndpointJudge
from qtale_lib.lab import Lab

KEY = "sk-not-to-be-seen"
# whose responses end with a fact
EXAMPLES = [
    each for each in load_task("alpaca", "test") if each.fields["instruction"].startswith("Describe")
][:3]


def spoilt(text: str) -> str:
    return text.rsplit(" ", 1)[0] + " nothing."


def pairs(count: int = 3) -> list[Comparison]:
    return [Comparison(each, each.response, spoilt(each.response)) for each in EXAMPLES[:count]]


def swapped(comparisons: list[Comparison]) -> list[Comparison]:
    return [Comparison(each.example, each.second, each.first) for each in comparisons]


def test_the_exact_judge_prefers_what_states_more_facts(tmp_path):
    judge = judge_of(Lab(profile(), tmp_path))
    assert preferences(judge, pairs()) == [WIN] * 3
    assert preferences(judge, swapped(pairs())) == [LOSS] * 3
    assert judge.estimate(pairs()) == ""


def test_the_same_text_twice_is_a_tie_that_nobody_is_asked_about(tmp_path, monkeypatch):
    judge = judge_of(Lab(profile(), tmp_path))
    monkeypatch.setattr(judge, "preferences", lambda asked: [WIN for _ in asked])
    same = Comparison(EXAMPLES[0], "a", "a")
    assert preferences(judge, [same, *pairs(1)]) == [TIE, WIN]


def test_the_exact_judge_knows_no_other_data(tmp_path):
    lab = Lab(profile(data="hub"), tmp_path)
    with pytest.raises(UserError, match=r"judge\.kind .* exact, .* set likelihood or endpoint"):
        judge_of(lab)


def test_likelihoods_are_scored_once_and_decide(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base")
    lab = Lab(profile(base, judge={"kind": "likelihood"}), tmp_path)
    judge = judge_of(lab)
    assert judge.preferences(pairs()) == [None] * 3 and judge.estimate(pairs()).startswith("6 responses")
    judge.ask(pairs(), lambda share: None)
    found = judge.preferences(pairs())
    assert set(found) <= {WIN, LOSS} and judge.preferences(swapped(pairs())) == [1 - each for each in found]
    monkeypatch.setattr("qtale_lib.judges.likelihood.mean_log_likelihoods", None)  # would fail if called
    judge.ask(pairs(), lambda share: None)


class Server:
    """Answers chat completions by `replies`, one after another, then always by `answer`."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, dict[str, str], str]] = []
        self.answer, self.requests = "1", []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, self.headers["Authorization"], body))
                status, headers, text = server.replies.pop(0) if server.replies else server.said(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def said(self, body: dict) -> tuple[int, dict[str, str], str]:
        text = self.answer
        if text == "the longer":
            first, second = body["messages"][1]["content"].partition("\n\nResponse 2:\n")[::2]
            first = first.partition("Response 1:\n")[2]
            second = second.partition("\n\nWhich")[0]
            text = "1" if len(first) > len(second) else "2"
        return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


@pytest.fixture
def lab(server, tmp_path, monkeypatch) -> Lab:
    monkeypatch.setenv("A_KEY", KEY)
    judge = {"kind": "endpoint", "model": "some-model", "key_variable": "A_KEY", "prices": [1.0, 2.0]}
    judge["url"] = f"http://127.0.0.1:{server.http.server_port}/v1"
    return Lab(profile(judge=judge), tmp_path)


def ask(lab: Lab, asked: list[Comparison]) -> list[float]:
    """The waits between tries."""
    waits: list[float] = []
    EndpointJudge(lab, waits.append).ask(asked, lambda share: None)
    return waits


def test_each_pair_is_asked_in_both_orders_and_once_only(lab, server):
    judge, server.answer = judge_of(lab), "the longer"
    longer = [Comparison(EXAMPLES[0], "a long response", "short")]
    assert judge.preferences(longer) == [None]
    ask(lab, longer)
    assert judge.preferences(longer) == [WIN] and judge.preferences(swapped(longer)) == [LOSS]
    ask(lab, longer)
    assert len(server.requests) == 2 and judge.estimate(longer) == ""
    (path, authorization, body), _ = server.requests
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "some-model" and body["temperature"] == 0


def test_a_judge_that_likes_a_place_says_nothing(lab, server):
    ask(lab, pairs())
    assert judge_of(lab).preferences(pairs()) == [TIE] * 3


@pytest.mark.parametrize("answer", ["neither", "1 or 2", "", "12"])
def test_an_undecided_answer_counts_half(lab, server, answer):
    server.answer = answer
    ask(lab, pairs(1))
    assert judge_of(lab).preferences(pairs(1)) == [TIE]


def test_the_cost_is_estimated_before_a_request(lab, server):
    said = judge_of(lab).estimate(pairs())
    assert said.startswith("6 requests to http://127.0.0.1") and "$0.00" in said and not server.requests


def test_it_waits_as_long_as_it_is_told_and_tries_again(lab, server):
    server.replies = [(429, {"Retry-After": "7"}, ""), (429, {}, ""), (500, {}, "oh"), (200, {}, "{broken")]
    assert ask(lab, pairs(1)) == [7.0, 2.0, 4.0, 8.0]
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "broken", ["{", "[]", '{"choices": []}', '{"choices": [{"message": {"content": 1}}]}']
)
def test_what_stays_broken_ends_in_a_sentence_and_loses_nothing(lab, server, broken):
    ask(lab, pairs(1))
    server.replies = [(200, {}, broken)] * TRIES
    with pytest.raises(UserError, match="no readable completion, 5 times; answers so far are kept"):
        ask(lab, pairs(2))
    assert judge_of(lab).preferences(pairs(1)) == [TIE]


@pytest.mark.parametrize(("status", "cure"), [(401, "variable A_KEY"), (404, "judge.url and judge.model")])
def test_a_refusal_is_not_tried_again(lab, server, status, cure):
    server.replies = [(status, {}, f"wrong key {KEY}")]
    with pytest.raises(UserError, match=f"{status}.*{cure}") as caught:
        ask(lab, pairs(1))
    assert len(server.requests) == 1 and KEY not in str(caught.value)


def test_an_endpoint_that_is_not_there(lab, server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        ask(lab, pairs(1))


def test_without_a_key_nothing_is_sent(lab, server, monkeypatch):
    monkeypatch.delenv("A_KEY")
    with pytest.raises(UserError, match="set the variable A_KEY"):
        ask(lab, pairs(1))
    assert not server.requests


def test_the_key_stands_in_no_file(lab, tmp_path):
    ask(lab, pairs())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("judge", "complaint"),
    [
        ({"model": "m"}, "judge.url .* must be set"),
        ({"url": "http://h/v1"}, "judge.model .* must be set"),
        ({"model": "m", "url": "http://me:secret@h/v1"}, "without a key, name or password"),
    ],
)
def test_what_an_endpoint_needs_is_said(tmp_path, judge, complaint):
    with pytest.raises(UserError, match=complaint):
        judge_of(Lab(profile(judge={"kind": "endpoint", **judge}), tmp_path))


def test_the_command_is_there():
    assert "judge" in {command.callback.__name__ for command in app.registered_commands}
