"""Settings of one trial, and of one run around it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sweeper.config.data_settings import DataSettings
from sweeper.config.evaluation_settings import (
    DIRECTIONS,
    LOSS_METRICS,
    EvaluationSettings,
    Objective,
)
from sweeper.config.model_settings import (
    UNQUANTIZED,
    LoraAdapter,
    ModelSettings,
    NoAdapter,
    QuantizationSettings,
)
from sweeper.config.section import Positive, Seconds, SettingsSection
from sweeper.config.training_settings import ArtifactSettings, TrainingSettings
from sweeper.core.outcome import ServeForm


class TrialSettings(SettingsSection):
    """Every setting that decides what one trial computes."""

    model: ModelSettings
    data: DataSettings
    quantization: QuantizationSettings
    adapter: Annotated[LoraAdapter | NoAdapter, Field(discriminator="method")]
    training: TrainingSettings
    evaluation: EvaluationSettings
    objective: Objective
    artifacts: ArtifactSettings
    # numpy, which transformers seeds as well, takes seeds below 2**32
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    seed_init: Annotated[int, Field(ge=0, lt=2**32)] | None
    """Seed of the adapter's initialisation. null: `seed`."""
    seed_data: Annotated[int, Field(ge=0, lt=2**32)] | None
    """Seed of the order of the rows. null: `seed`."""

    @property
    def init_seed(self) -> int:
        """The seed of the adapter's initialisation."""
        return self.seed if self.seed_init is None else self.seed_init

    @property
    def order_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.seed_data is None else self.seed_data

    @model_validator(mode="after")
    def _objective_is_measured(self) -> TrialSettings:
        own = [f"eval/{name}" for name in self.evaluation.metrics]
        for key in ("metric", "pruning_metric"):
            name = getattr(self.objective, key)
            if name is None:
                continue
            if name not in {*DIRECTIONS, *own}:
                raise ValueError(
                    f"objective.{key}={name}: no such metric. Choose one of "
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
                    "evaluation.generation.num_examples=0 generates none. Set it to 1 or more"
                )
        return self

    @model_validator(mode="after")
    def _adapter_fits_quantization(self) -> TrialSettings:
        if misfit := _misfit(self.adapter, self.quantization.kind):
            raise ValueError(misfit)
        return self

    @model_validator(mode="after")
    def _fsdp_trains_every_weight(self) -> TrialSettings:
        if self.training.fsdp and isinstance(self.adapter, LoraAdapter):
            raise ValueError(
                "training.fsdp=true is for full fine-tuning (adapter=none). An adapter trains on "
                "several devices with training.devices_per_trial alone"
            )
        return self

    def with_rank(self, rank: int | None) -> Self:
        """Return the trial with its adapter's rank set, or the trial itself if it has no rank to set."""
        if rank is None or isinstance(self.adapter, NoAdapter):
            return self
        return self.model_copy(update={"adapter": self.adapter.with_rank(rank)})

    def served_as(self, form: ServeForm) -> Self:
        """Return the settings by which a LoRA trial's artifact is judged in a form.

        Full fine-tunes have one form, and their settings are returned unchanged.
        """
        if isinstance(self.adapter, NoAdapter):
            return self
        evaluation = self.evaluation.model_copy(update={"serve_as": form})
        base = self.quantization if form == "trained" else UNQUANTIZED
        return self.model_copy(update={"evaluation": evaluation, "quantization": base})

    @property
    def serve_forms(self) -> tuple[ServeForm, ...]:
        """The forms in which the trial's artifact can be served, the trained one first."""
        if isinstance(self.adapter, NoAdapter):
            return ()
        whole = self.quantization.kind == "none"
        return ("trained", "merged") if whole else ("trained", "unquantized", "merged")

    @property
    def structure(self) -> str:
        """Return the part that decides whether a trial is possible on its model, and its size.

        Trials of equal structure share one check. They may differ in learning rate, alpha, seed and
        data.
        """
        return json.dumps(
            {
                "model": self.model.model_dump(mode="json"),
                "quantization": self.quantization.model_dump(mode="json"),
                "adapter": self.adapter.model_dump(mode="json", exclude=WITHOUT_SIZE),
                "training": self.training.model_dump(mode="json", include=SIZED),
            }
        )


