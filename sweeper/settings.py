"""The whole configuration as frozen, validated values.

Defaults live in conf/*.yaml, once; here is only what a setting may be. A missing key, an unknown
key, a wrong type and a value out of range are all found in one pass, before any training second.
Names are those of PEFT, transformers and Optuna wherever they have one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from sweeper.errors import ConfigError

SPLIT_KEYS = ("train", "validation", "test")

EMBEDDED = "embedded"
"""The word for the base model and the data set that travel inside the package."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "oasst",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "flan",
    "ultrachat",
    "text",
]
"""`auto`, or a key of sweeper.data.formats.FORMATS."""


def _steps(value: object) -> float | Literal["epoch"]:
    """One sentence for a wrong value, where pydantic would report every member of a union."""
    if value == "epoch":
        return "epoch"
    number = float(value) if isinstance(value, int | float) else 0.0
    if not isinstance(value, bool) and (0 < number < 1 or (number >= 1 and number.is_integer())):
        return number
    raise ValueError(
        f"{value!r} is neither a whole number of steps, nor a fraction of the schedule below 1, "
        "nor the word epoch"
    )


def _auto_or_bool(value: object) -> bool | Literal["auto"]:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is neither auto, true nor false")


Steps = Annotated[float | Literal["epoch"], PlainValidator(_steps)]
"""A number of optimiser steps, a fraction of the whole schedule (below 1), or every epoch."""

AutoBool = Annotated[bool | Literal["auto"], PlainValidator(_auto_or_bool)]
LAYERS = re.compile(r"(?P<first>\d+)-(?P<last>\d+)|last-(?P<count>[1-9]\d*)")
"""adapter.layers_to_transform as text: 0-11 (both ends included) or last-8."""


_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: object) -> object:
    """Seconds of a duration such as "6h", "1h30m", "90s"; a number has no unit and is refused.

    Raises:
        ValueError: not a duration.
    """
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", str(text))
    if not parts or "".join(number + unit for number, unit in parts) != str(text):
        raise ValueError(f"{text!r} is no duration; write it as 6h, 1h30m or 90s")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One node of the configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class Model(Section):
    """The base model: a hub id, a local folder, or the embedded one."""

    base_model: str = Field(min_length=1)
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]


