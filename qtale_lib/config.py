"""Profiles: which base model, data, methods, bits, seeds and budget a run has.

A profile is YAML, one of those in ``profiles/`` or the user's own, and sets only what differs from the one
that it ``extends`` (a user's own extends "tiny" if it names none). What a user gets wrong is told in one
sentence that names the file, the key, its value and what is allowed. Needs no torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

from qtale_lib.errors import UserError
from qtale_lib.profile_files import Settings, read_profile, shown

Task = Literal[
    "piqa", "boolq", "siqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "mmlu", "alpaca"
]
Method = Literal["full", "dllm", "qtale", "noisy_full"]
Bits = Literal[16, 8, 4, 3, 2]

TASKS: tuple[str, ...] = get_args(Task)
CSQA = TASKS[:7]
METHODS: tuple[str, ...] = get_args(Method)
BITS: tuple[int, ...] = get_args(Bits)
MOST_SEEDS = 1000
LABELS = ("name", "extends", "compute")  # what it is called, and how it is computed, say nothing of results
# Settings newer than results that are kept, and what those were made with: so much changes no digest.
EARLIER = {
    "data": "microworld",
    "alpaca": "original",
    "protocol": "likelihood",
    "training.noise": "stream",
    "training.weight_bits": 16,
    "quantization.widths": "uniform",
    "pruning": {"weights": "none", "layers": "none"},
    "theta_aims": [],
    "calibration.objective": "accuracy",
    "generation.source": "own",
    "generation.summaries": True,  # runs of their own, which no other result knows of
    "generation": {"prompts": 150, "max_tokens": 32},
    "judge": {
        "kind": "exact",
        "model": None,
        "url": None,
        "key_variable": "OPENAI_API_KEY",
        "prices": [0.0, 0.0],
    },
}


def without_earlier(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without those of EARLIER that have the value that stands there; sections within too."""
    inner = {
        name: without_earlier(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return {
        name: value
        for name, value in inner.items()
        if prefix + name not in EARLIER or EARLIER[prefix + name] != value
    }


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("a value stands there twice")
    return values


def _count_to_seeds(value: Any) -> Any:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value <= MOST_SEEDS
    return tuple(range(value)) if is_count else value


def _list_of(what: str) -> Any:
    return Field(min_length=1, description=f"a list of at least one, none twice, of {what}")


# A description is what follows "must be" where a value is refused. `strict`: true is no number, "3" neither.
Count = Annotated[int, Field(strict=True, ge=1, description="a whole number of at least 1")]
CountOrNull = Annotated[
    int | None, Field(strict=True, ge=1, description="a whole number of at least 1, or null")
]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False, description="a number above 0")]
NotNegative = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False, description="a number of at least 0")
]
Share = Annotated[float, Field(strict=True, ge=0, lt=1, description="a number of at least 0 and below 1")]
Theta = Annotated[float, Field(strict=True, gt=0, lt=1)]
Aim = Annotated[str, Field(strict=True, pattern=r"^(ratio|flops) (0\.\d+|1)( by layer)?$")]
Text = Annotated[
    str, Field(strict=True, min_length=1, description="a text (in quotes if it reads as a number)")
]
TextOrNull = Annotated[
    str | None,
    Field(strict=True, min_length=1, description="a text (in quotes if it reads as a number), or null"),
]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


class Section(BaseModel):
    """Settings that belong together: unchangeable once read, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limit(Section):
    """How many examples of each split are used, in the split's own order; null takes all."""

    train: CountOrNull
    calibration: CountOrNull
    test: CountOrNull


