"""The run store of a profile: give me this result; compute it if it is missing; never twice; safe to kill.

Every result's key is a digest of its own settings and of what it was made from (base weights, data rows, the
trained adapter, θ): a changed base or setting makes exactly what depends on it be computed anew.
Reading needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from qtale_lib import jobs
from qtale_lib.base import base_facts, file_stamp
from qtale_lib.config import Profile, load_profile, without_earlier
from qtale_lib.data import Example, Loaded, code_stamp, data_hash, read_task, subset
from qtale_lib.errors import UserError
from qtale_lib.jobs import Job, Run, expected_seconds
from qtale_lib.memory import BYTES
from qtale_lib.pool import Outcome, PutOff, Report, Task, run_tasks, worker_slots
from qtale_lib.preflight import check, check_fit
from qtale_lib.progress import watcher
from qtale_lib.provenance import ROOT, Stopwatch, versions
from qtale_lib.store import Parcel, Store, digest, read_json, sweep, write_json

# Raised by hand when a stage's code comes to give other numbers from the same settings.
STAGE_VERSIONS = {
    "finetune": 4,
    "quantization": 2,
    "threshold": 3,
    "evaluation": 4,
    "responses": 1,
    "token_routes": 1,
}
# Those of the kept results. Another version of a library that a stage's numbers come from changes their keys.
KEPT_VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "lm_eval": "0.4.13",
}
ENCODING = ("prompt", "max_length", "overlong", "dtype")
FINETUNING = (*ENCODING, "max_steps", "training", "lora", "routing", "probes")
QUANTIZING = ("quantization", "group_size")
SPLITS_READ = {
    "finetune": ("train",),
    "quantization": ("train",),
    "threshold": ("calibration",),
}
READ_OFF = ("responses", "token_routes")  # what is read off models by prompts of notebook 12
READ_ONLY = "QTALE_READ_ONLY"
PATIENCE = 1.0  # seconds to wait for another process, before other jobs are looked at
SMALL_BYTES = 2**28
WITHOUT_EFFECT = ("eval_batch_size", "save_steps")
ONLY_ROUTED = ("router_lr", "lambda1", "lambda2", "rate_target", "rate_loss", "tau")
UNUSED = {"full": (*ONLY_ROUTED, "noise"), "noisy_full": ONLY_ROUTED, "dllm": ("lambda2",), "qtale": ()}

Spec = dict[str, Any]


def results_root() -> Path:
    """results/ of the checkout, or $QTALE_RESULTS_DIR."""
    return Path(os.environ.get("QTALE_RESULTS_DIR") or ROOT / "results").expanduser().resolve()


def figures_root() -> Path:
    """figures/ of the checkout, or $QTALE_FIGURES_DIR."""
    return Path(os.environ.get("QTALE_FIGURES_DIR") or ROOT / "figures").expanduser().resolve()


class Lab:
    """A profile's results under results/<profile>/ (`directory`; `tables` in it) and its `figures` folder."""

    def __init__(self, profile: Profile | str | Path, root: Path | None = None) -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        self.directory = (root or results_root()) / self.profile.name
        self.tables, self.figures = self.directory / "tables", figures_root() / self.profile.name
        self.store = Store(self.directory / "store")
        self._loaded = functools.cache(self._load)
        self._found: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._data_hash = functools.cache(self._hash_of_data)

    def reading_with(self, other: Lab) -> Lab:
        """Self; examples are read once for both, if the other lab has the same ones."""
        if _what_is_read(self.profile) == _what_is_read(other.profile):
            self._loaded, self._data_hash = other._loaded, other._data_hash
        return self

    # What results are made from.

    @functools.cached_property
    def _base(self) -> dict[str, Any]:
        memo, stamp = self.store.root / "base.json", file_stamp(self.profile)
        known = read_json(memo)
        if not isinstance(known, dict) or known.get("stamp") != stamp:
            known = {"stamp": stamp, "facts": base_facts(self.profile)}
            with contextlib.suppress(OSError):  # reading results is possible where writing is not
                write_json(memo, known)
        return known["facts"]

    def base(self) -> dict[str, Any]:
        """The base: name, sha256, config, parameters {decoder, embedding, lm_head, norm, total}, bytes."""
        return self._base

    def examples(self, task: str, split: str) -> list[Example]:
        """The examples of a split that this profile uses."""
        return self._loaded(task, split).examples

    def asked(self, task: str) -> tuple[str, str]:
        """(task, split) of the prompts that runs of a task answer."""
        if task == jobs.WRITTEN_TASK and self.profile.generation.source != "own":
            return self.profile.generation.source, "test"
        return task, self.profile.evaluated

    def prompts(self, task: str) -> list[Example]:
        """Those prompts, as many as the profile says."""
        return subset(self.examples(*self.asked(task)), self.profile.generation.prompts)

    def source(self, task: str, split: str) -> dict[str, Any]:
        """Where they come from: file, sha256, rows, notes, and the seed by which rows were cut, if so."""
        source = dict(self._loaded(task, split).source)
        cuts = source.pop("cuts", None)  # the seed and the file give the indices again
        return {**source, **({"cut_seed": cuts["seed"]} if cuts else {})}

    def _load(self, task: str, split: str) -> Loaded:
        profile = self.profile
        loaded = read_task(task, split, profile.data_dir, profile.data, profile.alpaca)
        return Loaded(subset(loaded.examples, self._limit(split)), loaded.source)

    def _limit(self, split: str) -> int | None:
        """The most examples that are used of a split."""
        profile = self.profile
        limits = {
            "train": [profile.limit.train],
            "calibration": [profile.limit.calibration, profile.calibration.questions],
            profile.evaluated: [profile.limit.test],
        }
        return min((limit for limit in limits.get(split, ()) if limit is not None), default=None)

    def _hash_of_data(self, task: str, split: str) -> str:
        """Of the embedded world, which takes seconds to be made, it is kept beside the results."""
        if self.profile.data != "microworld" or self.profile.data_dir is not None:
            return data_hash(self.examples(task, split))
        memo, stamp, name = (
            self.store.root / "data.json",
            code_stamp(),
            f"{task} {split} {self._limit(split)}",
        )
        known = read_json(memo)
        hashes = known["hashes"] if isinstance(known, dict) and known.get("stamp") == stamp else {}
        if name not in hashes:
            hashes[name] = data_hash(self.examples(task, split))
            with contextlib.suppress(OSError):
                write_json(memo, {"stamp": stamp, "hashes": hashes})
        return hashes[name]

    def settings(self, kind: str, spec: Spec) -> dict[str, Any]:
        """The part of the profile that a result depends on, and nothing else of it."""
        everything = self.profile.model_dump(mode="json")
        if kind == "finetune":
            kept = without_earlier({name: everything[name] for name in FINETUNING})
            if self.profile.training.weight_bits < 16:
                kept |= {
                    "group_size": self.profile.group_size,
                    "lm_head_bits": self.profile.quantization.lm_head_bits,
                }
            return _finetune_settings(kept, spec["method"])
        names = list(ENCODING)
        names += QUANTIZING if spec["bits"] < 16 else ()
        names += ["calibration"] if kind == "threshold" else []
        names += ["protocol"] if kind == "evaluation" and spec["task"] not in jobs.WRITTEN else []
        kept = without_earlier({name: everything[name] for name in (*names, "pruning")})
        if "pruning" in kept:
            kept["calibration_texts"] = self.profile.quantization.calibration_texts
        if kind in READ_OFF:
            kept |= {name: everything["generation"][name] for name in ("prompts", "max_tokens")}
        return kept

    def made_from(self, kind: str, spec: Spec) -> dict[str, Any] | None:
        """Hashes of what a result is made from; None while something that it builds on is missing."""
        task, run = spec["task"], {name: spec[name] for name in ("task", "method", "seed")}
        if kind == "finetune":
            return {"base": self.base()["sha256"], "train": self._data_hash(task, "train")}
        trained = self.find("finetune", **run)
        if trained is None:
            return None
        sources = {"adapter": trained["value"]["adapter_sha256"], "base": self.base()["sha256"]}
        if spec["bits"] < 16:
            sources["quantization_texts"] = self._data_hash(task, "train")
        if not self.profile.pruning.is_none():
            sources["pruning_texts"] = self._data_hash(task, "train")
        if kind == "threshold":
            sources["calibration"] = self._data_hash(task, "calibration")
        if kind in ("evaluation", *READ_OFF):
            sources["test"] = self._data_hash(*self._read_by(kind, task)[0])
            theta = self.theta(spec)
            if theta == "unknown":
                return None
            sources["theta"] = theta
        return sources

    def theta(self, spec: Spec) -> float | list[float] | str | None:
        """The θ that a rule stands for, or those of the routed layers; None without routers; "unknown" while
        its search is missing.
        """
        if not jobs.is_found(spec["theta"]):
            return jobs.fixed_theta(spec["theta"])
        found = self.find("threshold", **threshold_spec(spec))
        return found["value"]["theta"] if found else "unknown"

    def address(self, kind: str, spec: Spec) -> tuple[str, str, str] | None:
        """(kind, name, key) in the store; None while something that the result builds on is missing."""
        sources = self.made_from(kind, spec)
        if sources is None:
            return None
        parts = STAGE_VERSIONS[kind], spec, self.settings(kind, spec), sources
        return kind, _name(spec), digest(*parts, *self._other_libraries(kind, spec))

    def _other_libraries(self, kind: str, spec: Spec) -> list[dict[str, str]]:
        """The libraries behind a result, if any, whose versions are not those of the kept results."""
        behind = {"torch", "transformers", "tokenizers", "peft"}
        behind |= {"accelerate"} if kind == "finetune" else set()
        by_harness = self.profile.protocol == "lm_eval" and spec["task"] not in jobs.WRITTEN
        behind |= {"lm_eval"} if kind == "evaluation" and by_harness else set()
        now = {name: versions()[name].partition("+")[0] for name in sorted(behind)}  # +cpu is a build
        other = {name: version for name, version in now.items() if version != KEPT_VERSIONS[name]}
        return [other] if other else []

    def files(self, kind: str, spec: Spec) -> Path:
        """The folder of a finished result's files."""
        return self.store.files(*self.address(kind, spec))

    # Reading.

    def find(self, kind: str, **spec: Any) -> dict[str, Any] | None:
        """A result's whole JSON, or None if it is missing."""
        if not self.store.holds(kind):  # without a look at the data, which may take a minute to make
            return None
        address = self.address(kind, spec)
        if address is None or address in self._found:
            return self._found.get(address)
        found = self.store.get(*address)
        if found and kind != "evaluation":  # thousands of them, each with every answer: read, not kept
            self._found[address] = found
        return found

    def result(self, kind: str, **spec: Any) -> dict[str, Any]:
        """A result's whole JSON; UserError if it is missing."""
        found = self.find(kind, **spec)
        if found is None:
            raise UserError(
                f"The {kind} of {_name(spec)} is not in {self.store.root}; "
                f"run `python -m qtale_lib run --profile {self.profile.name}`."
            )
        return found

    def finetunes(self) -> pd.DataFrame:
        """One row per finished fine-tuning: task, method, seed and its scalar values."""
        return self._frame("finetune", [run_spec(run) for run in jobs.runs(self.profile)])

    def thresholds(self) -> pd.DataFrame:
        """One row per finished θ search: task, method, seed, bits, theta, tolerance, coarse, fine."""
        runs = [run for run in jobs.runs(self.profile) if run.routed]
        return self._frame(
            "threshold", [run_spec(run, bits=b) for run in runs for b in self.profile.bits], lists=True
        )

    def evaluations(self) -> pd.DataFrame:
        """One row per finished evaluation: task, method, seed, bits, theta_rule, metric, acc or ppl ..."""
        runs = jobs.runs(self.profile)
        return self._frame(
            "evaluation", [s for run in runs for s in jobs.evaluation_specs(self.profile, run)]
        )

    def _frame(self, kind: str, specs: Iterable[Spec], lists: bool = False) -> pd.DataFrame:
        rows = []
        for spec in specs:
            found = self.find(kind, **spec)
            if found:
                labels = {"theta_rule" if name == "theta" else name: value for name, value in spec.items()}
                rows.append(
                    {**labels, **_columns(found["value"], lists), "seconds": found["provenance"]["seconds"]}
                )
        return pd.DataFrame(rows)

    def probes(self, task: str, method: str, seed: int) -> list[dict[str, Any]]:
        """The probes of one fine-tuning, from epoch 0 on."""
        return self.result("finetune", task=task, method=method, seed=seed)["value"]["probes"]

    # Computing.

    def once(self, kind: str, spec: Spec, compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result; computed under its lock, by `compute(folder for its files)`, if nobody has it yet."""
        address = self.address(kind, spec)
        if address is None:
            raise UserError(
                f"What the {kind} of {_name(spec)} is made from is missing; was it changed meanwhile?"
            )
        found = self.store.get(*address)
        if found:
            return found
        with self.store.lock(*address):
            return self.store.get(*address) or self._compute(kind, spec, address, compute)

    def _compute(
        self, kind: str, spec: Spec, address: tuple[str, str, str], compute: Callable
    ) -> dict[str, Any]:
        watch = Stopwatch(
            profile=self.profile.name,
            profile_digest=self.profile.digest(),
            base_hash=self.base()["sha256"],
            made_from=self.made_from(kind, spec),
            data={split: self.source(task, split) for task, split in self._read_by(kind, spec["task"])},
        )
        value = compute(self.store.files(*address))
        return self.store.put(
            *address, spec=spec, value=value, config=self.settings(kind, spec), provenance=watch.provenance()
        )

    def _read_by(self, kind: str, task: str) -> list[tuple[str, str]]:
        """(task, split) of the examples that a result is computed on."""
        if kind in READ_OFF:
            return [self.asked(task)]
        return [(task, split) for split in SPLITS_READ.get(kind, (self.profile.evaluated,))]

    def is_done(self, job: Job) -> bool:
        """Whether all results of a job are in the store."""
        return all(self.find(kind, **spec) for kind, spec in self._results_of(job))

    def seems_done(self, job: Job) -> bool:
        """The same at a glance: results are looked for, and not read whole."""
        results = self._results_of(job)
        if not all(self.store.holds(kind) for kind, _ in results):  # as in `find`
            return False
        addresses = (self.address(kind, spec) for kind, spec in results)
        return all(address and self.store.has(*address) for address in addresses)

    def stored(self, wanted: Iterable[Job], kinds: Iterable[str]) -> list[dict[str, Any]]:
        """Whole JSON of what the jobs have in the store, of these kinds."""
        found = (self.find(kind, **spec) for kind, spec in self.all_of(wanted) if kind in kinds)
        return [result for result in found if result]

    def take_in(self, result: dict[str, Any]) -> bool:
        """Put a whole JSON of `stored` into the store; False if it was there."""
        address = address_of(result)
        if self.store.get(*address):
            return False
        write_json(self.store.path(*address), result)
        self._found.clear()
        return True

    def parcels(self, wanted: Iterable[Job]) -> list[Parcel]:
        """All that the jobs have in the store, with its files."""
        addresses = [self.address(kind, spec) for kind, spec in self.all_of(wanted)]
        found = [self.store.parcel(*address) for address in addresses if address]
        return [parcel for parcel in found if parcel]

    def forget(self, wanted: Iterable[Job]) -> None:
        """Remove all that the jobs have put into the store; what other jobs have stays."""
        # each by what it was made from, so all before any is removed
        addresses = [self.address(kind, spec) for kind, spec in self.all_of(wanted)]
        for address in filter(None, addresses):
            self.store.remove(*address)
        self._found.clear()

    def fingerprint(self, job: Job) -> list[Any]:
        """Keys and times of a job's results: equal while the results are the same."""
        found = [(s, self.find(kind, **s)) for kind, s in self._results_of(job)]
        return [(f["key"], f["provenance"]["finished_at"]) if f else (spec, None) for spec, f in found]

    def _results_of(self, job: Job) -> list[tuple[str, Spec]]:
        """(kind, spec) of the results that a job is there for."""
        if job.bits is None:
            return [("finetune", run_spec(job.run))]
        rules = jobs.rules(self.profile, job.run.method)
        if job.extra:
            rules = jobs.extra_rules(job)
        kind = job.extra or "evaluation"
        return [(kind, run_spec(job.run, bits=job.bits, theta=rule)) for rule in rules]

    def all_of(self, wanted: Iterable[Job]) -> Iterator[tuple[str, Spec]]:
        """(kind, spec) of the jobs' results and of those on the way to them."""
        for job in wanted:
            spec = run_spec(job.run, bits=job.bits)
            yield from self._results_of(job)
            if job.bits and job.bits < 16:
                yield "quantization", spec
            if job.bits and job.run.routed:
                yield "threshold", spec
                yield from (("threshold", {**spec, "theta": aim}) for aim in self.profile.theta_aims)

    def compute(self, wanted: Iterable[Job]) -> list[Outcome]:
        """Do the jobs whose results are missing, in a pool of processes; failures are among the outcomes.

        Raises:
            UserError: for what can be known to fail before any work is begun.
        """
        missing = self.missing(wanted)
        if not missing:
            return []
        need, processes = check_fit(self, missing), self.profile.compute.processes
        slots = worker_slots(len(missing), need, self.is_small(), processes)
        tasks = [self.task(job) for job in missing]
        with watcher(tasks, len(slots), self.directory) as watching:
            return run_tasks(tasks, slots, watching)

    def missing(self, wanted: Iterable[Job]) -> list[Job]:
        """The jobs without all their results, after a look at what they need; UserError as `compute`."""
        wanted = list(wanted)
        check(self, wanted)
        sweep(self.directory)
        sweep(self.figures)
        return [job for job in wanted if not self.is_done(job)]

    def is_small(self) -> bool:
        """Whether the base leaves a GPU idle most of the time, so that several workers may share it."""
        return self.base()["bytes"] < SMALL_BYTES

    def model_bytes(self) -> int:
        """Bytes of the base's parameters in the profile's dtype."""
        return self.base()["parameters"]["total"] * BYTES[self.profile.dtype]

    def task(self, job: Job) -> Task:
        """The job as work for a pool: work(profile, root, job, report)."""
        before = [Job(job.run), *([Job(job.run, job.bits)] if job.extra else [])]
        after = () if job.bits is None else tuple(each.name for each in before)
        # A seed is finished before the next is begun, its evaluations before fine-tunings that still wait:
        # whole results early, should this be killed.
        rank = 2 * self.profile.seeds.index(job.run.seed) + int(job.bits is None)
        arguments, cost = (self.profile, self.directory.parent, job), expected_seconds(self.profile, job)
        return Task(job.name, _perform, arguments, after, cost, rank, job.stage)

    def ensure(self, notebook: str) -> None:
        """Compute what is missing of what a notebook shows; UserError naming what failed.

        Under `python -m qtale_lib run`, which has computed all it could, it only says how much is missing.
        """
        needed = jobs.needs(self.profile, notebook)
        if os.environ.get(READ_ONLY):
            missing = [job.name for job in needed if not self.is_done(job)]
            if missing:
                print(f"{len(missing)} of {len(needed)} jobs failed and are left out: {', '.join(missing)}")
            return
        failed = [outcome for outcome in self.compute(needed) if outcome.status != "done"]
        if failed:
            first = f"{failed[0].name}: {failed[0].error}"
            raise UserError(f"{len(failed)} of the results of notebook {notebook} failed; the first, {first}")


def _perform(profile: Profile, root: Path, job: Job, report: Report) -> None:
    """Do a job; PutOff if another process is at it."""
    lab = Lab(profile, root)
    with lab.store.job_lock(job.name, PATIENCE) as held:
        if not held:
            raise PutOff
        from qtale_lib import stages  # torch is loaded in the workers only

        stages.perform(lab, job, report)


def _what_is_read(profile: Profile) -> list[Any]:
    """The settings on which a profile's examples depend."""
    names = ("data", "data_dir", "alpaca", "limit", "evaluated")
    return [*(getattr(profile, name) for name in names), profile.calibration.questions]


def _finetune_settings(settings: dict[str, Any], method: str) -> dict[str, Any]:
    """Without what has no effect on the numbers of a method, so that a new λ2 retrains only "qtale"."""
    dropped = {*WITHOUT_EFFECT, *UNUSED[method]}
    settings["training"] = {
        name: value for name, value in settings["training"].items() if name not in dropped
    }
    if method not in jobs.ROUTED:
        del settings["probes"]
    if method == "full":
        del settings["routing"]
    return settings


def run_spec(run: Run, **more: Any) -> Spec:
    """The spec of a run's result: task, method, seed, and bits and theta where they apply."""
    return {"task": run.task, "method": run.method, "seed": run.seed, **more}


def address_of(result: dict[str, Any]) -> tuple[str, str, str]:
    """(kind, name, key) of a whole JSON: where it lies in the store."""
    return result["kind"], _name(result["spec"]), result["key"]


def threshold_spec(spec: Spec) -> Spec:
    """spec of the result that holds an evaluation's θ; the search of Sec. 3.4 has no rule's name."""
    return {name: value for name, value in spec.items() if (name, value) != ("theta", "searched")}


def _name(spec: Spec) -> str:
    name = f"{spec['task']}.{spec['method']}.s{spec['seed']}"
    name += f".b{spec['bits']}" if "bits" in spec else ""
    return name + (f".{spec['theta']}" if "theta" in spec else "")


def _columns(value: dict[str, Any], lists: bool) -> dict[str, Any]:
    return {k: v for k, v in value.items() if not isinstance(v, dict) and (lists or not isinstance(v, list))}
