"""Times and bytes of skipping execution and packed weights, side by side in one run.

    python -m qtale_lib bench --shape tinyllama-1.1b

One random model, plain, with routers that skip, and with as large a share of its layers removed ("ideal"), in
bfloat16 and in 4 bits. Every repetition runs each variant once, in an order of its own, so that a drift of
the machine meets all alike. Prefill is one prompt's pass, with the head on the last token, as `generate` does
it; decoding is a pass of one token a row. Caches are made as `generate` makes them.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from qtale_lib.benchmark_budget import Budget, rounds
from qtale_lib.benchmark_models import (
    FORMATS,
    HEAD_BITS,
    ROUTERS,
    SHAPES,
    BenchShape,
    Family,
    draw_routes,
    group_size,
    kept_layers,
    kv_bytes,
    median_and_quartiles,
    packed_copy,
    random_model,
    routed_layers,
    weight_bytes,
)
from qtale_lib.benchmark_report import SCHEMA, blocks, lacking, targets
from qtale_lib.errors import UserError
from qtale_lib.lab import Lab
from qtale_lib.provenance import ROOT, Stopwatch, processor
from qtale_lib.quantization.packed_files import save_packed

STEPS = 4  # tokens that a variant decodes in each repetition, each timed
COPIED = 2**28  # bytes that the copy moves to measure memory bandwidth: more than any cache holds
RATIOS = (0.25, 0.5, 0.75, 1.0)
PARTS = ("passes", "training", "search", "evaluation")


@dataclass(frozen=True)
class Settings:
    """What to measure; None stands for the shape's own.

    parts: passes of inference; a training step beside plain LoRA's; the AWQ search beside autoawq's; scoring
        by a trained run of a profile.
    prefill: tokens of a prompt; decode: rows of a batch; ratios: R, the share of the routed layers that run.
    repeats: rounds over all variants; seconds: a budget for all parts, within which rounds and searches are
        left out.
    threads: of torch; None is its own choice.
    """

    shape: str = "tinyllama-1.1b"
    parts: tuple[str, ...] = PARTS
    prefill: tuple[int, ...] | None = None
    decode: tuple[int, ...] | None = None
    formats: tuple[str, ...] = FORMATS
    ratios: tuple[float, ...] = RATIOS
    repeats: int | None = None
    context: int | None = None
    threads: int | None = None
    seconds: float | None = None
    device: str | None = None
    seed: int = 0

    def complete(self) -> Settings:
        """With the shape's own values in place of None.

        Raises:
            UserError: for what cannot be measured.
        """
        if self.shape not in SHAPES:
            raise UserError(f'There is no shape "{self.shape}"; choose from {", ".join(SHAPES)}.')
        own = SHAPES[self.shape]
        names = ("prefill", "decode", "repeats", "context", "device")
        given = {name: getattr(self, name) for name in names}
        filled = {name: getattr(own, name) if value is None else value for name, value in given.items()}
        complete = Settings(**{**asdict(self), **filled})
        complete._check(own)
        return complete

    def _check(self, shape: BenchShape) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise UserError(f'--parts (= "{",".join(self.parts)}") must be among {", ".join(PARTS)}.')
        if not self.prefill and not self.decode:
            raise UserError("Neither prefill nor decoding is left to measure; give --prefill or --decode.")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise UserError(f'--formats (= "{",".join(self.formats)}") must be among {", ".join(FORMATS)}.')
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise UserError("--ratios must lie above 0 and at most at 1, such as 0.5,1.")
        for name in ("prefill", "decode"):
            if min(getattr(self, name), default=1) < 1:
                raise UserError(f"--{name} counts from 1.")
        for name in ("repeats", "context", "threads", "seconds"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"--{name} must be above 0.")
        self._check_lengths(shape)
        if self.device not in ("cpu", "cuda"):
            raise UserError(f'--device (= "{self.device}") must be cpu or cuda.')
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"Shape {self.shape} is measured on a GPU, and torch sees none; or --device cpu.")

    def _check_lengths(self, shape: BenchShape) -> None:
        """The first tokens run every layer: a short prompt cannot bypass as many as asked."""
        layers = routed_layers(shape.config())
        kept = min(kept_layers(ratio, layers) for ratio in self.ratios)
        least = -(-layers * ROUTERS.always_run_tokens // kept)
        for name, lengths in (("prefill", self.prefill), ("context", (self.context,))):
            if min(lengths, default=least) < least:
                raise UserError(
                    f"--{name} must be at least {least} tokens at R = {min(self.ratios)}: the first "
                    f"{ROUTERS.always_run_tokens} run every layer."
                )


@dataclass(frozen=True)
class Variant:
    """What one line of the result is measured on.

    kind: "plain" has no routers; "open", "random" and "layerwise" skip by forced routes (draw_routes);
        "ideal" has layers removed; "fewer rows" is the plain model on as large a share of a batch's rows:
        as many tokens a layer as in "random"; "routers" are the routers alone.
    kept: how many of the routed layers a token executes; None where that says nothing.
    """

    format: str
    kind: str
    kept: int | None = None


def variants(formats: tuple[str, ...], kept: list[int], layers: int) -> list[Variant]:
    """All that is compared, by format; with every layer kept, the ideal is the plain model."""
    found = []
    for name in formats:
        found += [Variant(name, "plain", layers), Variant(name, "routers")]
        for count in kept:
            kinds = ("open",) if count == layers else ("ideal", "fewer rows", "random", "layerwise")
            found += [Variant(name, kind, count) for kind in kinds]
    return found


@dataclass
class Subject:
    """A variant on its model: runs passes, and counts the (token, layer) pairs that they execute."""

    family: Family
    variant: Variant
    generator: torch.Generator
    pairs: int = 0
    tokens: int = 0
    cache: DynamicCache | None = None

    def __post_init__(self):
        ideal = self.family.ideal.get(self.variant.kept)
        self.forced = self.variant.kind in ("open", "random", "layerwise")
        models = {"plain": self.family.plain, "fewer rows": self.family.plain, "ideal": ideal}
        self.model = models.get(self.variant.kind, self.family.routed)

    def start(self, ids: Tensor) -> None:
        """Get ready for a prompt int64 [B, T]."""
        self.cache, self.pairs, self.tokens = None, 0, 0
        self.ready(ids, ROUTERS.always_run_tokens)

    def ready(self, ids: Tensor, reserved: int = 0) -> None:
        """Force the routes of the next pass, and count it."""
        (batch, length), layers = ids.shape, len(self.model.model.layers)
        self.tokens += ids.numel()
        if not self.forced:
            self.pairs += layers * ids.numel()
            return
        drawn = draw_routes(
            self.variant.kind, self.variant.kept, self.family.layers, batch, length, reserved, self.generator
        )
        self.family.forced.tell(drawn.to(ids.device))
        self.pairs += ROUTERS.always_run_layers * ids.numel() + int(drawn.sum())

    def run(self, ids: Tensor) -> None:
        """One pass, with the head on the last token of a row."""
        outputs = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = outputs.past_key_values


class Cell:
    """One phase at one size, such as decoding 16 rows."""

    def __init__(self, phase: str, size: int, context: int, vocabulary: int, device: str):
        self.phase, self.size, self.context, self.device = phase, size, context, device
        self.vocabulary, self.source = vocabulary, torch.Generator().manual_seed(size)

    def ids(self, batch: int, length: int) -> Tensor:
        """Random tokens, int64 [B, T]."""
        return torch.randint(self.vocabulary, (batch, length), generator=self.source).to(self.device)

    def measures(self, variant: Variant) -> bool:
        """Fewer rows than one there are none."""
        return variant.kind != "fewer rows" or (self.phase == "decode" and self.size > 1)

    def rows(self, subject: Subject) -> int:
        """Rows of a decoded batch."""
        if subject.variant.kind != "fewer rows":
            return self.size
        return max(1, round(self.size * subject.variant.kept / subject.family.layers))

    def warm_up(self, subject: Subject) -> None:
        """The first pass of a variant, untimed; decoding goes on from its cache."""
        if subject.variant.kind == "routers":
            next(self.times(subject))
            return
        prompt = (1, self.size) if self.phase == "prefill" else (self.rows(subject), self.context)
        ids = self.ids(*prompt)
        subject.start(ids)
        subject.run(ids)
        if self.phase == "decode":
            next(self.times(subject))

    def times(self, subject: Subject) -> Iterator[float]:
        """Seconds of the passes of one repetition."""
        if subject.variant.kind == "routers":
            yield from self._router_times(subject)
        elif self.phase == "prefill":
            ids = self.ids(1, self.size)
            subject.start(ids)
            yield seconds(lambda: subject.run(ids), self.device)
        else:
            for _ in range(STEPS):
                ids = self.ids(self.rows(subject), 1)
                subject.ready(ids)
                yield seconds(lambda ids=ids: subject.run(ids), self.device)

    def _router_times(self, subject: Subject) -> Iterator[float]:
        """All routers, one after the other, on hidden states of one pass."""
        shape = (1, self.size) if self.phase == "prefill" else (self.size, 1)
        width = subject.model.config.hidden_size
        states = torch.randn(*shape, width, dtype=subject.model.dtype, device=self.device)
        routers = subject.family.routers()
        subject.family.forced.tell(states.new_ones(len(routers), *shape, dtype=torch.bool))
        for _ in range(1 if self.phase == "prefill" else STEPS):
            yield seconds(lambda: [router(states) for router in routers], self.device)


def seconds(work: Callable[[], object], device: str) -> float:
    """How long the work takes, on a GPU until its last kernel has ended."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def bench(
    settings: Settings,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
    lab: Lab | None = None,
) -> dict[str, Any]:
    """Measure; returns the result, ready for JSON (benchmark_report names its parts).

    keep(result): called with the result so far after each block of passes and each other part.
    lab: whose run scores questions, in the part "evaluation"; that of tiny if not given.

    Raises:
        UserError: for settings that cannot be measured.
    """
    settings, watch = settings.complete(), Stopwatch()
    with _threads(settings.threads), torch.no_grad():
        machine = _machine(settings)
        say(f"{settings.shape} on {machine['gpu'] or machine['cpu']}, {machine['threads']} threads")
        config = SHAPES[settings.shape].config()
        result = {
            "schema": SCHEMA,
            "settings": asdict(settings),
            "shape": {"name": settings.shape, "routed_layers": routed_layers(config), "config": config},
            "machine": machine,
            "times": [],
            "weights": [],
            "memory": None,
            "training": None,
            "search": None,
            "evaluation": None,
        }
        for found in _pieces(settings, config, say, lab or Lab("tiny")):
            result |= {**found, "provenance": watch.provenance()}
            result |= {"targets": targets(result), "finished": not lacking(result)}
            keep(result)
    return result