class Training(Section):
    """The fine-tuning recipe. Learning rates are absolute, for batch_size × gradient_accumulation rows.

    rate_loss: "per_token" pins each token's ratio (D-LLM's code), "mean" the average alone (Eq. 4).
    save_steps: optimizer steps between checkpoints from which a killed run goes on; null keeps none.
    noise: of the gates. "stream" draws it from one generator, batch after batch; "keyed" from seed, step,
        example and layer, so that it is the same however a batch is split, over processes too.
    weight_bits: of the weights that the forward pass sees, merged with LoRA and rounded to nearest in groups
        of group_size (quantization/aware.py); 16 trains the floats, to be quantized afterwards.
    """

    epochs: Count
    batch_size: Count
    gradient_accumulation: Count
    eval_batch_size: Count
    save_steps: CountOrNull
    lr: Positive
    router_lr: Positive
    weight_decay: NotNegative
    betas: Annotated[tuple[Share, Share], Field(description="two numbers of at least 0 and below 1")]
    warmup_fraction: Share
    lambda1: NotNegative
    lambda2: NotNegative
    rate_target: Annotated[
        float, Field(strict=True, gt=0, le=1, description="a number above 0 and at most 1")
    ]
    rate_loss: Literal["per_token", "mean"]
    tau: Positive
    noise: Literal["stream", "keyed"]
    weight_bits: Bits


class Compute(Section):
    """How a fine-tuning is computed, which leaves its numbers alone but for rounding and dropout's masks.

    processes: that a run is spread over, on one GPU each, or on as many shares of the cores.
    gradient_checkpointing: each layer is computed again in the backward pass, in place of being kept.
    sharding: "fsdp" spreads the frozen base over the processes; with "none" each holds it whole.
    """

    processes: Count
    gradient_checkpointing: Annotated[bool, Field(strict=True, description="true or false")]
    sharding: Literal["none", "fsdp"]


class Lora(Section):
    """LoRA by peft: rank, alpha (scale = alpha / r), dropout, and the linear layers that get it."""

    r: Count
    alpha: Positive
    dropout: Share
    target_modules: Annotated[tuple[Text, ...], AfterValidator(_distinct), _list_of("names of linear layers")]


class Routing(Section):
    """Routers: width of the hidden layer (null: d / 8), and how many first layers and tokens always run.

    At least one of each: the first layer tells the cache its length, and a query needs a key to attend to.
    max_pull: bound on an evicted key's weight in its gate's gradient (see `RouterConfig`).
    """

    hidden: CountOrNull
    always_run_layers: Count
    always_run_tokens: Count
    max_pull: Annotated[
        float, Field(strict=True, ge=1, allow_inf_nan=False, description="a number of at least 1")
    ]


class Quantization(Section):
    """Which quantizer, on how many calibration texts; lm_head_bits counts in bytes and weights alike.

    widths: "uniform", or "mixed": at 3 bits, sensitive layers get 4 and others 3 or 2, 3 in the mean.
    """

    backend: Literal["native", "autoawq"]
    method: Annotated[
        Literal["awq", "rtn", "gptq", "magr_gptq"],
        Field(description="awq or, with backend native, rtn, gptq or magr_gptq"),
    ]
    widths: Annotated[
        Literal["uniform", "mixed"], Field(description="uniform or, with backend native, mixed")
    ]
    calibration_texts: Count
    lm_head_bits: Bits

    @field_validator("method", "widths")
    @classmethod
    def _known_to_backend(cls, value: str, others: ValidationInfo) -> str:
        if value not in ("awq", "uniform") and others.data.get("backend") == "autoawq":
            raise ValueError("autoawq has nothing else")
        return value


class Pruning(Section):
    """Other compression, of models in 16 bits (pruning/): weights by share or n:m, layers by number or by
    the confidence at which a token leaves.
    """

    weights: Annotated[
        str,
        Field(
            strict=True,
            pattern=r"^(none|(magnitude|wanda) (0\.\d+|2:4|4:8))$",
            description="none, or magnitude or wanda with a share or pattern, such as wanda 0.5 or wanda 2:4",
        ),
    ]
    layers: Annotated[
        str,
        Field(
            strict=True,
            pattern=r"^(none|(block_influence|sleb) [1-9]\d*|early_exit 0\.\d*[1-9]\d*)$",
            description="none, block_influence or sleb with a number of layers, or early_exit with a "
            "confidence, such as sleb 3 or early_exit 0.9",
        ),
    ]

    def is_none(self) -> bool:
        """Whether nothing is pruned."""
        return self.weights == self.layers == "none"


