"""Train one trial on a loaded base with transformers.Trainer, the reference path.

Writes the trial's folder and reports to an observer. Has no access to the study or MLflow, and loads
neither models nor data (sweeper.training.trial_runner does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
from sweeper.core.outcome import LOOK_ROWS, SELF_ENDED, Cause, Outcome
from sweeper.core.paths import TrialFolder, size_mib
from sweeper.core.spool import MetricsSpool, finite, read_spool
from sweeper.data.encode import EncodedSplit
from sweeper.data.packing import PackingCollator, packing_collator
from sweeper.data.padding_free import BatchCollator, PaddingFreeCollator, batch_collator
from sweeper.evaluation.custom_metrics import MetricFailed
from sweeper.evaluation.judge import Judgement, ModelJudge
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.modeling.adapter import count_parameters
from sweeper.training.arguments import training_arguments
from sweeper.training.artifact import TrainedModel, save_artifact
from sweeper.training.artifact_form import ArtifactForm
from sweeper.training.checkpoint import Checkpoint, fall_back, newest_checkpoint
from sweeper.training.distributed import SINGLE_PROCESS, RankGroup, RankSyncCallback
from sweeper.training.look_losses import LookLosses
from sweeper.training.micro_batch import halving, token_limit
from sweeper.training.observer import TrialObserver
from sweeper.training.outcome_metrics import (
    best_figures,
    look_at,
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
    form: ArtifactForm
    """The form that is stored with the trained model."""
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
    the objective, not the last one. If the trial ran to its own end, the kept checkpoint's value on
    the whole validation split is the outcome's `best_value`. Else no further judgement is made, and
    `best_value` is that of the look at the kept checkpoint.

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
        MetricFailed: the objective has no value. The artifact has been stored if training had ended.
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

    sample = trial_judge.judge.rows
    losses = LookLosses(folder.look_losses, sample, resumed.step if resumed else 0)

    def judge(model: torch.nn.Module) -> Judgement:
        began = time.process_time()
        # Ranks of a sharded model evaluate together, so the leader alone cannot retry a smaller batch
        judging = trial_judge.judge if settings.training.fsdp else trial_judge
        judgement = judging(model, JudgementReader.LOOK)
        costs.warn(judgement.failures)
        inputs.ranks.broadcast(dict(judgement.metrics))
        if settings.evaluation.look_rows is not None:  # whole splits may have 100,000 rows
            spent = time.process_time() - began
            losses.write(trainer.state.global_step, judgement.examples, spent)
        return judgement

    trainer = _trainer(inputs, settings, schedule, folder.checkpoints, judge, costs, [callback])
    with costs.stage("train"):
        trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
    cause = _cause(trainer.state, callback)
    kept = KeptCheckpoint(trainer, folder, inputs.judge, trial_judge)
    trained = trainer.trained

    def save(measured: Mapping[str, float]) -> None:
        if trained is not None:
            with costs.stage("save"):
                figures = {**costs.figures, **measured}
                stored = TrainedModel(trained, inputs.tokenizer, inputs.form)
                save_artifact(stored, settings, folder, figures)

    try:
        metrics = kept.metrics(costs, whole=cause in SELF_ENDED)
    except Exception:  # whatever fails here must not cost the training
        save({})
        raise
    save(metrics or {})
    if metrics is not None and objective.metric in costs.failures.keys() - metrics.keys():
        raise MetricFailed([costs.failures[objective.metric]])
    return _outcome(trainer.state, cause, settings, folder, metrics), trained


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
            judge(model, JudgementReader.LOOK)
        return Judgement(inputs.ranks.broadcast({}), (), JudgementReader.LOOK)

    trainer = _trainer(inputs, settings, schedule, checkpoints, receive_judgement, TrialCosts(), [])
    trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)


class BatchHalvingJudge:
    """A judge that halves its batches after out of memory. The metrics do not depend on the batch."""

    def __init__(self, judge: ModelJudge, costs: TrialCosts) -> None:
        self.judge = judge
        self._costs = costs

    def __call__(self, model: torch.nn.Module, reader: JudgementReader) -> Judgement:
        """Evaluate a model, with smaller batches after each out of memory, down to one example."""
        return self._retried(lambda judge: judge(model, reader))

    def with_answers(self, model: torch.nn.Module, judgement: Judgement) -> Judgement:
        """Add the model's answers to a judgement of its losses, in the same way."""
        return self._retried(lambda judge: judge.with_answers(model, judgement))

    def _retried(self, judging: Callable[[ModelJudge], Judgement]) -> Judgement:
        judgement, self.judge = halving(
            judging, self.judge, ModelJudge.halved, self._costs.count_retry
        )
        return judgement


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
        schedule=schedule,
        model=inputs.model,
        micro_batch_tokens=tokens,
        args=arguments,
        train_dataset=TokenizedRows(inputs.train.rows),
        # Trainer requires one, although JudgedTrainer.evaluate reads none
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


@dataclass(frozen=True)
class KeptCheckpoint:
    """The best checkpoint of a training that has ended, whose weights are in the model now."""

    trainer: JudgedTrainer
    folder: TrialFolder
    whole: ModelJudge
    """Judge of the whole validation split."""
    looks: BatchHalvingJudge
    """Judge of the looks that chose the checkpoint."""

    def metrics(self, costs: TrialCosts, *, whole: bool) -> dict[str, float] | None:
        """Return the checkpoint's metrics, or None if no checkpoint was ever evaluated.

        Args:
            costs: charged with the judgement, if one is made.
            whole: True for the metrics on the whole split, False for those of the trial's own look.
        """
        state = self.trainer.state
        if state.best_metric is None or self.trainer.trained is None:
            return None
        if whole:
            with costs.stage("eval"):
                judgement = self._judgement(costs)
            costs.warn(judgement.failures)
            return dict(judgement.metrics)
        look = look_at(read_spool(self.folder.metrics), int(state.best_global_step))
        rows = self.looks.judge.rows
        if look is None or len(rows) == len(self.whole.rows):
            return look
        return {**look, LOOK_ROWS: float(len(rows))}

    def _judgement(self, costs: TrialCosts) -> Judgement:
        judge = BatchHalvingJudge(self.whole, costs)
        look = self.trainer.judgements.get(self.trainer.state.best_global_step)
        # The look counts only if it was at the whole split, not at a sample
        if look is None or not self.looks.judge.judges_same_rows(self.whole):
            return judge(self.trainer.model, JudgementReader.RESULT)
        if self.looks.judge.held_out is not None:
            return look
        return judge.with_answers(self.trainer.model, look)


def _cause(state: TrainerState, callback: TrialCallback) -> Cause:
    """Return how the training ended."""
    if state.global_step >= callback.total_steps:
        return "finished"
    return callback.stopped or "early_stopped"


def _outcome(
    state: TrainerState,
    cause: Cause,
    settings: TrialSettings,
    folder: TrialFolder,
    kept: Mapping[str, float] | None,
) -> Outcome:
    rows = read_spool(folder.metrics)
    figures = loss_figures(rows)
    if kept is not None:
        figures |= best_figures(rows, kept, state.best_global_step)
    metrics = {
        **figures,
        "cost/peak_memory_mib": peak_mib(),
        "cost/artifact_mib": size_mib(folder.artifact) if folder.artifact else 0.0,
    }
    return Outcome(
        cause=cause,
        best_value=None if kept is None else kept.get(settings.objective.metric),
        best_step=None if kept is None else int(state.best_global_step),
        steps=state.global_step,
        metrics=finite(metrics),
    )
