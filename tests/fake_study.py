"""A study without models: made-up labs in place of its settings' own, with a truth that a test chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_lab import FakeLab

from qtale_lib.measurements import Measurements
from qtale_lib.studies import Study

AIMED = 0.9  # the R of every rule that aims at one


class SettingLab(FakeLab):
    """The made-up lab of one setting: D-LLM runs what it was trained for, and `gain(profile)` is added."""

    def __init__(self, profile: Any, gain: dict[str, Any], questions: int) -> None:
        names = ("tasks", "methods", "bits", "seeds", "theta_sweep", "theta_aims", "evaluated")
        super().__init__(questions=questions, accuracy={}, **{name: getattr(profile, name) for name in names})
        self.real, self.gain = profile, gain
        self.profile.training = profile.training

    def rules(self, method: str) -> list[str]:
        return [*super().rules(method), *self.real.theta_aims]

    def result(self, kind: str, **spec: Any) -> dict[str, Any]:
        found = super().result(kind, **spec)
        return {**found, "value": {**found["value"], "ratio": AIMED}} if kind == "threshold" else found

    def made_up(self, task: str, method: str, seed: int, bits: int, rule: str) -> dict[str, Any]:
        aimed = rule in self.real.theta_aims
        value = super().made_up(task, method, seed, bits, "searched" if aimed else rule)
        ratio = AIMED if aimed else value["execution_ratio"] + self.real.training.rate_target - 0.5
        score = 60 + 20 * ratio + self.gain.get(method, lambda profile, bits: 0.0)(self.real, bits)
        score += self.noise("run", task, method, seed, bits, self.real.model_dump_json()).normal(0, 0.2)
        return {**value, "execution_ratio": min(ratio, 1.0), **self.choices(task, score)}


def study(path: Path, gain: dict[str, Any] | None = None, questions: int = 200, **overrides: Any) -> Study:
    """The study of a YAML over made-up results; `gain`: method -> (profile, bits) -> points of accuracy."""
    made = Study(path, **overrides)
    labs = [SettingLab(setting.profile, gain or {}, questions) for setting in made.settings]
    made.measured = [(s, Measurements(lab)) for s, lab in zip(made.settings, labs, strict=True)]
    return made