WITHOUT_SIZE = {"alpha_over_r", "lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio"}
"""Keys of `adapter` that change neither a shape nor whether a module is found."""
SIZED = {
    "activation_checkpointing",
    "devices_per_trial",
    "fsdp",
    "gradient_accumulation_steps",
    "loss_chunk_size",
    "optim",
    "per_device_train_batch_size",
}
"""Keys of `training` that memory depends on."""


def _misfit(adapter: LoraAdapter | NoAdapter, kind: str) -> str | None:
    """Return the reason why this adapter cannot be trained on a base with this quantization, or None."""
    if kind != "none" and isinstance(adapter, NoAdapter):
        return (
            f"adapter=none trains every weight, which a quantized base "
            f"({kind}) does not allow. Add quantization=none"
        )
    if kind == "int8" and isinstance(adapter, LoraAdapter) and adapter.use_dora:
        return (
            "adapter.use_dora=true does not work on an int8 base (PEFT cannot take the norm of its "
            "weights). Choose quantization=none, nf4 or fp4, or adapter.use_dora=false"
        )
    return None


class FakeTrainer(SettingsSection):
    """Behaviour of the fake trainer of workers=fake, by trial or finalist."""

    step_seconds: Annotated[float, Field(ge=0)]
    steps: Positive
    plan: dict[
        int,
        Literal["finish", "diverge", "oom", "native_oom", "hang", "crash", "context", "error"],
    ]
    finalists: dict[str, Literal["diverge", "oom", "hang", "crash", "error"]]
    requests: dict[Literal["probe", "check", "judge"], Literal["hang", "crash"]]
    """Requests of the driver that are not answered: the worker hangs or dies."""
    free_mib: Annotated[float, Field(gt=0)] | None
    """MiB that a trial may need before training. A larger one is refused."""
    room_mib: Annotated[float, Field(gt=0)] | None
    """MiB that a trial may need while it trains. A larger one runs out of memory."""


class WorkerSettings(SettingsSection):
    """Engine, number and time limits of the workers."""

    engine: Literal["local", "inline", "ray"]
    trainer: Literal["transformers", "fake"]
    address: Annotated[str, Field(pattern=r"^(auto|[\w.-]+:\d+)$")] | None
    """Address of the Ray cluster: HOST:PORT, auto (this node's), or null to start a cluster here."""
    trial_timeout_s: Seconds | None
    stall_timeout_s: Seconds | None
    probe_timeout_s: Seconds | None
    """Limit of a probe, a check or a judgement, which report no progress."""
    fake: FakeTrainer

    @model_validator(mode="after")
    def _address_is_rays(self) -> WorkerSettings:
        if self.address is not None and self.engine != "ray":
            raise ValueError(
                f"address={self.address!r} names a Ray cluster, but engine={self.engine}. "
                "Add workers=ray, or leave the address null"
            )
        return self


class TrackingSettings(SettingsSection):
    """Destination of the runs that are recorded."""

    kind: Literal["mlflow", "none"]
    uri: str | None


class SpaceSettings(SettingsSection):
    """Ranges that fit the size of the base model. Experiments refer to them by name."""

    learning_rate: str
    r: str
    alpha_over_r: str
    shared_params: dict[str, Any]
    """Keys that every arm searches: the length of the training and its batch."""
    equal: Literal["trials", "tokens"]
    """The budget that the arms of a comparison get in equal amounts."""
    priors: list[dict[str, Any]]
    full_learning_rate: str
    full_sampler: Literal["grid"] | None
    """null: the sampler of the study."""
    full_refine: bool
    full_n_trials: Positive
    full_priors: list[dict[str, Any]]


class StandInSettings(SettingsSection):
    """The small model and data that `+stand_in=tiny` uses instead of the real ones."""

    base_model: str
    train: str
    validation: str | None


class RunSettings(TrialSettings):
    """The configuration of one `python -m sweeper` run: a trial and the machinery around it."""

    workers: WorkerSettings
    tracking: TrackingSettings
    space: SpaceSettings
    stand_in: StandInSettings
    made_by: dict[str, Annotated[str, Field(pattern=r"^[ -~]{1,200}$")]]
    """Commands that make the files below a path, named where one of the files is missing."""
    output_dir: str = Field(min_length=1)
    verbosity: Literal["quiet", "normal", "verbose"]
    dry_run: bool

    @property
    def trial(self) -> TrialSettings:
        """The part that decides what is computed, without the machinery."""
        return TrialSettings.model_validate(
            self.model_dump(include=set(TrialSettings.model_fields))
        )
