"""What a profile asks to be computed: its runs, its results, and which of them a notebook needs. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale_lib.config import CSQA

if TYPE_CHECKING:
    from qtale_lib.config import Profile

ROUTED = ("dllm", "qtale")
RULES = {
    "full": ("none",),
    "dllm": ("argmax", "searched", "zero"),
    "qtale": ("argmax", "searched", "zero"),
    "noisy_full": ("zero",),
}
THETAS = {"none": None, "argmax": 0.5, "zero": 0.0}  # "searched" is found on calibration questions (Sec. 3.4)
USUAL_RULE = {"full": "none", "dllm": "argmax", "qtale": "argmax", "noisy_full": "zero"}
WRITTEN_TASK, WRITTEN_BITS = "alpaca", (16, 4)  # of notebook 12: responses to instructions
SUMMARISED = "samsum"  # of notebook 12 too: fine-tuned on, beside the paper's grid
WRITTEN = (WRITTEN_TASK, SUMMARISED)  # tasks without choices, scored by PPL
AIMED = ("ratio ", "flops ")  # how rules begin that aim at an execution ratio, or at a share of Full's FLOPs
FIGURE_2_TASKS = ("arc_easy", "arc_challenge", "siqa", "piqa")
TABLE_4_BITS = (4, 3, 16)  # the paper ablates at 4; its claims are about 3 as well


@dataclass(frozen=True, order=True)
class Run:
    """One fine-tuning."""

    task: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.task}.{self.method}.s{self.seed}"

    @property
    def routed(self) -> bool:
        """Whether routers decide what runs; those of "noisy_full" only make noise in training."""
        return self.method in ROUTED


@dataclass(frozen=True)
class Job:
    """Work for the pool: a fine-tuning (bits None), or all results of one run at one bit width; or what is
    read off its model there beyond these (`extra`: "responses", "token_routes").
    """

    run: Run
    bits: int | None = None
    extra: str | None = None

    @property
    def name(self) -> str:
        """As shown while it runs."""
        if self.extra:
            return f"{self.extra} of {self.run.name} at {self.bits} bit"
        return (
            f"fine-tune {self.run.name}"
            if self.bits is None
            else f"evaluate {self.run.name} at {self.bits} bit"
        )

    @property
    def stage(self) -> str:
        """What it is counted with."""
        if self.extra:
            return self.extra.replace("_", " ")
        return "fine-tunings" if self.bits is None else f"results at {self.bits} bit"


def runs(profile: Profile) -> list[Run]:
    """Every fine-tuning of the profile's grid."""
    return [Run(t, m, s) for t in profile.tasks for m in profile.methods for s in profile.seeds]


def summary_runs(profile: Profile) -> list[Run]:
    """The fine-tunings on dialogues with summaries, if the profile has them: they are not of its grid."""
    folder, wanted = profile.data_dir, profile.generation.summaries and WRITTEN_TASK in profile.tasks
    if not wanted or (folder is not None and not (folder / SUMMARISED).is_dir()):
        return []
    return [Run(SUMMARISED, m, s) for m in profile.methods for s in profile.seeds]


def rules(profile: Profile, method: str) -> tuple[str, ...]:
    """Names of the rules that set θ in a method's evaluations: RULES, "0.1" for a 0.1 in the sweep, and those
    that aim at a cost, such as "ratio 0.6" (threshold_rules.py).
    """
    sweep = [sweep_rule(theta) for theta in profile.theta_sweep if theta not in THETAS.values()]
    return (*RULES[method], *((*sweep, *profile.theta_aims) if method in ROUTED else ()))


def is_found(rule: str) -> bool:
    """Whether a rule's θ is found on calibration questions, run by run, and does not stand in its name."""
    return rule == "searched" or rule.startswith(AIMED)


def sweep_rule(theta: float) -> str:
    """The name of the rule that θ is this number."""
    return repr(theta)


def fixed_theta(rule: str) -> float | None:
    """The θ that a rule stands for, if none `is_found`; None without routers."""
    return THETAS[rule] if rule in THETAS else float(rule)


def evaluation_specs(profile: Profile, run: Run) -> Iterable[dict[str, object]]:
    """spec of every evaluation of a run: task, method, seed, bits, theta (the rule's name)."""
    for bits in profile.bits:
        for rule in rules(profile, run.method):
            yield {"task": run.task, "method": run.method, "seed": run.seed, "bits": bits, "theta": rule}


def paper_rule(method: str, bits: int) -> str:
    """How Tables 1-3 of the paper set theta: QTALE's is searched once the model is quantized."""
    return "searched" if method == "qtale" and bits < 16 else USUAL_RULE[method]


