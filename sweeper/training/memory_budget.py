"""Estimate how much of the device's memory trials need, and refuse those that cannot fit.

On a CPU only the memory that is independent of the batch is compared. A simulated step costs as much as
a small trial there, recomputing activations gains nothing, and the resident size depends more on the
allocator than on the trial. dry_run=true prints the whole estimate on any machine.
"""

from __future__ import annotations

from heapq import nlargest

import torch

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DoesNotFit
from sweeper.core.outcome import TrialSize
from sweeper.core.value import MemoryShortfall
from sweeper.data.tokens import IGNORED, Tokens
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.micro_batch import Fits, smallest_form, token_limit
from sweeper.training.prepared_data import PreparedData

USABLE_MEMORY = 0.8
"""Share of the free memory that an estimate may reach before activations are recomputed."""

CONTEXT_MIB = 512
"""MiB of a GPU's memory that the CUDA context takes, so no tensor can use them."""


class MemoryBudget:
    """The memory of this process's device. Estimates are cached."""

    def __init__(self) -> None:
        self._estimates: dict[str, float] = {}

    def fits(self, prepared: PreparedData, *, padding_free: bool = False) -> Fits:
        """Return `Fits` for trials on these data. On a CPU it answers None."""
        free = _available_mib()

        def fit(settings: TrialSettings) -> bool | None:
            needed = self.estimate_mib(settings, prepared, padding_free=padding_free)
            return None if needed is None else needed < USABLE_MEMORY * free

        return fit

    def require(
        self, settings: TrialSettings, size: TrialSize, prepared: PreparedData | None
    ) -> None:
        """Refuse a trial that exceeds the device's memory even in its smallest form.

        Args:
            settings: the trial, with its rank decided.
            size: the trial's parameters and the MiB it holds independently of the batch.
            prepared: the trial's data, or None if this worker has not loaded them yet. Activations are
                not counted without data.

        Raises:
            DoesNotFit: states the MiB needed and the MiB available.
        """
        on = device()
        # Total, not free memory: other processes' use of the device is no property of the trial.
        # No margin either: the estimate counts tensors alone, and all measured trainings needed 2 to
        # 22 % more (benchmarks/memory_estimate.json), so nothing that would fit is refused
        have = device_report(on).total_mib - (CONTEXT_MIB if on.type == "cuda" else 0)
        if size.held_mib > have:
            raise DoesNotFit(MemoryShortfall(need_mib=size.held_mib, have_mib=have))
        least = None if prepared is None else self.estimate_mib(smallest_form(settings), prepared)
        if least is not None and least > have:
            what = "weights, optimizer states and the activations of one row"
            raise DoesNotFit(MemoryShortfall(need_mib=least, have_mib=have, what=what))

    def estimate_mib(
        self, settings: TrialSettings, prepared: PreparedData, *, padding_free: bool = False
    ) -> float | None:
        """Return the peak MiB of a step on a batch of the longest rows, or None on a CPU.

        Args:
            settings: the trial.
            prepared: the trial's data.
            padding_free: True if micro-batches have no padding, so that their memory is their tokens.
        """
        if device().type == "cpu":
            return None
        rows = prepared.train.rows
        size = settings.training.per_device_train_batch_size if padding_free else 1
        length = token_limit(rows, size)
        targets = sum(nlargest(size, (_targets(row) for row in rows)))
        key = f"{length} {targets} {padding_free} {settings.structure}"
        if key not in self._estimates:
            estimate = estimate_trial(
                settings, device(), length=length, targets=targets, padding_free=padding_free
            )
            self._estimates[key] = estimate.total
        return self._estimates[key]


def _targets(row: Tokens) -> int:
    return sum(label != IGNORED for label in row["labels"])


def _available_mib() -> float:
    """Return the MiB that a trial can use: free memory and what this process holds already."""
    # The reserved part holds the warm base and torch's cache, which the trial uses as well
    return device_report(device()).free_mib + torch.cuda.memory_reserved() / 2**20