class Source(Section):
    """One place that rows come from; what is null is as `data` says for all of them."""

    path: str = Field(min_length=1)
    split: str | None = None
    """Of a folder or a hub data set; null = the one named like the key: train, validation, test."""
    name: str | None = None
    """A hub data set's configuration name."""
    revision: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of this source in train, relative to the other weights; null everywhere = all rows."""
    format: str | None = None
    columns: dict[str, str] | None = None


_ONE, _SEVERAL, _SOURCE = "one path", "several sources", "a source"


def _sources_tag(value: object) -> str:
    return _SEVERAL if isinstance(value, list) else _source_tag(value)


def _source_tag(value: object) -> str:
    return _SOURCE if isinstance(value, Mapping | Source) else _ONE


OnePath = Annotated[Annotated[str, Field(min_length=1)], Tag(_ONE)]
OneSource = Annotated[OnePath | Annotated[Source, Tag(_SOURCE)], Discriminator(_source_tag)]
Sources = Annotated[
    OnePath
    | Annotated[Source, Tag(_SOURCE)]
    | Annotated[list[OneSource], Field(min_length=1), Tag(_SEVERAL)],
    Discriminator(_sources_tag),
]
"""A file, a folder, a hub id or a URL; or several of them."""


def sources(given: Sources | None) -> list[Source]:
    """Sources however they were written: one path, one source, or a list of both."""
    items = given if isinstance(given, list) else [] if given is None else [given]
    return [Source(path=item) if isinstance(item, str) else item for item in items]


class Cleaning(Section):
    """Which rows are left out before anything is split."""

    deduplicate: Literal["none", "exact", "near"]
    near_threshold: Annotated[float, Field(ge=0.3, le=0.99)]
    min_completion_chars: Annotated[int, Field(ge=0)]
    max_chars: Positive | None
    low_quality: bool
    completion_pattern: str | None
    completion_json: bool
    redact: list[Literal["email", "phone"]]

    @model_validator(mode="after")
    def _pattern_compiles(self) -> Cleaning:
        try:
            re.compile(self.completion_pattern or "")
        except re.error as error:
            raise ValueError(
                f"completion_pattern={self.completion_pattern!r} is no regular expression: {error}"
            ) from None
        return self


class Data(Section):
    """What is trained on and what it is judged on."""

    train: Sources
    validation: Sources | None
    test: Sources | None
    format: FormatName
    columns: dict[str, str]
    template: str = Field(min_length=1)
    train_on: Literal["completions", "last_completion", "everything"]
    max_length: Annotated[int, Field(ge=8)] | Literal["auto"]
    over_length: Literal["drop", "truncate"]
    packing: bool
    max_samples: Positive | None
    validation_ratio: Annotated[float, Field(gt=0, lt=0.5)]
    test_ratio: Annotated[float, Field(ge=0, lt=0.5)]
    split_seed: Annotated[int, Field(ge=0)]
    group_by: str | None
    balance_by: str | None
    order_by: str | None
    max_bad_fraction: Annotated[float, Field(ge=0, lt=1)]
    cleaning: Cleaning

    @model_validator(mode="after")
    def _one_mixture(self) -> Data:
        train = sources(self.train)
        weighted = [source.path for source in train if source.weight is not None]
        if weighted and len(weighted) < len(train):
            raise ValueError(
                f"train: only {', '.join(weighted)} has a weight; weigh every source or none"
            )
        if weighted and self.balance_by is not None:
            raise ValueError(
                f"balance_by={self.balance_by} and the sources' weights both decide how often "
                "rows occur; set balance_by=null or leave the weights out"
            )
        if any(item.weight is not None for item in sources(self.validation) + sources(self.test)):
            raise ValueError("weights are for train; validation and test are taken as they are")
        return self


class Quantization(Section):
    """How the frozen base is held in memory (transformers' BitsAndBytesConfig)."""

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]

    @model_validator(mode="after")
    def _one_width(self) -> Quantization:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "load_in_4bit and load_in_8bit are both true; a base is held in one of them: "
                "choose quantization=nf4, fp4, int8 or none"
            )
        return self

    @property
    def kind(self) -> Literal["nf4", "fp4", "int8", "none"]:
        """The name of the group choice that holds the base this way."""
        if self.load_in_4bit:
            return self.bnb_4bit_quant_type
        return "int8" if self.load_in_8bit else "none"


INITS = ("default", "gaussian", "olora")
REFUSED_INITS = {
    "pissa": "it decomposes the base's weights and fails on a 4-bit or 8-bit base",
    "loftq": "it quantizes the base itself and needs CUDA",
    "eva": "it needs a pass over the data before training",
    "corda": "it needs a pass over the data before training",
    "lora_ga": "it needs gradients over the data before training",
    "orthogonal": "it fails on a 4-bit base",
    "mica": "it freezes B, so that r no longer means what it means for other trials",
    "true": "its name here is default",
    "false": "it starts from a random update, which PEFT offers for debugging only",
}
"""init_lora_weights of PEFT that are not offered, and why."""


