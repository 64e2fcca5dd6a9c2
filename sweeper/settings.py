"""The whole configuration as frozen, validated values.

Defaults live in conf/*.yaml, once; here is only what a setting may be. A missing key, an unknown
key, a wrong type and a value out of range are all found in one pass, before any training second.
Names are those of PEFT, transformers and Optuna wherever they have one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sweeper.errors import ConfigError

EMBEDDED = "embedded"
"""The word for the base model and the data set that travel inside the package."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
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


class Data(Section):
    """What is trained on and what it is judged on."""

    train: str = Field(min_length=1)
    validation: str | None
    test: str | None
    format: Literal["auto", "alpaca", "prompt_completion", "question_answer"]
    max_length: Annotated[int, Field(ge=8)]
    max_samples: Positive | None
    validation_ratio: Annotated[float, Field(gt=0, lt=0.5)]
    test_ratio: Annotated[float, Field(ge=0, lt=0.5)]
    split_seed: Annotated[int, Field(ge=0)]


class Quantization(Section):
    """How the frozen base is held in memory (transformers' BitsAndBytesConfig)."""

    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"]


class LoraAdapter(Section):
    """PEFT's LoraConfig; alpha is given either as a number or as a ratio to r, never both."""

    method: Literal["lora"]
    r: Positive
    alpha_over_r: Annotated[float, Field(gt=0)] | None
    lora_alpha: Annotated[float, Field(gt=0)] | None
    lora_dropout: Fraction
    target_modules: str | Annotated[list[str], Field(min_length=1)]
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool

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


class NoAdapter(Section):
    """Full fine-tuning: every weight of the base is trained."""

    method: Literal["none"]


ADAPTER_METHODS: dict[str, type[Section]] = {"lora": LoraAdapter, "none": NoAdapter}


class Training(Section):
    """transformers' TrainingArguments, as far as a trial may set them."""

    learning_rate: Annotated[float, Field(gt=0, le=1)]
    lr_scheduler_type: Literal["cosine", "cosine_with_restarts", "linear", "constant_with_warmup"]
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5)]
    warmup_steps: Annotated[int, Field(ge=0)] | None
    num_train_epochs: Annotated[float, Field(gt=0)]
    max_steps: Positive | None
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    activation_checkpointing: bool
    logging_steps: Positive
    eval_steps: Annotated[float, Field(gt=0)]
    early_stopping_patience: Positive
    early_stopping_threshold: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _whole_eval_steps(self) -> Training:
        if self.eval_steps >= 1 and self.eval_steps != int(self.eval_steps):
            raise ValueError(
                f"eval_steps={self.eval_steps} is neither a whole number of steps "
                "nor a fraction of the schedule below 1"
            )
        return self

    def warmup_length(self, total_steps: int) -> int:
        """Warm-up in optimiser steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Evaluation(Section):
    """How every model, tuned or not, is judged."""

    per_device_eval_batch_size: Positive


class TrialSettings(Section):
    """All that decides what one trial computes."""

    model: Model
    data: Data
    quantization: Quantization
    adapter: Annotated[LoraAdapter | NoAdapter, Field(discriminator="method")]
    training: Training
    evaluation: Evaluation
    seed: Annotated[int, Field(ge=0, lt=2**32)]

    @model_validator(mode="after")
    def _full_needs_full_precision(self) -> TrialSettings:
        if isinstance(self.adapter, NoAdapter) and self.quantization.load_in_4bit:
            raise ValueError(
                "adapter=none trains every weight, which a 4-bit base does not allow; "
                "add quantization=none"
            )
        return self


class FakeTrainer(Section):
    """What the fake trainer of workers=fake does: trial number -> what happens to it."""

    step_seconds: Annotated[float, Field(ge=0)]
    steps: Positive
    plan: dict[int, Literal["finish", "diverge", "oom", "hang", "crash", "error"]]


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


class Settings(TrialSettings):
    """The configuration of one `python -m sweeper` run: a trial and the machinery around it."""

    workers: Workers
    tracking: Tracking
    space: Space
    output_dir: str = Field(min_length=1)

    @property
    def trial(self) -> TrialSettings:
        """The part that decides what is computed, without the machinery."""
        return TrialSettings.model_validate(
            self.model_dump(include=set(TrialSettings.model_fields))
        )


class Sampler(Section):
    """Optuna's sampler; n_startup_trials=null follows the budget."""

    name: Literal["tpe", "random", "grid"]
    seed: Annotated[int, Field(ge=0)]
    n_startup_trials: Positive | None


class Pruner(Section):
    """Optuna's pruner behind the schedule-aware guard."""

    name: Literal["none", "median"]
    n_startup_trials: Annotated[int, Field(ge=0)]
    min_fraction: Annotated[float, Field(ge=0, le=1)]


class Arm(Section):
    """One arm besides `lora`: its overrides on top of the experiment, its space, its count."""

    overrides: list[str] = []
    n_trials: Positive
    sampler: Literal["tpe", "random", "grid"] | None = None
    params: dict[str, Any]
    priors: list[dict[str, Any]] = []


class Study(Section):
    """`hydra.sweeper`: the study as Hydra's Optuna users write it."""

    study_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    n_trials: Positive
    n_jobs: Positive
    storage: str | None
    direction: Literal["minimize"]
    sampler: Sampler
    pruner: Pruner
    params: dict[str, Any]
    priors: list[dict[str, Any]]
    arms: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Arm]

    @model_validator(mode="after")
    def _lora_is_the_search_itself(self) -> Study:
        if "lora" in self.arms:
            raise ValueError("arms.lora is hydra.sweeper.params itself; give the arm another name")
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
    shown = [part for part in location if part not in ADAPTER_METHODS]
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
        if part in ADAPTER_METHODS:
            section = ADAPTER_METHODS[part]
        elif part in section.model_fields:
            annotation = section.model_fields[part].annotation
            section = annotation if isinstance(annotation, type) else section
        elif section is Study:  # arms.<name>
            section = Arm
    return section
