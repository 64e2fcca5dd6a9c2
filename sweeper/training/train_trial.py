"""Train one trial on a loaded base with transformers.Trainer, the reference path.

Writes the trial's folder and reports to an observer. Has no access to the study or MLflow, and loads
neither models nor data (sweeper.training.trial_runner does).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)

from sweeper.config.settings import TrialSettings
from sweeper.core.outcome import Cause, Outcome
from sweeper.core.paths import TrialFolder, size_mib
from sweeper.core.spool import MetricsSpool, finite, read_spool
from sweeper.data.encode import EncodedSplit
from sweeper.data.packing import PackingCollator, packing_collator
from sweeper.data.padding_free import BatchCollator, PaddingFreeCollator, batch_collator
from sweeper.evaluation.judge import Judgement, ModelJudge
from sweeper.modeling.adapter import count_parameters
from sweeper.training.arguments import training_arguments
from sweeper.training.artifact import TrainedModel, save_artifact
from sweeper.training.checkpoint import Checkpoint, fall_back, newest_checkpoint
from sweeper.training.distributed import SINGLE_PROCESS, RankGroup, RankSyncCallback
from sweeper.training.micro_batch import out_of_memory, token_limit
from sweeper.training.observer import TrialObserver
from sweeper.training.outcome_metrics import (
    best_figures,
    loss_figures,
    parameter_figures,
    schedule_figures,
)
from sweeper.training.peak_memory import peak_mib, reset_peak
from sweeper.training.schedule import TrialSchedule, plan_schedule
from sweeper.training.sharded_trainer import ShardedTrainer
from sweeper.training.stop_rules import StopRules
from sweeper.training.trainer import JudgedTrainer, Judging, TokenizedRows
from sweeper.training.trial_callback import TrialCallback
from sweeper.training.trial_costs import TrialCosts


@dataclass(frozen=True)
class TrialInputs:
    """The model, data and judge of one trial."""

    model: PreTrainedModel | PeftModel
    """The model, ready to train. Its weights are spread over the ranks with training.fsdp."""
    tokenizer: PreTrainedTokenizerBase
    train: EncodedSplit
    judge: ModelJudge
    """Judge of the whole validation split, for the best checkpoint."""
    ordered: bool = False
    """True if the rows must be trained in their order (data.order_by)."""
    compute_dtype: torch.dtype = torch.float32
    ranks: RankGroup = SINGLE_PROCESS


def train_trial(
    inputs: TrialInputs,
    settings: TrialSettings,
    folder: TrialFolder,
    observer: TrialObserver,
    costs: TrialCosts,
) -> tuple[Outcome, PreTrainedModel | PeftModel | None]:
    """Train until the schedule ends, early stopping applies or the observer requests a stop.

    Continue from the newest undamaged checkpoint of an earlier attempt. Store the best checkpoint by
    the objective, not the last one. Its value on the whole validation split is the outcome's
    `best_value`.

    Args:
        inputs: model, data and judge.
        settings: the trial, resolved (sweeper.training.micro_batch.resolve).
        folder: the trial's folder.
        observer: receives every step and evaluation, and can request a stop.
        costs: charged with what the trial uses.

    Returns:
        The outcome and the model with the best weights. The model is None if its weights are spread
        over devices and were never evaluated.

    Raises:
        TrialDiverged: a loss or the gradient norm is not finite, or the loss is far above the first.
        ConfigError: the schedule does not fit the data, or the objective's metric is not measured.
    """
    schedule = plan_schedule(settings.training, len(inputs.train.rows))
    costs.figures |= parameter_figures(count_parameters(inputs.model))
    costs.figures |= schedule_figures(settings.training, schedule)
    reset_peak()
    resumed = _find_resume_point(folder, costs)
    objective = settings.objective
    rules = StopRules(settings.training, objective, schedule.total_steps)
    spool = MetricsSpool(folder.metrics, resumed.step if resumed else 0)
    rules.replay(read_spool(folder.metrics))
    pruning_metric = objective.judged_while_training
    callback = TrialCallback(observer, spool, rules, costs, schedule.total_steps, pruning_metric)
    trial_judge = BatchHalvingJudge(
        inputs.judge.within_trial({objective.metric, pruning_metric}), costs
    )

    def judge(model: torch.nn.Module) -> Judgement:
        # Ranks of a sharded model evaluate together, so the leader alone cannot retry a smaller batch
        judgement = trial_judge.judge(model) if settings.training.fsdp else trial_judge(model)
        inputs.ranks.broadcast(dict(judgement.metrics))
        return judgement

    trainer = _trainer(inputs, settings, schedule, folder.checkpoints, judge, costs, [callback])
    with costs.stage("train"):
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
    judgement = _judge_best_checkpoint(trainer, inputs.judge, trial_judge, costs)
    trained = trainer.trained
    if trained is not None:
        with costs.stage("save"):
            figures = {**costs.figures, **({} if judgement is None else judgement.metrics)}
            save_artifact(TrainedModel(trained, inputs.tokenizer), settings, folder, figures)
    return _outcome(trainer.state, callback, settings, folder, judgement), trained


def _find_resume_point(folder: TrialFolder, costs: TrialCosts) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None, and log the damaged ones."""
    resumed, damaged = fall_back(folder.checkpoints)
    start = f"from step {resumed.step}" if resumed else "from the beginning"
    if resumed or damaged:
        reason = f", because {' and '.join(damaged)}" if damaged else ""
        costs.facts["Continued"] = start + reason
    for remark in damaged:
        print(f"{folder.path}: {remark}. Continued {start}", flush=True)
    return resumed