class LoraAdapter(Section):
    """PEFT's LoraConfig; alpha is given either as a number or as a ratio to r, never both."""

    method: Literal["lora"]
    r: Positive
    alpha_over_r: Annotated[float, Field(gt=0)] | None
    lora_alpha: Annotated[float, Field(gt=0)] | None
    lora_dropout: Fraction
    target_modules: str | Annotated[list[str], Field(min_length=1)]
    layers_to_transform: str | list[Annotated[int, Field(ge=0)]] | None
    modules_to_save: list[str]
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str
    rank_pattern: dict[str, Positive]
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_are_a_range(cls, value: str | list[int] | None) -> str | list[int] | None:
        if value == [] or (isinstance(value, str) and not LAYERS.fullmatch(value)):
            raise ValueError(
                f"{value!r} names no layers; give null (all), a list such as [0, 1, 2], "
                "a range such as 0-11 (both ends included), or last-8"
            )
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _known_init(cls, value: Any) -> str:
        name = str(value).lower()
        if name in INITS:
            return name
        known = next((kind for kind in REFUSED_INITS if name.startswith(kind)), None)
        reason = f"is not offered: {REFUSED_INITS[known]}" if known else "is no initialisation"
        raise ValueError(f"{value!r} {reason}; choose {', '.join(INITS)}")

    @model_validator(mode="after")
    def _one_alpha(self) -> LoraAdapter:
        if (self.alpha_over_r is None) == (self.lora_alpha is None):
            raise ValueError(
                f"give lora_alpha or alpha_over_r, not both or none "
                f"(alpha_over_r={self.alpha_over_r}, lora_alpha={self.lora_alpha}); "
                "set the other one to null"
            )
        return self

    @property
    def alpha(self) -> float:
        """The lora_alpha that PEFT gets."""
        return self.lora_alpha if self.lora_alpha is not None else self.r * self.ratio

    @property
    def ratio(self) -> float:
        """Alpha over r, however it was given."""
        if self.alpha_over_r is not None:
            return self.alpha_over_r
        assert self.lora_alpha is not None
        return self.lora_alpha / self.r

    @property
    def alphas(self) -> dict[str, float]:
        """The alpha_pattern that PEFT gets: alpha_over_r also holds where rank_pattern sets r."""
        if self.alpha_over_r is None:
            return dict(self.alpha_pattern)
        patterned = {name: self.alpha_over_r * r for name, r in self.rank_pattern.items()}
        return {**patterned, **self.alpha_pattern}