def extra_rules(job: Job) -> tuple[str, ...]:
    """The rules for θ of a job's `extra`: the paper's, and for responses the searched θ as well."""
    if job.extra == "token_routes":
        return (paper_rule(job.run.method, job.bits),)
    wanted = (paper_rule(job.run.method, job.bits), *(("searched",) if job.run.routed else ()))
    return tuple(dict.fromkeys(wanted))


def response_jobs(profile: Profile) -> list[Job]:
    """Jobs that write responses, of those runs and bit widths that notebook 12 compares."""
    written = [run for run in (*runs(profile), *summary_runs(profile)) if run.task in WRITTEN]
    chosen = [run for run in written if run.method != "noisy_full"]
    widths = [bits for bits in WRITTEN_BITS if bits in profile.bits]
    return [Job(run, bits, "responses") for run in chosen for bits in widths]


def token_jobs(profile: Profile) -> list[Job]:
    """Jobs that read routes token by token off the runs of the routed methods."""
    runs = [job.run for job in response_jobs(profile) if job.run.task == WRITTEN_TASK and job.bits == 16]
    return [Job(run, 16, "token_routes") for run in runs if run.routed]


def all_jobs(profile: Profile) -> list[Job]:
    """Every job of the profile's grid; a run's fine-tuning before its evaluations."""
    return _with_bits(runs(profile), profile.bits)


def needs(profile: Profile, notebook: str) -> list[Job]:
    """The jobs whose results a notebook ("05", or its file's name) shows."""
    number = notebook[:2]
    everything = runs(profile)
    routed = [run for run in everything if run.routed]
    if number in ("01", "08", "09", "10", "11", "14"):  # 08 to 10 show studies (studies.py)
        return []
    if number in ("02", "03", "04"):  # their verdicts rest on every CSQA task, not on those drawn alone
        judged = [task for task in CSQA if task in profile.tasks] or profile.tasks
        return [Job(run) for run in routed if run.task in judged]
    if number == "13":  # other tasks can be asked there as well, where their runs are in the store
        task, seed = probed_task(profile), profile.seeds[0]
        return _with_bits([Run(task, method, seed) for method in profile.methods], profile.bits)
    if number == "12":
        written = response_jobs(profile)
        before = [Job(job.run, bits) for job in written for bits in (None, job.bits)]
        return [*dict.fromkeys(before), *written, *token_jobs(profile)]
    if number == "07":
        return _with_bits(routed, ablated_bits(profile))
    return all_jobs(profile)


def wanted_by(profile: Profile, notebooks: Iterable[str]) -> list[Job]:
    """The jobs that notebooks need, each once."""
    return list(dict.fromkeys(job for notebook in notebooks for job in needs(profile, notebook)))


def computing(name: str, is_study: bool) -> str:
    """The command that computes what is missing of a profile, or of a study."""
    return f"python -m qtale_lib {'study' if is_study else 'run --profile'} {name}"


def ablated_bits(profile: Profile) -> list[int]:
    """The bit widths of Table 4 and its controls; all of a profile that has none of TABLE_4_BITS."""
    return [bits for bits in TABLE_4_BITS if bits in profile.bits] or list(profile.bits)


def probed_task(profile: Profile) -> str:
    """The task of Figures 3 and 5–7: ARC-easy (paper), else the first with choices, or the first."""
    choice = [task for task in profile.tasks if task != "alpaca"]
    return "arc_easy" if "arc_easy" in profile.tasks else (choice or list(profile.tasks))[0]


def expected_seconds(profile: Profile, job: Job) -> float:
    """A rough cost, on one core, that orders the jobs and starts the forecast of time left."""
    routed = 1.4 if job.run.routed else 1.0
    if job.extra:
        return 4.0 + 0.01 * profile.generation.prompts * len(extra_rules(job))
    if job.bits is None:
        recipe = profile.training
        rows = min(profile.limit.train or 1000, 1000)
        steps = profile.max_steps or recipe.epochs * rows / (recipe.batch_size * recipe.gradient_accumulation)
        rounded = 1.6 if recipe.weight_bits < 16 else 1.0
        return 4.0 + routed * rounded * 0.007 * steps * recipe.batch_size * recipe.gradient_accumulation
    searching = 8.0 if job.run.routed else 0.0
    scoring = 0.004 * (profile.limit.test or 1000) * len(rules(profile, job.run.method))
    return 3.0 + searching + scoring + (3.0 if job.bits < 16 else 0.0)


def _with_bits(chosen: list[Run], widths: Iterable[int]) -> list[Job]:
    widths = tuple(widths)
    return [Job(run, bits) for run in chosen for bits in (None, *widths)]
