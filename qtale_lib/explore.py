"""Notebook 13: a text of yours read by two models side by side, at the bits and θ of your choice.

A model is loaded when it is first asked for, and kept: a change of text or θ costs its passes and a picture.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, Template
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qtale_lib import figures
from qtale_lib.adaptive import routing_state, set_threshold, skipping_if_auto
from qtale_lib.config import Profile
from qtale_lib.data.prompts import render
from qtale_lib.efficiency import flops_per_token
from qtale_lib.errors import UserError
from qtale_lib.evaluation import hidden_states
from qtale_lib.explore_figures import COLUMNS, SIDES, explored
from qtale_lib.generation import prompt_ids
from qtale_lib.jobs import ROUTED, Run, probed_task
from qtale_lib.lab import Lab, run_spec
from qtale_lib.measurements import quantized_bits
from qtale_lib.paper import METHODS, TASK_LABELS
from qtale_lib.stages import be_quiet, prepared_model
from qtale_lib.store import digest
from qtale_lib.tables import Table, number

PASSES = 3  # of which the median time is told
LIKELIEST = 3  # next tokens shown of each model
READINGS = 64  # kept
MEGA = 10**6
PICTURE = Path(__file__).with_name("explore.svg.j2")
*_, BLUE, RED = figures.PALETTES["okabe-ito"]
COLOURS = {"full": "#9a9a9a", "left": RED, "right": BLUE}
WHOLE, HALF = widgets.Layout(width="98%"), widgets.Layout(width="50%")
FITTING = widgets.Layout(width="max-content")


@dataclass(frozen=True)
class Choice:
    """A fine-tuned model at a bit width; theta None without routers."""

    task: str
    method: str
    bits: int
    theta: float | None = None

    @property
    def title(self) -> str:
        """As readers see it."""
        at = "" if self.theta is None else f", θ {self.theta:.2f}"
        return f"{METHODS[self.method]}, {self.bits} bits{at}"


@dataclass(frozen=True)
class Reading:
    """What a model did with a text of T tokens.

    tokens: as its tokenizer writes them. executed: bool [layers, T]. following: probability of every token of
    the vocabulary to come next, float32 [V]. flops: of a token, routers and lm_head included; share: of a
    token's without routers and with every layer. seconds: of a pass that computes no bypassed layer, median
    of PASSES.
    """

    choice: Choice
    tokenizer: PreTrainedTokenizerBase
    tokens: list[str]
    executed: np.ndarray
    following: np.ndarray
    flops: float
    share: float
    seconds: float

    @property
    def heading(self) -> str:
        """Which model, and its R."""
        return f"{self.choice.title}\nR {100 * self.execution_ratio:.1f} %"

    @property
    def execution_ratio(self) -> float:
        """R of this text, over all its tokens and layers."""
        return float(self.executed.mean())

    def away_from(self, other: Reading | None) -> float:
        """Total variation distance of what is expected next: 0 for the same, 1 for nothing in common."""
        return nan if other is None else 0.5 * float(np.abs(self.following - other.following).sum())

    @property
    def likeliest(self) -> np.ndarray:
        """Numbers of the next tokens that are expected most, [LIKELIEST]."""
        return np.argsort(-self.following, kind="stable")[:LIKELIEST]


class Reader:
    """Reads texts by the runs of a profile's first seed."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        kept = None if lab.is_small() else len(SIDES) + 1
        self._model = functools.lru_cache(kept)(self._loaded)
        self.read = functools.lru_cache(READINGS)(self._read)

    def full(self, task: str, text: str) -> Reading | None:
        """The text read by Full in 16 bits; None where the profile has no such run."""
        profile = self.lab.profile
        known = "full" in profile.methods and 16 in profile.bits
        return self.read(Choice(task, "full", 16), text) if known else None

    def _loaded(self, task: str, method: str, bits: int) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        run = Run(task, method, self.lab.profile.seeds[0])
        self.lab.result("finetune", **run_spec(run))
        if bits < 16:
            self.lab.result("quantization", **run_spec(run, bits=bits))
        be_quiet()
        return prepared_model(self.lab, run, bits)

    def _read(self, choice: Choice, text: str) -> Reading:
        """UserError for an empty or too long text, and where the run is not in the store."""
        model, tokenizer = self._model(choice.task, choice.method, choice.bits)
        ids, room = prompt_ids(tokenizer, [text])[0], model.config.max_position_embeddings
        if not text.strip():
            raise UserError("The text is empty; type one.")
        if len(ids) > room:
            raise UserError(f"The text has {len(ids)} tokens, and the model room for {room}; shorten it.")
        routers = None
        if choice.theta is not None:
            set_threshold(model, choice.theta)
            routers = routing_state(model).config
        executed, following, seconds = _passes(model, ids)
        flops = flops_per_token(model.config, float(executed.mean()), routers)["total"]
        share = flops / flops_per_token(model.config)["total"]
        tokens = [_written(tokenizer, number) for number in ids]
        return Reading(choice, tokenizer, tokens, executed, following, flops, share, seconds)