class NoAdapter(Section):
    """Full fine-tuning: every weight of the base is trained.

    LoRA's keys pass without effect: an experiment that sets them keeps them under `adapter=none`, since
    Hydra merges its values over whatever group is chosen.
    """

    method: Literal["none"]

    @model_validator(mode="before")
    @classmethod
    def _without_lora(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        idle = set(LoraAdapter.model_fields) - {"method"}
        return {key: value for key, value in given.items() if key not in idle}


ADAPTER_METHODS: dict[str, type[Section]] = {"lora": LoraAdapter, "none": NoAdapter}
TAGS: dict[str, type[Section] | None] = {
    **ADAPTER_METHODS,
    _ONE: None,
    _SEVERAL: None,
    _SOURCE: Source,
}
"""What stands in an error's location for a member of a union, and the section it leads to."""


class SchedulerOptions(Section):
    """transformers' lr_scheduler_kwargs, as far as a trial may set them."""

    num_cycles: Positive
    """How often cosine_with_restarts starts again; the other schedules ignore it."""


class Training(Section):
    """transformers' TrainingArguments, as far as a trial may set them."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lr_scheduler_type: Literal[
        "cosine", "cosine_with_restarts", "linear", "constant", "constant_with_warmup"
    ]
    lr_scheduler_kwargs: SchedulerOptions
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)]
    warmup_steps: Annotated[int, Field(ge=0)] | None
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: Positive | None
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"]
    micro_batch: Literal["as_given", "largest"]
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    activation_checkpointing: AutoBool
    use_liger_kernel: AutoBool
    loss_chunk_size: Positive | None
    logging_steps: Positive
    eval_steps: Steps
    save_steps: Steps | None
    save_total_limit: Positive
    early_stopping_patience: Positive | None
    early_stopping_threshold: Annotated[float, Field(ge=0)]
    early_stopping_min_fraction: Annotated[float, Field(ge=0, le=1)]
    early_stopping_metric: Literal["objective", "eval/loss", "eval/loss_moving_average"]
    moving_average_window: Positive
    divergence_threshold: Annotated[float, Field(gt=1)] | None
    divergence_patience: Positive

    def warmup_length(self, total_steps: int) -> int:
        """Warm-up in optimiser steps; a constant rate has none."""
        if self.lr_scheduler_type == "constant":
            return 0
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


LOSS_METRICS = {
    "eval/loss": "minimize",
    "eval/perplexity": "minimize",
    "eval/bits_per_byte": "minimize",
}
ROUGE_METRICS = {
    "eval/rouge1": "maximize",
    "eval/rouge2": "maximize",
    "eval/rougeL": "maximize",
}
DIRECTIONS: dict[str, str] = {**LOSS_METRICS, **ROUGE_METRICS}
"""The metrics that a trial can be judged by, and which way is better; a user adds `eval/<name>`."""


def metric_words(metric: str) -> str:
    """A metric's name in running text and column heads: eval loss, eval rougeL."""
    return metric.replace("/", " ")


class Generation(Section):
    """Greedy answers to held-out prompts, for ROUGE, lengths and the user's metrics."""

    num_examples: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive
    batch_size: Positive


class Prompt(Section):
    """A qualitative prompt, answered by base and tuned model side by side."""

    category: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


class Artifacts(Section):
    """What a trial stores beside its adapter or its weights."""

    zip: bool
    merged: bool


class Evaluation(Section):
    """How every model, tuned or not, is judged."""

    per_device_eval_batch_size: Positive
    max_samples: Positive | None
    generation: Generation
    rouge_tokenizer: Literal["ascii", "unicode"]
    rouge_path: str | None
    prompts: list[Prompt]
    metrics: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")],
        Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")],
    ]
    metric_modules: list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")]]

    @model_validator(mode="after")
    def _metrics_are_allowed(self) -> Evaluation:
        for name, target in self.metrics.items():
            module = target.partition(":")[0]
            if f"eval/{name}" in DIRECTIONS:
                raise ValueError(f"metrics.{name}={target}: eval/{name} exists; take another name")
            if not any(f"{module}.".startswith(f"{allowed}.") for allowed in self.metric_modules):
                raise ValueError(
                    f"metrics.{name}={target}: module {module} is not among those that may be "
                    f"imported, evaluation.metric_modules={self.metric_modules}; add it there if you "
                    "trust its code"
                )
        if self.metrics and self.generation.num_examples == 0:
            raise ValueError(
                f"metrics={sorted(self.metrics)} judge generated answers, and "
                "generation.num_examples=0 generates none; set it to 1 or more"
            )
        return self


class Objective(Section):
    """What a trial's value is: the metric that chooses checkpoint, best trial and verdict."""

    metric: str
    direction: Literal["minimize", "maximize"]
    pruning_metric: str | None

    @model_validator(mode="after")
    def _better_is_better(self) -> Objective:
        better = DIRECTIONS.get(self.metric, self.direction)
        if better != self.direction:
            raise ValueError(
                f"direction={self.direction}: for {self.metric} better means {better}; write that"
            )
        return self

    @property
    def is_costly(self) -> bool:
        """Whether every evaluation inside a trial would have to generate answers."""
        return self.metric not in LOSS_METRICS

    @property
    def judged_while_training(self) -> str:
        """The metric that pruning and early looks go by."""
        return self.pruning_metric or ("eval/loss" if self.is_costly else self.metric)

    @property
    def pruning_direction(self) -> str:
        """Which way is better for `judged_while_training`."""
        return DIRECTIONS.get(self.judged_while_training, self.direction)

    @property
    def unit(self) -> str:
        """What the metric is measured in: nats for eval/loss; of the others none is named."""
        return "nats" if self.metric == "eval/loss" else ""

    def gain(self, value: float, over: float) -> float:
        """How much better a value of the metric is than another; below zero, it is worse."""
        return over - value if self.direction == "minimize" else value - over

    def order(self, value: float) -> float:
        """A key to sort values of the metric by, the best first."""
        return value if self.direction == "minimize" else -value