def follow_trial(inputs: TrialInputs, settings: TrialSettings, checkpoints: Path) -> None:
    """Run the training loop on this rank's share of the batches of a trial that another rank leads.

    Args:
        inputs: the same inputs as the leader's.
        settings: the leader's resolved settings.
        checkpoints: the leader's folder of checkpoints, which also decides where to resume.
    """
    schedule = plan_schedule(settings.training, len(inputs.train.rows))
    resumed = newest_checkpoint(checkpoints)
    objective = settings.objective
    judged = {objective.metric, objective.judged_while_training}
    # All ranks must run the forward passes of a sharded model. Only the leader calls the user's metrics
    judge = replace(inputs.judge.within_trial(judged), custom={})

    def receive_judgement(model: torch.nn.Module) -> Judgement:
        if settings.training.fsdp:
            judge(model)
        return Judgement(inputs.ranks.broadcast({}), examples=())

    trainer = _trainer(inputs, settings, schedule, checkpoints, receive_judgement, TrialCosts(), [])
    trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)


class BatchHalvingJudge:
    """A judge that halves its batches after out of memory. The metrics do not depend on the batch."""

    def __init__(self, judge: ModelJudge, costs: TrialCosts) -> None:
        self.judge = judge
        self._costs = costs

    def __call__(self, model: torch.nn.Module) -> Judgement:
        """Evaluate a model, with smaller batches after each out of memory, down to one example."""
        while True:
            try:
                return self.judge(model)
            except (MemoryError, RuntimeError) as error:
                smaller = self.judge.halved()
                if not out_of_memory(error) or smaller is None:
                    raise
            self.judge = smaller
            self._costs.oom_retries += 1


def _trainer(
    inputs: TrialInputs,
    settings: TrialSettings,
    schedule: TrialSchedule,
    checkpoints: Path,
    judging: Judging,
    costs: TrialCosts,
    callbacks: list[TrainerCallback],
) -> JudgedTrainer:
    kind = ShardedTrainer if settings.training.fsdp else JudgedTrainer
    collator = _collator(inputs, settings)
    padding_free = isinstance(collator, PaddingFreeCollator)
    rows = settings.training.per_device_train_batch_size
    tokens = token_limit(inputs.train.rows, rows) if padding_free else None
    if tokens is not None:
        costs.facts["Micro-batches"] = (
            f"at most {tokens:,} tokens, those of the {rows} longest rows"
        )
    arguments = training_arguments(
        settings,
        schedule,
        checkpoints,
        inputs.compute_dtype,
        ordered=inputs.ordered,
        whole_steps=padding_free,
    )
    trainer = kind(
        judging=judging,
        costs=costs,
        settings=settings,
        compute_dtype=inputs.compute_dtype,
        ranks=inputs.ranks,
        model=inputs.model,
        micro_batch_tokens=tokens,
        args=arguments,
        train_dataset=TokenizedRows(inputs.train.rows),
        eval_dataset=TokenizedRows(list(inputs.judge.rows)),
        data_collator=collator,
        callbacks=[*callbacks, RankSyncCallback(inputs.ranks)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints what the spool already contains
    return trainer


def _collator(inputs: TrialInputs, settings: TrialSettings) -> BatchCollator | PackingCollator:
    pad = inputs.tokenizer.pad_token_id
    assert pad is not None, "load_base gives every tokenizer a padding token"
    # A checkpoint does not depend on the form of the batches: the same rows give the same gradient up
    # to rounding, so a trial that was begun with padded batches continues without padding
    collator = batch_collator(inputs.model, int(pad))
    if settings.data.packing and not isinstance(collator, PaddingFreeCollator):
        return packing_collator(settings.model.attn_implementation, int(pad))
    return collator


def _judge_best_checkpoint(
    trainer: JudgedTrainer, whole: ModelJudge, trial_judge: BatchHalvingJudge, costs: TrialCosts
) -> Judgement | None:
    """Evaluate the best checkpoint, now in the model, on the whole validation split.

    Return None if no checkpoint was ever evaluated.
    """
    step = trainer.state.best_global_step
    if trainer.state.best_metric is None or trainer.trained is None:
        return None
    # An evaluation during training counts only if it was on the whole split, not on a capped sample.
    if trial_judge.judge.judges_same_examples(whole) and step in trainer.judgements:
        return trainer.judgements[step]
    with costs.stage("eval"):
        return BatchHalvingJudge(whole, costs)(trainer.model)


def _outcome(
    state: TrainerState,
    callback: TrialCallback,
    settings: TrialSettings,
    folder: TrialFolder,
    judgement: Judgement | None,
) -> Outcome:
    finished = state.global_step >= callback.total_steps
    cause: Cause = "finished" if finished else (callback.stopped or "early_stopped")
    rows = read_spool(folder.metrics)
    figures = loss_figures(rows)
    if judgement is not None:
        figures |= best_figures(rows, judgement.metrics, state.best_global_step)
    metrics = {
        **figures,
        "cost/peak_memory_mib": peak_mib(),
        "cost/artifact_mib": size_mib(folder.artifact) if folder.artifact else 0.0,
    }
    return Outcome(
        cause=cause,
        best_value=None if judgement is None else judgement.value(settings.objective.metric),
        best_step=None if judgement is None else int(state.best_global_step),
        steps=state.global_step,
        metrics=finite(metrics),
    )