@torch.no_grad()
def _passes(model: nn.Module, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Executed, bool [layers, T]; the next token's probabilities, float32 [V]; seconds of a pass."""
    fed = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        with skipping_if_auto(model):
            hidden, executed = hidden_states(model, fed, torch.ones_like(fed, dtype=torch.bool))
        logits: Tensor = model.get_output_embeddings()(hidden[0, -1]).float().cpu()
        times.append(time.perf_counter() - started)
    if executed is None:
        executed = torch.ones(model.config.num_hidden_layers, 1, len(ids), dtype=torch.bool)
    return executed[:, 0].cpu().numpy(), logits.softmax(-1).numpy(), median(times)


def _written(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A token on one line."""
    return " ".join(tokenizer.decode([number]).split()) or repr(tokenizer.convert_ids_to_tokens(int(number)))


# What is shown of the readings, by "full" (where it is known), "left" and "right".

Readings = dict[str, Reading]


def frame(readings: Readings) -> pd.DataFrame:
    """Tidy, for explore_figures.explored: COLUMNS."""
    rows = [
        ("route", side, readings[side].heading, place, f"{place} {token}", layer, int(executed))
        for side in SIDES
        if side in readings
        for place, token in enumerate(readings[side].tokens)
        for layer, executed in enumerate(readings[side].executed[:, place])
    ]
    rows += [
        ("next", side, reading.choice.title, place, f"“{name}”", np.nan, reading.following[token])
        for side, reading in readings.items()
        for place, (token, name) in enumerate(_expected(readings).items())
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def table(readings: Readings, trouble: str = "") -> Table:
    """R, FLOPs and time of each reading, and how far its next token is from Full's; why there is none."""
    full = readings.get("full")
    numbers = pd.DataFrame(
        [
            (side, r.choice.title, len(r.tokens), r.execution_ratio, r.flops, r.share, r.away_from(full))
            for side, r in readings.items()
        ],
        columns=["side", "model", "tokens", "execution_ratio", "flops", "flops_share", "away"],
    )
    text = pd.DataFrame({
        "model": numbers.model,
        "R (%)": [number(100 * ratio, 1) for ratio in numbers.execution_ratio],
        "MFLOPs a token": [number(flops / MEGA, 3) for flops in numbers.flops],
        "of Full's (%)": [number(100 * share, 1) for share in numbers.flops_share],
        "pass (ms)": [number(1000 * reading.seconds, 1) for reading in readings.values()],
        "next token, from Full's (%)": [number(100 * away, 1) for away in numbers.away],
        "expected next": [_spoken(reading) for reading in readings.values()],
    })  # fmt: skip
    notes = (
        "FLOPs: with routers and lm_head. A pass goes over the whole text and skips what is bypassed; median "
        f"of {PASSES}. From Full's: total variation distance, 0 if the same, 100 if nothing in common.",
    )
    name, caption = "table_13_reading", "One text, read by two models"
    return Table(name, caption, text, numbers, ("side", "model"), (trouble,) if trouble else notes)


def _spoken(reading: Reading) -> str:
    named = ((_written(reading.tokenizer, token), reading.following[token]) for token in reading.likeliest)
    return ", ".join(f"{token} {100 * share:.0f} %" for token, share in named)


def _expected(readings: Readings) -> dict[int, str]:
    """The next tokens that any of them expects most, number and name."""
    return {
        int(token): _written(reading.tokenizer, token)
        for reading in readings.values()
        for token in reading.likeliest
    }


def picture(readings: Readings) -> str:
    """The same as SVG for the screen: made in milliseconds, where matplotlib takes half a second."""
    sides = [readings[side] for side in SIDES]
    return _template().render(
        sides=sides,
        colours=[COLOURS[side] for side in SIDES],
        bars=[(reading.choice.title, COLOURS[side]) for side, reading in readings.items()],
        expected=[
            (name, [reading.following[token] for reading in readings.values()])
            for token, name in _expected(readings).items()
        ],
        label=" beside ".join(f"Tokens by layers of {reading.heading}" for reading in sides),
    )


@functools.cache
def _template() -> Template:
    return Environment(autoescape=True, trim_blocks=True).from_string(PICTURE.read_text(encoding="utf-8"))


class Panel:
    """What notebook 13 shows: a text and two models to choose, and what comes of them.

    readings: by side, and "full" where there is such a run; none while something is missing, which `trouble`
    names.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab, self.reader = lab, Reader(lab)
        self.readings: Readings = {}
        self.trouble = ""
        profile = lab.profile
        routed = [method for method in profile.methods if method in ROUTED] or profile.methods
        tasks = [(TASK_LABELS[task], task) for task in profile.tasks]
        self.task = widgets.Dropdown(options=tasks, value=probed_task(profile), description="Run of")
        self.text = widgets.Textarea(self._first_prompt(), rows=3, description="Text", layout=WHOLE)
        self.sides = {
            side: _Side(profile, method) for side, method in zip(SIDES, (routed[0], routed[-1]), strict=True)
        }
        self.button = widgets.Button(description="Export the picture", icon="download", layout=FITTING)
        self.shown, self.said = widgets.HTML(layout=WHOLE), widgets.HTML(layout=WHOLE)
        self.task.observe(self._ask, "value")
        for chosen in (self.text, *(widget for side in self.sides.values() for widget in side.widgets)):
            chosen.observe(lambda _: self.update(), "value")
        self.button.on_click(lambda _: self.export())
        self.widget = widgets.VBox([
            self.task, self.text, widgets.HBox([side.box for side in self.sides.values()]),
            self.shown, self.button, self.said,
        ])  # fmt: skip
        self.update()

    def _first_prompt(self) -> str:
        """A question of the task that was chosen, as its runs were trained to see it."""
        example = self.lab.examples(self.task.value, self.lab.profile.evaluated)[0]
        return render(example, self.lab.profile.prompt).prompt

    def _ask(self, _: Any) -> None:
        before, self.text.value = self.text.value, self._first_prompt()
        if before == self.text.value:
            self.update()

    def update(self) -> None:
        """Read the text anew and show it; a `UserError` is shown in its place."""
        started = time.perf_counter()
        try:
            self.readings, self.trouble = self._readings(), ""
        except UserError as error:
            self.readings, self.trouble = {}, str(error)
            self.shown.value, self.said.value = f"<p role='alert'>{escape(self.trouble)}</p>", ""
            return
        self.shown.value = picture(self.readings)
        passes = " and ".join(f"{1000 * self.readings[side].seconds:.1f}" for side in SIDES)
        took = time.perf_counter() - started
        self.said.value = f"A pass takes {passes} ms; all of this was ready after {took:.2f} s."

    def _readings(self) -> Readings:
        task, text = self.task.value, self.text.value
        full = self.reader.full(task, text)
        sides = {name: self.reader.read(side.choice(task), text) for name, side in self.sides.items()}
        return {**({"full": full} if full else {}), **sides}

    @property
    def frame(self) -> pd.DataFrame:
        """What the picture shows, tidy."""
        return frame(self.readings)

    @property
    def table(self) -> Table:
        """The same in numbers."""
        return table(self.readings, self.trouble)

    def export(self) -> None:
        """Write the picture as PDF, PNG, SVG and CSV, under a name of its own."""
        if not self.readings:
            self.said.value = "There is nothing to export."
            return
        data = self.frame
        name = f"explored_{digest(data.to_csv())}"
        paths = figures.save(explored(data), data, name, self.lab.figures / "explored")
        self.said.value = f"Written: {escape(str(paths['pdf'].with_suffix('')))}.pdf, .png, .svg and .csv"


class _Side:
    """The widgets that choose one model."""

    def __init__(self, profile: Profile, method: str) -> None:
        bits = quantized_bits(profile) or profile.bits[0]
        methods = [(METHODS[name], name) for name in profile.methods]
        self.method = widgets.Dropdown(options=methods, value=method, description="Method")
        self.bits = widgets.Dropdown(options=profile.bits, value=bits, description="Bits")
        self.theta = widgets.FloatSlider(0.5, min=0, max=0.99, step=0.01, description="θ")
        self.widgets = (self.method, self.bits, self.theta)
        self.box = widgets.VBox(self.widgets, layout=HALF)
        self.method.observe(lambda _: self._enable(), "value")
        self._enable()

    def _enable(self) -> None:
        self.theta.disabled = self.method.value not in ROUTED

    def choice(self, task: str) -> Choice:
        """As the widgets stand."""
        theta = round(self.theta.value, 2) if self.method.value in ROUTED else None
        return Choice(task, self.method.value, self.bits.value, theta)