class TrialSettings(Section):
    """All that decides what one trial computes."""

    model: Model
    data: Data
    quantization: Quantization
    adapter: Annotated[LoraAdapter | NoAdapter, Field(discriminator="method")]
    training: Training
    evaluation: Evaluation
    objective: Objective
    artifacts: Artifacts
    seed: Annotated[int, Field(ge=0, lt=2**32)]

    @model_validator(mode="after")
    def _objective_is_measured(self) -> TrialSettings:
        own = [f"eval/{name}" for name in self.evaluation.metrics]
        for key in ("metric", "pruning_metric"):
            name = getattr(self.objective, key)
            if name is None:
                continue
            if name not in {*DIRECTIONS, *own}:
                raise ValueError(
                    f"objective.{key}={name}: no such metric; choose one of "
                    f"{', '.join([*DIRECTIONS, *own])}, or name a function in evaluation.metrics"
                )
            if key == "pruning_metric" and name in own and name != self.objective.metric:
                raise ValueError(
                    f"objective.pruning_metric={name}: which way is better is known of the "
                    f"objective ({self.objective.metric}) and of {', '.join(DIRECTIONS)} only"
                )
            if name not in LOSS_METRICS and self.evaluation.generation.num_examples == 0:
                raise ValueError(
                    f"objective.{key}={name} judges generated answers, and "
                    "evaluation.generation.num_examples=0 generates none; set it to 1 or more"
                )
        return self

    @model_validator(mode="after")
    def _adapter_fits_quantization(self) -> TrialSettings:
        if misfit := _misfit(self.adapter, self.quantization.kind):
            raise ValueError(misfit)
        return self


def _misfit(adapter: LoraAdapter | NoAdapter, kind: str) -> str | None:
    """Why this adapter cannot be trained on a base that is held this way."""
    if kind != "none" and isinstance(adapter, NoAdapter):
        return (
            f"adapter=none trains every weight, which a quantized base "
            f"({kind}) does not allow; add quantization=none"
        )
    if kind == "int8" and isinstance(adapter, LoraAdapter) and adapter.use_dora:
        return (
            "adapter.use_dora=true does not work on an int8 base (PEFT cannot take the norm of its "
            "weights); choose quantization=none, nf4 or fp4, or adapter.use_dora=false"
        )
    return None


class FakeTrainer(Section):
    """What the fake trainer of workers=fake does: trial (or finalist) -> what happens to it."""

    step_seconds: Annotated[float, Field(ge=0)]
    steps: Positive
    plan: dict[int, Literal["finish", "diverge", "oom", "hang", "crash", "error"]]
    finalists: dict[str, Literal["diverge", "oom", "hang", "crash", "error"]]
    free_mib: Annotated[float, Field(gt=0)] | None


class Workers(Section):
    """Who trains the trials, and where."""

    engine: Literal["local", "inline", "ray"]
    trainer: Literal["transformers", "fake"]
    address: Annotated[str, Field(pattern=r"^(auto|[\w.-]+:\d+)$")] | None
    """The Ray cluster: HOST:PORT, auto (this node's), or null to start one here."""
    trial_timeout_s: Seconds | None
    stall_timeout_s: Seconds | None
    fake: FakeTrainer

    @model_validator(mode="after")
    def _address_is_rays(self) -> Workers:
        if self.address is not None and self.engine != "ray":
            raise ValueError(
                f"address={self.address!r} names a Ray cluster, but engine={self.engine}; "
                "add workers=ray, or leave the address null"
            )
        return self