class Search(Section):
    """The two-phase θ search (Sec. 3.4): steps of both sweeps, tolerance of the score, questions.

    objective: what is scored where there are choices: "accuracy", or "likelihood" (of the right choice among
        all, as a PPL).
    """

    coarse_step: Annotated[
        float, Field(strict=True, gt=0, le=0.5, description="a number above 0 and at most 0.5")
    ]
    fine_step: Annotated[
        float, Field(strict=True, gt=0, description="a number above 0 and at most coarse_step")
    ]
    tolerance: NotNegative
    questions: Count
    objective: Literal["accuracy", "likelihood"]

    @field_validator("fine_step")
    @classmethod
    def _finer(cls, step: float, others: ValidationInfo) -> float:
        if step > others.data.get("coarse_step", step):
            raise ValueError("coarser than coarse_step")
        return step


class Probes(Section):
    """How many training samples the probes read after every epoch."""

    samples: Count


class Generation(Section):
    """How many prompts get a response, and of how many tokens at most.

    source: of the prompts that runs of Alpaca answer: its "own" evaluated split, or "alpaca_eval", those of
        AlpacaEval from the hub or data_dir. It tells results apart by the prompts themselves.
    summaries: whether dialogues are summarised too (SAMSum), by fine-tunings beside those of `tasks`; a
        data_dir without the folder samsum has none.
    """

    prompts: Count
    max_tokens: Count
    source: Literal["own", "alpaca_eval"]
    summaries: Annotated[bool, Field(strict=True, description="true or false")]


class Judge(Section):
    """Who says which of two responses is better; nothing that is computed before depends on it.

    kind: "exact" grades by the embedded world's facts; "likelihood" asks a reference model how likely each
        response is; "endpoint" asks a model behind an OpenAI-compatible URL.
    model: the reference model, as `base` (null: the base itself), or the name that the endpoint knows.
    url: of the endpoint, up to and without /chat/completions.
    key_variable: the environment variable that holds the endpoint's key; the key itself stands nowhere.
    prices: dollars for a million tokens sent, and for a million received; for the estimate of cost.
    """

    kind: Literal["exact", "likelihood", "endpoint"]
    model: TextOrNull
    url: TextOrNull
    key_variable: Text
    prices: Annotated[tuple[NotNegative, NotNegative], Field(description="two numbers of at least 0")]


