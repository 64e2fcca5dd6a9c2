"""Train one trial on a loaded base: the reference path, transformers.Trainer.

Writes the trial's folder and tells an observer; knows neither the study nor MLflow, and does not load
models or data (sweeper.training.runner does).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sweeper.data.tokens import Collator, Encoded, Tokens
from sweeper.errors import ConfigError, Diverged
from sweeper.evaluation.loss import Loss, evaluate_loss, target_nll
from sweeper.folders import TrialFolder, size_mib, write_atomic
from sweeper.modeling.adapter import ParameterCount, count_parameters
from sweeper.outcome import Cause, Outcome, StopCause
from sweeper.settings import Training, TrialSettings
from sweeper.training.memory import peak_mib, reset_peak
from sweeper.training.observer import Observer

Judge = Callable[[torch.nn.Module], Loss]
PROGRESS_SECONDS = 0.5
TRAIN_METRICS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}


@dataclass
class Steps:
    """How many optimiser steps were taken, for whoever must know it after an exception."""

    taken: int = 0


@dataclass(frozen=True)
class TrialInputs:
    """What a trial is trained on: a model ready to train, its tokenizer, and the encoded splits."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    validation: Encoded
    compute_dtype: torch.dtype = torch.float32


def train_trial(
    inputs: TrialInputs,
    settings: TrialSettings,
    folder: TrialFolder,
    observer: Observer,
    steps: Steps,
) -> Outcome:
    """Train to the end of the schedule, to early stopping, or until the observer says stop.

    The best checkpoint by eval/loss is what stays in the model and in the folder, and its loss is the
    outcome's `best_value`. An unfinished checkpoint of an earlier attempt is continued.

    Raises:
        Diverged: the loss or the gradient norm is not finite.
        ConfigError: the schedule does not fit the data (warm-up as long as the run).
    """
    total_steps = schedule_length(settings.training, len(inputs.train.rows))
    reset_peak()
    resumed = newest_checkpoint(folder.checkpoints)
    spool = Spool(folder.metrics, resumed.step if resumed else 0)
    narrator = Narrator(observer, spool, total_steps, steps)
    trainer = JudgedTrainer(
        judge=_judge(inputs, settings),
        model=inputs.model,
        args=training_arguments(settings, total_steps, folder.checkpoints, inputs.compute_dtype),
        train_dataset=Rows(inputs.train.rows),
        eval_dataset=Rows(inputs.validation.rows),
        data_collator=Collator(_pad_id(inputs.tokenizer)),
        callbacks=[
            EarlyStoppingCallback(
                settings.training.early_stopping_patience,
                settings.training.early_stopping_threshold,
            ),
            narrator,
        ],
    )
    started = time.monotonic()
    result = trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
    seconds = time.monotonic() - started
    state = trainer.state
    save_artifact(inputs, folder)
    outcome = _outcome(state, narrator, count_parameters(inputs.model), seconds)
    outcome = outcome.model_copy(
        update={
            "metrics": {
                **outcome.metrics,
                **_finite({"train/mean_loss": float(result.training_loss)}),
                "cost/artifact_mib": size_mib(folder.artifact) if folder.artifact else 0.0,
            }
        }
    )
    return outcome


def schedule_length(training: Training, rows: int) -> int:
    """Optimiser steps of the whole schedule.

    Raises:
        ConfigError: warm-up takes the whole run or more.
    """
    batches = math.ceil(rows / training.per_device_train_batch_size)
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    total = training.max_steps or math.ceil(training.num_train_epochs * per_epoch)
    if training.warmup_steps is not None and training.warmup_steps >= total:
        raise ConfigError(
            [f"training.warmup_steps={training.warmup_steps}: the whole run has {total} steps"]
        )
    return total


def evaluate_every(training: Training, total_steps: int) -> int:
    """Optimiser steps between two evaluations; a fraction is of the whole schedule."""
    if training.eval_steps < 1:
        return max(1, round(training.eval_steps * total_steps))
    return int(training.eval_steps)


def training_arguments(
    settings: TrialSettings, total_steps: int, checkpoints: Path, compute_dtype: torch.dtype
) -> TrainingArguments:
    """transformers' arguments for a trial; compute dtypes below fp32 are autocast to."""
    training = settings.training
    cuda = torch.cuda.is_available()
    eval_steps = evaluate_every(training, total_steps)
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=total_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_length(total_steps),
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        optim=training.optim,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        activation_checkpointing=training.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=compute_dtype == torch.bfloat16,
        fp16=compute_dtype == torch.float16,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # the default hides a NaN behind the running mean
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=1,  # transformers keeps the best one besides
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        include_num_input_tokens_seen="non_padding",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