class Tracking(Section):
    """Where runs are recorded."""

    kind: Literal["mlflow", "none"]
    uri: str | None


class Space(Section):
    """Ranges that fit the size of the base model; experiments refer to them by name."""

    learning_rate: str
    r: str
    full_learning_rate: str
    priors: list[dict[str, Any]]


class StandIn(Section):
    """The small model and data of the same kind that `+stand_in=tiny` puts in the real ones' place."""

    base_model: str
    train: str
    validation: str | None


class Settings(TrialSettings):
    """The configuration of one `python -m sweeper` run: a trial and the machinery around it."""

    workers: Workers
    tracking: Tracking
    space: Space
    stand_in: StandIn
    output_dir: str = Field(min_length=1)
    dry_run: bool

    @property
    def trial(self) -> TrialSettings:
        """The part that decides what is computed, without the machinery."""
        return TrialSettings.model_validate(
            self.model_dump(include=set(TrialSettings.model_fields))
        )


SamplerName = Literal["tpe", "gp", "random", "grid"]


class Sampler(Section):
    """Optuna's sampler; n_startup_trials=null follows the number of trials."""

    name: SamplerName | Literal["optuna"]
    seed: Annotated[int, Field(ge=0)]
    n_startup_trials: Positive | None
    class_name: str | None
    kwargs: dict[str, Any]

    @model_validator(mode="after")
    def _class_name_with_optuna(self) -> Sampler:
        _class_name_belongs_to_optuna(self.name, self.class_name, "sampler", "QMCSampler")
        return self


class Pruner(Section):
    """Optuna's pruner behind the schedule-aware guard; `optuna` is any other one, unguarded."""

    name: Literal["none", "median", "percentile", "successive_halving", "optuna"]
    rungs: list[Annotated[int, Field(ge=333, lt=1000)]]
    n_startup_trials: Annotated[int, Field(ge=0)]
    percentile: Annotated[float, Field(gt=0, lt=100)] | None
    reduction_factor: Annotated[int, Field(ge=2)] | None
    class_name: str | None
    kwargs: dict[str, Any]
    audit_fraction: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _what_the_pruner_needs(self) -> Pruner:
        _class_name_belongs_to_optuna(self.name, self.class_name, "pruner", "HyperbandPruner")
        guarded = self.name in ("median", "percentile", "successive_halving")
        if guarded != bool(self.rungs) or self.rungs != sorted(set(self.rungs)):
            raise ValueError(
                f"rungs={self.rungs}: pruner={self.name} needs "
                + ("increasing per-mille of the schedule" if guarded else "no rungs: rungs=[]")
            )
        if (self.percentile is None) == (self.name == "percentile"):
            raise ValueError(f"percentile={self.percentile} belongs to pruner=percentile alone")
        self._halving_is_geometric()
        return self

    def _halving_is_geometric(self) -> None:
        factor = self.reduction_factor
        if (factor is None) == (self.name == "successive_halving"):
            raise ValueError(
                f"reduction_factor={factor} belongs to pruner=successive_halving alone"
            )
        if factor is None:
            return
        wanted = [self.rungs[0] * factor**index for index in range(len(self.rungs))]
        if self.rungs != wanted:
            raise ValueError(
                f"rungs={self.rungs}: with reduction_factor={factor} successive halving decides at "
                f"{self.rungs[0]} × {factor}^n per-mille: rungs={wanted}"
            )


def _class_name_belongs_to_optuna(
    name: str, class_name: str | None, group: str, example: str
) -> None:
    if (name == "optuna") != (class_name is not None):
        raise ValueError(
            f"class_name={class_name} with {group}={name}: a class of optuna.{group}s is named "
            f"with {group}=optuna {group}.class_name={example}, and with no other {group}"
        )


class Plateau(Section):
    """Stop when the last `trials` trials have not improved the best by more than min_improvement."""

    trials: Positive
    min_improvement: Annotated[float, Field(ge=0)]


