"""Convert settings into optimiser steps: length, warm-up, and intervals of evaluation and saving.

Pure arithmetic, without torch and transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sweeper.config.settings import LoraAdapter, TrainingSettings, TrialSettings
from sweeper.core.errors import ConfigError

FEW_STEPS = 40
"""Steps of a run up to which one step at a rate of zero is a noticeable share of it (2.5 %)."""
LARGE_BATCH = 32
"""Examples per step above which LoRA falls behind full fine-tuning (LoRA Without Regret, 2025)."""


@dataclass(frozen=True)
class TrialSchedule:
    """A trial's schedule. All fields count optimiser steps, except `last_batch`."""

    total_steps: int
    steps_per_epoch: int
    last_batch: int
    """Examples in the last step of an epoch, at most the effective batch."""
    warmup_steps: int
    eval_every: int
    save_every: int
    first_look: int
    """Step of the first evaluation. One more than total_steps: only the end is evaluated."""

    def warmup_factor(self, step: int) -> float | None:
        """Return the share of the peak rate in a step of the warm-up, or None to leave it as it is.

        transformers begins every warm-up at a rate of zero. A run of few steps would lose its first
        step, and a run of one step all of its training.

        Args:
            step: number of the step, from 0.
        """
        if self.total_steps > FEW_STEPS or step >= self.warmup_steps:
            return None
        return (step + 1) / (self.warmup_steps + 1)


def plan_schedule(training: TrainingSettings, rows: int) -> TrialSchedule:
    """Return the schedule of a trial with `rows` training rows.

    Raises:
        ConfigError: warm-up takes more than half of the run, or save_steps is no multiple of
            eval_steps.
    """
    effective = training.effective_batch_size
    per_epoch = math.ceil(rows / effective)
    total = training.max_steps or math.ceil(training.num_train_epochs * per_epoch)
    every = evaluate_every(training, total, per_epoch)
    problems = [*_warmup_problems(training, total), *_save_problems(training, every, per_epoch)]
    if problems:
        raise ConfigError(problems)
    return TrialSchedule(
        total_steps=total,
        steps_per_epoch=per_epoch,
        last_batch=rows - effective * (per_epoch - 1),
        warmup_steps=training.warmup_length(total),
        eval_every=every,
        save_every=every * int(_saves_per_evaluation(training, every, per_epoch)),
        first_look=first_look(training, total, every),
    )


def evaluate_every(training: TrainingSettings, total_steps: int, steps_per_epoch: int) -> int:
    """Return the optimiser steps between two evaluations. One more evaluation follows the last step."""
    steps = training.eval_steps
    if steps == "epoch":
        return steps_per_epoch
    return max(1, round(steps * total_steps)) if steps < 1 else int(steps)


def first_look(training: TrainingSettings, total_steps: int, every: int) -> int:
    """Return the step of the first evaluation, a multiple of `every`."""
    delay = training.eval_delay
    steps = delay * total_steps if delay < 1 else delay
    # Intervals are rounded to steps: of 100 steps an eighth is 12, and the second look, at 24, is the
    # one at a quarter
    return every * max(1, math.ceil(steps / every - 0.25))


def look_steps(schedule: TrialSchedule) -> list[int]:
    """Return the steps after which a trial is evaluated: from the first look on, and at the end."""
    steps = range(schedule.first_look, schedule.total_steps, schedule.eval_every)
    return [*steps, schedule.total_steps]


def advice(settings: TrialSettings, rows: int) -> list[str]:
    """Return a sentence for each setting that is allowed but rarely intended."""
    effective = settings.training.effective_batch_size
    found: list[str] = []
    if effective > LARGE_BATCH and isinstance(settings.adapter, LoraAdapter):
        found.append(
            f"effective batch {effective}: above {LARGE_BATCH}, LoRA learns less per example than "
            "full fine-tuning"
        )
    if effective > rows:
        found.append(f"effective batch {effective} is larger than the {rows} training rows")
    return found


def _warmup_problems(training: TrainingSettings, total: int) -> list[str]:
    """Return a message if the warm-up in steps takes more than half of the run."""
    steps = training.warmup_steps  # the settings' own validation limits warmup_ratio
    if steps is None or training.lr_scheduler_type == "constant" or 2 * steps <= total:
        return []
    return [
        f"training.warmup_steps={steps} is more than half of the run, which has {total} steps. "
        f"Set at most {total // 2}, or training.warmup_steps=null and a warmup_ratio"
    ]


def _save_problems(training: TrainingSettings, every: int, per_epoch: int) -> list[str]:
    ratio = _saves_per_evaluation(training, every, per_epoch)
    if ratio >= 1 and ratio == int(ratio):
        return []
    return [
        f"training.save_steps={training.save_steps} is not a multiple of "
        f"training.eval_steps={training.eval_steps} (every checkpoint needs an evaluation). "
        "Set training.save_steps=null to save at every evaluation"
    ]


def _saves_per_evaluation(training: TrainingSettings, every: int, per_epoch: int) -> float:
    """Return the number of evaluations per periodic checkpoint."""
    save, evaluate = training.save_steps, training.eval_steps
    if save is None or save == evaluate:
        return 1.0
    if save == "epoch":
        return per_epoch / every
    # Fractions of the run are compared as configured: rounded to steps, 0.5 need not be twice 0.25
    if save < 1 and evaluate != "epoch" and evaluate < 1:
        return round(save / evaluate, 9)
    return save / every