class Profile(Section):
    """All settings of one reproduction; every result carries it whole.

    base: "microworld" (the embedded one), a folder, a name in $QTALE_MODELS_DIR, or a hub id (`revision`).
    data: the embedded world ("microworld"), or the benchmarks from the hub ("hub").
    data_dir: folder with the benchmarks' original files, in place of `data`; None leaves it to that.
    alpaca: the "original" 52,002 rows, or the community's "cleaned" ones; the embedded world has one set.
    group_size: weights that share a quantization scale; -1 for one group per row.
    theta_sweep: further θ at which every routed model is evaluated, at every bit width; usually none.
    theta_aims: further rules for θ that aim at a cost: "ratio 0.6" (of execution), "flops 0.7" (of Full's,
        routers included), each also "… by layer", with a θ for each layer.
    max_steps: optimizer steps of a fine-tuning, in place of what `epochs` come to; None leaves it to them.
    protocol: how choices are scored: likelihood of the answers after `prompt`, or by lm-eval's own tasks.
    evaluated: the split that is measured, up to `limit.test`: "validation" while settings are being chosen.
    """

    name: Annotated[
        str,
        Field(
            strict=True,
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
            description="a word of letters, digits, dots, _ and -",
        ),
    ]
    extends: str | None
    base: Text
    revision: TextOrNull
    data: Literal["microworld", "hub"]
    data_dir: Annotated[Path | None, Field(description="the path of an existing folder, or null")]
    alpaca: Literal["original", "cleaned"]
    tasks: Annotated[tuple[Task, ...], AfterValidator(_distinct), _list_of(", ".join(TASKS))]
    methods: Annotated[tuple[Method, ...], AfterValidator(_distinct), _list_of(", ".join(METHODS))]
    bits: Annotated[tuple[Bits, ...], AfterValidator(_distinct), _list_of(", ".join(map(str, BITS)))]
    group_size: Annotated[
        Literal[-1] | Annotated[int, Field(strict=True, ge=1)],
        Field(description="a whole number of at least 1, or -1 for one group per row"),
    ]
    seeds: Annotated[
        tuple[Seed, ...],
        BeforeValidator(_count_to_seeds),
        AfterValidator(_distinct),
        Field(
            min_length=1,
            description=f"a count of 1 to {MOST_SEEDS}, or a list of whole numbers from 0 on, none twice",
        ),
    ]
    theta_sweep: Annotated[
        tuple[Theta, ...],
        AfterValidator(_distinct),
        Field(description="a list of numbers above 0 and below 1, none twice; [] for no sweep"),
    ]
    theta_aims: Annotated[
        tuple[Aim, ...],
        AfterValidator(_distinct),
        Field(description="a list of rules such as ratio 0.6 or flops 0.7 by layer, none twice"),
    ]
    max_steps: CountOrNull
    evaluated: Literal["test", "validation"]
    limit: Limit
    overlong: Literal["drop", "cut"]
    max_length: Count
    prompt: Literal["compact", "dllm"]
    protocol: Literal["likelihood", "lm_eval"]
    dtype: Literal["float32", "bfloat16"]
    training: Training
    compute: Compute
    lora: Lora
    routing: Routing
    quantization: Quantization
    pruning: Pruning
    calibration: Search
    probes: Probes
    generation: Generation
    judge: Judge

    _settings: Settings = PrivateAttr(default_factory=Settings)

    def refusal(self, key: str, complaint: str) -> UserError:
        """The error on a value that cannot work here: what set it, its dotted key, it, and the complaint."""
        keys = tuple(key.split("."))
        source = self._settings.source(keys) or f"profile {self.name}"
        value = functools.reduce(getattr, keys, self)
        return UserError(f"{source}: {key} (= {shown(value)}) {complaint}.")

    def split_batch(self) -> tuple[int, int]:
        """Rows of a process's micro-batch, and its micro-batches a step: over all, the recipe's rows.

        Raises:
            UserError: if the processes cannot share the batch evenly, or noise would depend on how they do.
        """
        recipe, processes = self.training, self.compute.processes
        if processes == 1 and self.compute.sharding != "none":
            raise self.refusal(
                "compute.sharding", "needs several processes; raise compute.processes, or set none"
            )
        if processes > 1 and recipe.noise != "keyed" and set(self.methods) != {"full"}:
            raise self.refusal(
                "compute.processes", "needs noise that any process can draw; set training.noise: keyed"
            )
        over_steps = math.gcd(recipe.gradient_accumulation, processes)
        if recipe.batch_size % (processes // over_steps):
            complaint = (
                f"cannot share batch_size {recipe.batch_size} × gradient_accumulation "
                f"{recipe.gradient_accumulation} rows evenly; choose a divisor of either"
            )
            raise self.refusal("compute.processes", complaint)
        return recipe.batch_size // (processes // over_steps), recipe.gradient_accumulation // over_steps

    def digest(self, *sections: str) -> str:
        """16 hex digits of the sha256 of the named sections (all but LABELS when none is named).

        The same for the same settings, whatever the order of keys and whichever process asks. To key one
        stage's results name what that stage depends on: a further task, method, bit width or seed then
        recomputes nothing.

        Raises:
            KeyError: for a name that is no section.
        """
        settings = self.model_dump(mode="json")
        named = sections or [section for section in settings if section not in LABELS]
        text = json.dumps(without_earlier({section: settings[section] for section in named}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_profile(name_or_path: str | Path, **overrides: Any) -> Profile:
    """The profile of that name (in ``profiles/``) or in that YAML file, validated.

    `overrides` are set last, sections key by key: ``load_profile("tiny", seeds=3, limit={"test": 50})``.
    $QTALE_DATA_DIR, if set, takes the place of the file's `data_dir`; an override goes before both.
    A relative `base` or `data_dir` is looked for from the folder of the YAML file that sets it, then from the
    current one; a `base` that is no folder in either stays as it is: a name in $QTALE_MODELS_DIR or a hub id.

    Raises:
        UserError: one sentence on a file that is missing or no YAML, a cycle of `extends`, an unknown key, a
            wrong type or an impossible value.
    """
    profile, profile._settings = read_profile(Profile, name_or_path, overrides)
    return profile