class Budget(Section):
    """What a study may use besides n_trials; null is no limit."""

    wall_clock: Annotated[float, BeforeValidator(parse_duration)] | None
    until: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")] | None
    device_hours: Annotated[float, Field(gt=0)] | None
    plateau: Plateau | None


class Finalists(Section):
    """Which configurations of each arm are trained over several seeds before the verdict."""

    top: Annotated[int, Field(ge=0)]
    seeds: Positive


class Fairness(Section):
    """When a comparison of arms counts as fair; otherwise its verdict is called provisional."""

    equal: Literal["trials", "tokens", "device_seconds"]
    tolerance: Fraction
    min_finished: Positive


class Arm(Section):
    """One arm besides `lora`: its overrides on top of the experiment, its space, its count."""

    overrides: list[str] = []
    n_trials: Positive
    sampler: SamplerName | None = None
    params: dict[str, Any]
    priors: list[dict[str, Any]] = []


StudyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Study(Section):
    """`hydra.sweeper`: the study as Hydra's Optuna users write it."""

    study_name: StudyName
    n_trials: Positive
    n_jobs: Positive
    storage: str | None
    costs: list[str]
    sampler: Sampler
    pruner: Pruner
    budget: Budget
    params: dict[str, Any]
    priors: list[dict[str, Any]]
    warm_start: list[StudyName]
    fork_of: StudyName | None
    arms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Arm]
    finalists: Finalists
    fairness: Fairness

    @model_validator(mode="after")
    def _lora_is_the_search_itself(self) -> Study:
        if "lora" in self.arms:
            raise ValueError("arms.lora is hydra.sweeper.params itself; give the arm another name")
        return self

    @model_validator(mode="after")
    def _no_fork_of_itself(self) -> Study:
        if self.fork_of == self.study_name:
            raise ValueError(
                f"fork_of={self.fork_of} is the study itself; give the fork a study_name of its own"
            )
        return self

    @model_validator(mode="after")
    def _plateau_of_one_value(self) -> Study:
        if self.costs and self.budget.plateau is not None:
            raise ValueError(
                f"budget.plateau judges one value, and costs={self.costs} add others; "
                "set budget.plateau=null"
            )
        return self


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, Mapping) and len(value) > 0
        flat |= flatten(value, f"{name}.") if deeper else {name: value}
    return flat


S = TypeVar("S", bound=Section)


def validate(kind: type[S], config: Mapping[str, Any], where: str = "") -> S:
    """Turn a plain dict into settings.

    Raises:
        ConfigError: names every wrong key with its value and what is allowed; `where` is the dotted
            path of `config` itself.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        raise ConfigError(describe(error, kind, where)) from None


def describe(error: ValidationError, kind: type[Section], where: str = "") -> list[str]:
    """One line per pydantic error: the dotted key, the rule, the value, the valid choices."""
    return [_describe(item, kind, where) for item in error.errors(include_url=False)]


def _describe(item: Mapping[str, Any], kind: type[Section], where: str) -> str:
    location = [str(part) for part in item["loc"]]
    shown = [part for part in location if part not in TAGS]
    key = ".".join([where, *shown] if where else shown) or "the configuration"
    message = str(item["msg"]).removeprefix("Value error, ")
    match item["type"]:
        case "extra_forbidden":
            valid = ", ".join(sorted(_section_at(kind, location[:-1]).model_fields))
            return f"{key}={item['input']!r}: no such key; valid keys: {valid}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: {message}"
        case _:
            return f"{key}={item['input']!r}: {message[0].lower()}{message[1:]}"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    """The section an error's location leads to; a union's member is named by its tag."""
    section = kind
    for part in location:
        if part in TAGS:
            section = TAGS[part] or section
        elif part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section of a key: itself, or what its list or dict holds."""
    kinds = (annotation, *get_args(annotation))
    sections = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))
    return next(sections, None)