def _pieces(
    settings: Settings, config: dict[str, Any], say: Callable[[str], None], lab: Lab
) -> Iterator[dict[str, Any]]:
    """Parts of the result, each as soon as it is measured; "times" comes again with every block of passes."""
    from qtale_lib import benchmark_work  # peft and Trainer take a while to load

    cells, tokens = blocks(asdict(settings)), SHAPES[settings.shape].trained
    others = [part for part in PARTS[1:] if part in settings.parts]
    budget = Budget(settings.seconds, len(cells) + len(others))
    clock = partial(seconds, device=settings.device)
    if cells:
        yield from _passes(cells, settings, budget, say)
    if "training" in others:
        say(f"a training step on {tokens} tokens")
        model = random_model(config, settings.device, settings.seed)
        with torch.enable_grad():
            times = benchmark_work.training_times(model, tokens, settings.repeats, clock, budget.next_end())
        yield {"training": times}
    if "search" in others:
        say("the AWQ search")
        yield {"search": benchmark_work.search_times(config, clock, budget.next_end())}
    if "evaluation" in others:
        say(f"scoring by a trained run of {lab.profile.name}")
        times = benchmark_work.evaluation_times(lab, settings.repeats, clock, budget.next_end())
        yield {"evaluation": times}


def _passes(
    cells: list[tuple[str, int]], settings: Settings, budget: Budget, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    families = _families(settings)
    memory = _memory(families["int4"], settings) if "int4" in families else None
    found = {"times": [], "weights": _weights(families), "memory": memory}
    config = SHAPES[settings.shape].config()
    chosen = variants(tuple(families), _kept(settings, config), routed_layers(config))
    for phase, size in cells:
        cell = Cell(phase, size, settings.context, config["vocab_size"], settings.device)
        started = time.monotonic()
        found["times"] += _measure(cell, families, chosen, settings, budget.next_end())
        say(f"{phase} {size}: {time.monotonic() - started:.0f} s")
        yield found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _machine(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine."""
    return {
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "copied_bytes_per_second": _bandwidth(settings.device),
    }


def _bandwidth(device: str) -> float:
    """Bytes read and written in a second by a copy; the median of five."""
    source = torch.ones(COPIED // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = [seconds(lambda: target.copy_(source), device) for _ in range(6)]
    return COPIED / float(np.median(taken[1:]))


def _families(settings: Settings) -> dict[str, Family]:
    config = SHAPES[settings.shape].config()
    kept = _kept(settings, config)
    plain = random_model(config, settings.device, settings.seed)
    made = {
        name: plain if name == "bf16" else packed_copy(plain, HEAD_BITS[name]) for name in settings.formats
    }
    return {name: Family(model, kept) for name, model in made.items()}


def _kept(settings: Settings, config: dict[str, Any]) -> list[int]:
    layers = routed_layers(config)
    return list(dict.fromkeys(kept_layers(ratio, layers) for ratio in sorted(settings.ratios)))


def _measure(
    cell: Cell, families: dict[str, Family], chosen: list[Variant], settings: Settings, end: float
) -> list[dict[str, Any]]:
    """Rows of one cell, one for each variant; `end`: when it should end, which the first round may exceed."""
    draw = random.Random(settings.seed)
    subjects = [
        Subject(families[variant.format], variant, torch.Generator().manual_seed(settings.seed + number))
        for number, variant in enumerate(chosen)
        if cell.measures(variant)
    ]
    times: list[list[float]] = [[] for _ in subjects]
    for subject in subjects:
        cell.warm_up(subject)
    for _ in rounds(settings.repeats, end):
        for index in draw.sample(range(len(subjects)), len(subjects)):
            with _uncollected():
                times[index] += cell.times(subjects[index])
    return [_row(cell, subject, taken) for subject, taken in zip(subjects, times, strict=True)]


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection falls into a timed pass."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _row(cell: Cell, subject: Subject, taken: list[float]) -> dict[str, Any]:
    variant, layers = subject.variant, len(subject.family.plain.model.layers)
    row = {
        "phase": cell.phase, "size": cell.size, "format": variant.format, "variant": variant.kind,
        "kept": variant.kept, "ratio": variant.kept and variant.kept / subject.family.layers,
        **median_and_quartiles(taken),
    }  # fmt: skip
    if variant.kind == "routers":
        return {**row, "execution_ratio": None, "kv_bytes": None, "kv_filled": None}
    allocated, filled = kv_bytes(subject.cache)
    executed = subject.pairs / (layers * subject.tokens)
    return {**row, "execution_ratio": executed, "kv_bytes": allocated, "kv_filled": filled}


def _weights(families: dict[str, Family]) -> list[dict[str, Any]]:
    """Bytes of weights that a decoded token reads, by format, variant and layers kept."""
    rows = []
    for name, family in families.items():
        models = [("plain", family.plain, family.layers), ("open", family.routed, family.layers)]
        for kept in family.ideal:
            models += [("ideal", family.plain, kept), ("random", family.routed, kept)]
        for variant, model, kept in models:
            size = weight_bytes(model, kept)
            rows.append({"format": name, "variant": variant, "kept": kept, "bytes": size})
    return rows


def _memory(family: Family, settings: Settings) -> dict[str, int | None]:
    """Bytes of the packed routed model's file, and what loading it adds in a process of its own."""
    small = {**SHAPES["tiny"].config(), "num_hidden_layers": ROUTERS.always_run_layers + 1}
    with tempfile.TemporaryDirectory() as folder:
        whole, warm_up = Path(folder) / "whole", Path(folder) / "warm_up"
        save_packed(family.routed, whole)
        save_packed(Family(packed_copy(random_model(small, "cpu")), []).routed, warm_up)
        command = [sys.executable, "-m", "qtale_lib.quantization.load_memory", whole, warm_up]
        done = subprocess.run(
            [*command, settings.device], cwd=ROOT, capture_output=True, text=True, check=True
        )
    return {**json.loads(done.stdout), "group": group_size(family.plain.config)}
