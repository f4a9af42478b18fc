"""A model behind an OpenAI-compatible URL as judge, in AlpacaEval's manner: which response is better?

Each pair is asked twice, its positions swapped, and the two answers are averaged: a judge that likes the
first place says nothing. An answer that names neither is undecided and counts half. Every answer is kept in
the store as it comes, so that nothing is paid for twice. The key is read from the environment when a request
is sent; it stands in no result, message or error.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from qtale_lib.errors import UserError
from qtale_lib.judges import LOSS, TIE, WIN, Comparison
from qtale_lib.provenance import Stopwatch
from qtale_lib.store import digest

if TYPE_CHECKING:
    from qtale_lib.config import Judge as Settings
    from qtale_lib.lab import Lab

KIND = "judgement"  # in the store
TRIES, TIMEOUT = 5, 60.0  # requests of one answer; seconds for each
LONGEST_WAIT = 60.0  # seconds between two of them
ANSWER_TOKENS = 4
TOKEN_CHARACTERS = 4.0  # English text, about: for the estimate alone
SYSTEM = (
    "You compare two responses to an instruction. Judge which one follows the instruction better and is "
    "more correct; length is no merit. Answer with 1 or 2 alone."
)
ASKED = (
    "Instruction:\n{instruction}\n\nResponse 1:\n{first}\n\nResponse 2:\n{second}\n\nWhich is better, 1 or 2?"
)


class EndpointJudge:
    """`sleep`: waits between tries (seconds)."""

    def __init__(self, lab: Lab, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store, self.settings, self.sleep = lab.store, lab.profile.judge, sleep
        self.name = f"{self.settings.model} at {self.settings.url}"

    def preferences(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """The mean of both orders' answers; None until both are there."""
        both = [(self._stored(question(pair)), self._stored(question(swapped(pair)))) for pair in comparisons]
        return [None if None in pair else (chosen(pair[0]) + 1 - chosen(pair[1])) / 2 for pair in both]

    def estimate(self, comparisons: Sequence[Comparison]) -> str:
        """Requests, tokens and dollars, from lengths of text."""
        left = self._left(comparisons)
        sent = sum(len(part["content"]) for asked in left for part in asked) / TOKEN_CHARACTERS
        received = len(left) * ANSWER_TOKENS
        dollars = (sent * self.settings.prices[0] + received * self.settings.prices[1]) / 1e6
        if not left:
            return ""
        priced = f"${dollars:.2f}" if any(self.settings.prices) else "a cost unknown, as judge.prices are 0"
        return (
            f"{len(left)} requests to {self.settings.url} (model {self.settings.model}): about "
            f"{sent:,.0f} tokens sent and at most {received:,} received; {priced}."
        )

    def ask(self, comparisons: Sequence[Comparison], report: Callable[[float], None]) -> None:
        """Send what is left, one request after another."""
        left = self._left(comparisons)
        if not left:
            return
        chat = Chat(self.settings, self.sleep)
        with httpx.Client(timeout=TIMEOUT) as client:
            for done, asked in enumerate(left, start=1):
                watch, answer = Stopwatch(), chat.answer(client, asked)
                spec = {"judge": "endpoint", "url": self.settings.url, "model": self.settings.model}
                value = {"messages": asked, "answer": answer}
                parts = {"spec": spec, "value": value, "provenance": watch.provenance()}
                self.store.put(KIND, "endpoint", self._key(asked), **parts)
                report(done / len(left))

    def _left(self, comparisons: Sequence[Comparison]) -> list[list[dict[str, str]]]:
        """Questions without an answer, each once."""
        asked = [question(each) for pair in comparisons for each in (pair, swapped(pair))]
        return list({self._key(each): each for each in asked if self._stored(each) is None}.values())

    def _key(self, asked: list[dict[str, str]]) -> str:
        return digest(self.settings.url, self.settings.model, asked)

    def _stored(self, asked: list[dict[str, str]]) -> str | None:
        found = self.store.get(KIND, "endpoint", self._key(asked))
        return found and found["value"]["answer"]


