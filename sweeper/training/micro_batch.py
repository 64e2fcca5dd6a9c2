"""Split an optimiser step's examples into micro-batches, and halve those after out of memory.

A micro-batch without padding is limited in tokens: to those that its number of rows may have at most.

The effective batch never changes here, because it affects the result. transformers'
auto_find_batch_size would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import TypeVar

from sweeper.config.settings import TrialSettings
from sweeper.core.device_failures import means_out_of_memory
from sweeper.core.errors import first_line
from sweeper.data.tokens import Tokens

Knob = TypeVar("Knob")
Result = TypeVar("Result")
Fits = Callable[[TrialSettings], bool | None]
"""Returns True if a trial with exactly these settings fits in the device's memory, None if unknown."""


def split_batch(effective: int, limit: int, devices: int = 1) -> tuple[int, int]:
    """Return the largest micro-batch up to `limit` that divides the batch, and the accumulation steps.

    Args:
        effective: examples per optimiser step, over all devices.
        limit: examples that a micro-batch may have at most.
        devices: devices that share the accumulated micro-batches equally.
    """
    share = effective // devices
    micro = next(size for size in range(min(share, limit), 0, -1) if share % size == 0)
    return micro, effective // micro


def resolve(settings: TrialSettings, fits: Fits, *, on_gpu: bool) -> TrialSettings:
    """Replace activation_checkpointing=auto and micro_batch=largest by what memory allows.

    Decide checkpointing first, for the configured micro-batch. If `fits` gives no answer, recompute
    activations on a GPU only and keep the configured micro-batch.
    """
    settings = with_micro_batch(settings, settings.training.per_device_train_batch_size)
    if settings.training.activation_checkpointing == "auto":
        fit = fits(_with(settings, activation_checkpointing=False))
        settings = _with(settings, activation_checkpointing=on_gpu if fit is None else not fit)
    if settings.training.micro_batch == "largest":
        settings = _with_largest(settings, fits)
    return settings


def halved(settings: TrialSettings) -> TrialSettings | None:
    """Return settings with micro-batches of at most half the size, or None below one example.

    The effective batch stays the same.
    """
    training = settings.training
    # The ranks of a sharded trial evaluate together, so one rank alone cannot retry a smaller batch
    judged = settings.evaluation.halved() if training.fsdp else None
    if training.per_device_train_batch_size == 1 and judged is None:
        return None
    if judged is not None:
        settings = settings.model_copy(update={"evaluation": judged})
    return with_micro_batch(settings, max(1, training.per_device_train_batch_size // 2))


def with_micro_batch(settings: TrialSettings, limit: int) -> TrialSettings:
    """Return settings with the same effective batch in the largest micro-batches up to `limit`."""
    training = settings.training
    micro, accumulation = split_batch(
        training.effective_batch_size, limit, training.devices_per_trial
    )
    return _with(
        settings, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
    )


def token_limit(rows: Sequence[Tokens], size: int) -> int:
    """Return the tokens of the `size` longest rows, which `size` rows never exceed."""
    return sum(nlargest(size, (len(row["input_ids"]) for row in rows)))


def smallest_form(settings: TrialSettings) -> TrialSettings:
    """Return the settings that need least memory: single rows, activations recomputed if allowed."""
    checkpointing = settings.training.activation_checkpointing is not False
    return _with(with_micro_batch(settings, 1), activation_checkpointing=checkpointing)


def out_of_memory(error: BaseException) -> bool:
    """Return True if an exception of Python, torch or bitsandbytes means that memory ran out."""
    # torch's CPU allocator raises a plain RuntimeError, so the text decides
    return isinstance(error, MemoryError) or means_out_of_memory(str(error))


class StageOutOfMemory(MemoryError):
    """Memory ran out in a stage whose own batch is one example, so no smaller training batch helps."""


def halving(
    run: Callable[[Knob], Result],
    knob: Knob,
    smaller: Callable[[Knob], Knob | None],
    retried: Callable[[], None],
) -> tuple[Result, Knob]:
    """Run a stage of a trial, with half the batch after each out of memory.

    Args:
        run: the stage, with the thing that sets its batch.
        knob: what sets the batch of the first try.
        smaller: returns the knob with half the batch, or None below one example.
        retried: called before each further try.

    Returns:
        The stage's result, and the knob of the try that had enough memory.

    Raises:
        StageOutOfMemory: one example at a time needs too much memory.
    """
    while True:
        try:
            return run(knob), knob
        except (MemoryError, RuntimeError) as error:
            half = smaller(knob)
            if not out_of_memory(error):
                raise
            if half is None:
                raise StageOutOfMemory(first_line(error)) from error
        # Memory of the failed try is free only after the except block, which holds its traceback
        knob = half
        retried()


def _with_largest(settings: TrialSettings, fits: Fits) -> TrialSettings:
    limit = settings.training.effective_batch_size // settings.training.devices_per_trial
    while limit > settings.training.per_device_train_batch_size:
        larger = with_micro_batch(settings, limit)
        # An unknown need (None) counts as too large
        if fits(larger):
            return larger
        # `larger` was rounded down to a divisor of the batch, so the next one lies below it
        limit = larger.training.per_device_train_batch_size - 1
    return settings


def _with(settings: TrialSettings, **changes: object) -> TrialSettings:
    training = settings.training.model_copy(update=changes)
    return settings.model_copy(update={"training": training})