class Rows(Dataset[Tokens]):
    """Tokenized rows as torch wants them."""

    def __init__(self, rows: list[Tokens]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tokens:
        return self._rows[index]


class JudgedTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer with our loss and our evaluator in place of its batch means."""

    def __init__(self, *, judge: Judge, **options: Any) -> None:
        super().__init__(**options)
        self._judge = judge
        self.model_accepts_loss_kwargs = True  # compute_loss below divides by all tokens of a step

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Called for each micro-batch: its share of the mean over the whole step's target tokens."""
        assert not return_outputs, "evaluate() is replaced, nothing asks for outputs"
        assert num_items_in_batch is not None, "transformers counts the labels of a step"
        return target_nll(model, inputs) / num_items_in_batch

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Called by the training loop every eval_steps; early stopping reads `eval_loss`."""
        loss = self._judge(self.model)
        metrics = {"eval_loss": loss.mean, "eval_perplexity": loss.perplexity}
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


@dataclass
class Spool:
    """metrics.jsonl: one line per observation, appended at once, never over a network."""

    path: Path
    resumed_at: int

    def __post_init__(self) -> None:
        """A new attempt keeps what the earlier one wrote up to the step it continues from."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= self.resumed_at]
        write_atomic(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the finite ones of `metrics` (JSON and MLflow know no NaN)."""
        line = json.dumps({"step": step, "time": time.time(), **_finite(metrics)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf  # the torn last line of a killed attempt


@dataclass
class Narrator(TrainerCallback):  # type: ignore[misc]
    """Carries observations out of the training loop and the stop request into it."""

    observer: Observer
    spool: Spool
    total_steps: int
    steps: Steps
    stopped: StopCause | None = None
    evaluations: int = 0
    eval_seconds: float = 0.0
    resumed_tokens: int = 0
    """Tokens that earlier attempts saw; this attempt's rate is not theirs."""
    _last_progress: float = field(default=0.0, init=False)
    _started: float = field(default=0.0, init=False)
    _step_ended: float = field(default=0.0, init=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._started = self._step_ended = time.monotonic()
        self.resumed_tokens = int(state.num_input_tokens_seen)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step_ended = now = time.monotonic()
        if (
            state.global_step >= self.total_steps
        ):  # transformers evaluates multiples of eval_steps only
            control.should_evaluate = control.should_save = True
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            seen = state.num_input_tokens_seen - self.resumed_tokens
            rate = seen / max(now - self._started - self.eval_seconds, 1e-9)
            self.observer.progress(state.global_step, self.total_steps, rate)
        self.stopped = self.stopped or self.observer.stop_cause()
        if self.stopped:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: Any,
    ) -> None:
        metrics = {TRAIN_METRICS[name]: logs[name] for name in TRAIN_METRICS if name in logs}
        self.spool.write(state.global_step, metrics)
        for name in ("train/loss", "train/grad_norm"):
            if name in metrics and not math.isfinite(metrics[name]):
                raise Diverged(f"{name} is {metrics[name]} at step {state.global_step}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        self.evaluations += 1
        self.eval_seconds += time.monotonic() - self._step_ended
        if not math.isfinite(metrics["eval_loss"]):
            raise Diverged(f"eval/loss is {metrics['eval_loss']} at step {state.global_step}")
        named = {"eval/loss": metrics["eval_loss"], "eval/perplexity": metrics["eval_perplexity"]}
        self.spool.write(state.global_step, named)
        self.observer.evaluated(state.global_step, self.total_steps, metrics["eval_loss"])
        self.stopped = self.stopped or self.observer.stop_cause()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of an earlier attempt."""

    path: Path
    step: int


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint; transformers writes trainer_state.json last."""
    complete = (path.parent for path in folder.glob("checkpoint-*/trainer_state.json"))
    found = [Checkpoint(path, int(path.name.rpartition("-")[2])) for path in complete]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def save_artifact(inputs: TrialInputs, folder: TrialFolder) -> None:
    """Store the model as it stands: the adapter alone, or all weights of a full fine-tune."""
    target = folder.adapter if isinstance(inputs.model, PeftModel) else folder.model
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    options = {"save_embedding_layers": False} if isinstance(inputs.model, PeftModel) else {}
    inputs.model.save_pretrained(str(partial), **options)
    inputs.tokenizer.save_pretrained(str(partial))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON and MLflow know no NaN and no infinity."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _judge(inputs: TrialInputs, settings: TrialSettings) -> Judge:
    collator = Collator(_pad_id(inputs.tokenizer))
    rows, size = inputs.validation.rows, settings.evaluation.per_device_eval_batch_size
    return lambda model: evaluate_loss(model, rows, collator, size, inputs.compute_dtype)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert tokenizer.pad_token_id is not None, "load_base gives every tokenizer a padding token"
    return int(tokenizer.pad_token_id)


def _outcome(
    state: TrainerState, narrator: Narrator, parameters: ParameterCount, seconds: float
) -> Outcome:
    finished = state.global_step >= narrator.total_steps
    cause: Cause = "finished" if finished else (narrator.stopped or "early_stopped")
    best = state.best_metric
    train_seconds = max(seconds - narrator.eval_seconds, 1e-9)
    metrics = {
        "parameters/total": float(parameters.total),
        "parameters/trainable": float(parameters.trainable),
        "parameters/trainable_percent": parameters.percent,
        "parameters/trainable_percent_of_base": parameters.percent_of_base,
        "cost/train_seconds": train_seconds,
        "cost/eval_seconds": narrator.eval_seconds,
        "cost/tokens_per_second": (state.num_input_tokens_seen - narrator.resumed_tokens)
        / train_seconds,
        "cost/peak_memory_mib": peak_mib(),
    }
    if best is not None:
        metrics["best/eval_loss"] = float(best)
        metrics["best/eval_perplexity"] = math.exp(min(float(best), 700.0))
        metrics["best/step"] = float(state.best_global_step)
    return Outcome(
        cause=cause,
        best_value=None if best is None else float(best),
        best_step=None if best is None else int(state.best_global_step),
        steps=state.global_step,
        metrics=metrics,
    )