def swapped(pair: Comparison) -> Comparison:
    """The pair in the other order."""
    return Comparison(pair.example, pair.second, pair.first)


def question(pair: Comparison) -> list[dict[str, str]]:
    """The messages that ask for a preference."""
    fields = pair.example.fields
    instruction = "\n".join(filter(None, (fields["instruction"], fields.get("input"))))
    asked = ASKED.format(instruction=instruction, first=pair.first, second=pair.second)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def chosen(answer: str) -> float:
    """WIN for "1", LOSS for "2", TIE where the answer names neither, or both."""
    named = set(re.findall(r"\b[12]\b", answer))
    return {("1",): WIN, ("2",): LOSS}.get(tuple(named), TIE)


def is_undecided(answer: str) -> bool:
    """Whether the answer names neither response, or both."""
    return chosen(answer) == TIE


@dataclass
class Chat:
    """Chat completions of one endpoint: patient where that helps, one sentence where it does not."""

    settings: Settings
    sleep: Callable[[float], None]

    def answer(self, client: httpx.Client, messages: list[dict[str, str]]) -> str:
        """The text of the model's answer.

        Raises:
            UserError: if the key is missing or refused, the request is, or TRIES of them brought no answer.
        """
        problem = ""
        for attempt in range(TRIES):
            wait = min(2.0**attempt, LONGEST_WAIT)
            try:
                response = self._post(client, messages)
            except httpx.HTTPError as error:
                problem = f"cannot be reached ({type(error).__name__})"
            else:
                problem = f"answered {response.status_code}"
                if response.status_code == 200:
                    text = _text(response)
                    if text is not None:
                        return text
                    problem = "answered with no readable completion"
                elif response.status_code == 429:
                    wait = _retry_after(response, wait)
                elif response.status_code < 500:
                    raise self._refusal(response.status_code)
            if attempt < TRIES - 1:
                self.sleep(wait)
        raise UserError(
            f"The judge at {self.settings.url} {problem}, {TRIES} times; answers so far are kept: try later."
        )

    def _post(self, client: httpx.Client, messages: list[dict[str, str]]) -> httpx.Response:
        body = {"model": self.settings.model, "messages": messages, "temperature": 0,
                "max_tokens": ANSWER_TOKENS}  # fmt: skip
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        return client.post(url, json=body, headers={"Authorization": f"Bearer {self._key()}"})

    def _key(self) -> str:
        key = os.environ.get(self.settings.key_variable, "").strip()
        if not key:
            raise UserError(f"The judge's key is missing; set the variable {self.settings.key_variable}.")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.settings.key_variable} holds no key that can be sent; set it anew.")
        return key

    def _refusal(self, status: int) -> UserError:
        if status in (401, 403):
            cure = f"set another key in the variable {self.settings.key_variable}"
        else:
            cure = "look at judge.url and judge.model"
        return UserError(f"The judge at {self.settings.url} refuses the request ({status}); {cure}.")


def _text(response: httpx.Response) -> str | None:
    """The completion's text, or None where the answer is not of that form."""
    try:
        found: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """The seconds that the answer asks to wait for, within LONGEST_WAIT; `otherwise` where it names none."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), LONGEST_WAIT) if said.isdecimal() else otherwise


def judge_of(lab: Lab) -> EndpointJudge:
    """UserError where `judge.url` or `judge.model` is not set, or the first is no plain address."""
    for name in ("url", "model"):
        if getattr(lab.profile.judge, name) is None:
            raise lab.profile.refusal(f"judge.{name}", "must be set where judge.kind is endpoint")
    if not re.fullmatch(r"https?://[^\s@?#]+", lab.profile.judge.url):
        raise lab.profile.refusal("judge.url", "must be an http address without a key, name or password")
    return EndpointJudge(lab)
