"""Train one trial on a loaded base: the reference path, transformers.Trainer.

Writes the trial's folder and tells an observer; knows neither the study nor MLflow, and does not load
models or data (sweeper.training.runner does).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerState,
)

from sweeper.data.tokens import Collator, Encoded
from sweeper.evaluation.loss import Loss, evaluate_loss
from sweeper.folders import TrialFolder, size_mib
from sweeper.modeling.adapter import count_parameters
from sweeper.outcome import Cause, Outcome
from sweeper.settings import TrialSettings
from sweeper.training.arguments import training_arguments
from sweeper.training.artifact import Trained, save_artifact
from sweeper.training.batch import out_of_memory
from sweeper.training.checkpoint import newest_checkpoint
from sweeper.training.figures import loss_figures, parameter_figures, schedule_figures
from sweeper.training.meter import Meter
from sweeper.training.memory import peak_mib, reset_peak
from sweeper.training.narrator import Narrator
from sweeper.training.observer import Observer
from sweeper.training.rules import Watch
from sweeper.training.schedule import plan_schedule
from sweeper.training.spool import Spool, finite, read_spool
from sweeper.training.trainer import JudgedTrainer, Rows


@dataclass(frozen=True)
class TrialInputs:
    """What a trial is trained on: a model ready to train, its tokenizer, and the encoded splits."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    validation: Encoded
    compute_dtype: torch.dtype = torch.float32
    loraplus_lr_ratio: float | None = None


def train_trial(
    inputs: TrialInputs,
    settings: TrialSettings,
    folder: TrialFolder,
    observer: Observer,
    meter: Meter,
) -> Outcome:
    """Train to the end of the schedule, to early stopping, or until the observer says stop.

    The best checkpoint by eval/loss is what stays in the model and in the folder, and its loss is the
    outcome's `best_value`. An unfinished checkpoint of an earlier attempt is continued.

    Args:
        inputs: model and data.
        settings: resolved (sweeper.training.batch.resolve).
        folder: where everything is written.
        observer: told of every step and evaluation, asked whether to stop.
        meter: charged with what the trial uses.

    Raises:
        Diverged: a loss or the gradient norm is not finite, or the loss is far off.
        ConfigError: the schedule does not fit the data.
    """
    schedule = plan_schedule(settings.training, len(inputs.train.rows))
    meter.figures |= parameter_figures(count_parameters(inputs.model))
    meter.figures |= schedule_figures(settings.training, schedule)
    reset_peak()
    resumed = newest_checkpoint(folder.checkpoints)
    spool = Spool(folder.metrics, resumed.step if resumed else 0)
    watch = Watch(settings.training, schedule.total_steps)
    watch.replay(read_spool(folder.metrics))
    narrator = Narrator(observer, spool, watch, meter, schedule.total_steps)
    trainer = JudgedTrainer(
        judge=Evaluator(inputs, settings, meter),
        meter=meter,
        loraplus_lr_ratio=inputs.loraplus_lr_ratio,
        model=inputs.model,
        args=training_arguments(settings, schedule, folder.checkpoints, inputs.compute_dtype),
        train_dataset=Rows(inputs.train.rows),
        eval_dataset=Rows(inputs.validation.rows),
        data_collator=Collator(_pad_id(inputs.tokenizer)),
        callbacks=[narrator],
    )
    trainer.remove_callback(PrinterCallback)  # the spool has it all
    with meter.stage("train"):
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
    with meter.stage("save"):
        save_artifact(Trained(inputs.model, inputs.tokenizer), settings, folder)
    return _outcome(trainer.state, narrator, folder)


class Evaluator:
    """The validation loss of a model, in the largest batches that memory allows (any give the same)."""

    def __init__(self, inputs: TrialInputs, settings: TrialSettings, meter: Meter) -> None:
        self._rows = inputs.validation.rows
        self._collator = Collator(_pad_id(inputs.tokenizer))
        self._compute_dtype = inputs.compute_dtype
        self._size = settings.evaluation.per_device_eval_batch_size
        self._meter = meter

    def __call__(self, model: torch.nn.Module) -> Loss:
        """Judge a model; out of memory halves the batch, down to one example."""
        while True:
            try:
                return evaluate_loss(
                    model, self._rows, self._collator, self._size, self._compute_dtype
                )
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self._size == 1:
                    raise
            self._size //= 2
            self._meter.oom_retries += 1


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert tokenizer.pad_token_id is not None, "load_base gives every tokenizer a padding token"
    return int(tokenizer.pad_token_id)


def _outcome(state: TrainerState, narrator: Narrator, folder: TrialFolder) -> Outcome:
    finished = state.global_step >= narrator.total_steps
    cause: Cause = "finished" if finished else (narrator.stopped or "early_stopped")
    best = None if state.best_metric is None else float(state.best_metric)
    best_step = None if best is None else int(state.best_global_step)
    metrics = {
        **loss_figures(read_spool(folder.metrics), best, best_step),
        "cost/peak_memory_mib": peak_mib(),
        "cost/artifact_mib": size_mib(folder.artifact) if folder.artifact else 0.0,
    }
    return Outcome(
        cause=cause,
        best_value=best,
        best_step=best_step,
        steps=state.global_step,
        metrics=finite(metrics),
    )
