"""Room: what trials are estimated to need of a device's memory, and whether they fit.

On a CPU only what is held whatever the batch is compared: a rehearsal costs as much as a small trial,
recomputing activations gains nothing there, and the resident size depends more on the allocator than on
the trial. dry_run=true prints the whole estimate on any machine.
"""

from __future__ import annotations

import torch

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import DoesNotFit
from sweeper.core.outcome import TrialSize
from sweeper.core.value import MemoryShortfall
from sweeper.data.tokens import IGNORED
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.training.micro_batch import Fits, sparing
from sweeper.training.prepared_data import PreparedData

USABLE_MEMORY = 0.8
"""Of what is free: the share that an estimate may reach before memory is saved by recomputing."""

CONTEXT_MIB = 512
"""Of a GPU that no tensor gets: the CUDA context."""


class MemoryBudget:
    """The memory of this process's device; every estimate is made once."""

    def __init__(self) -> None:
        self._estimates: dict[str, float] = {}

    def fits(self, prepared: PreparedData) -> Fits:
        """Whether a trial on these data fits; not known on a CPU."""
        free = _available_mib()

        def fit(settings: TrialSettings) -> bool | None:
            needed = self.estimate_mib(settings, prepared)
            return None if needed is None else needed < USABLE_MEMORY * free

        return fit

    def require(
        self, settings: TrialSettings, size: TrialSize, prepared: PreparedData | None
    ) -> None:
        """Refuse a trial that is larger than the device in its most sparing form.

        Compared is with all the memory of the device, whoever uses it at the moment. No margin is added
        to the estimate: it counts tensors alone, and all measured trainings needed 2 to 22 % more
        (benchmarks/memory_estimate.json), so nothing is refused that would fit.

        Args:
            settings: with its rank decided.
            size: its size.
            prepared: its data; None if they are not known here yet, then no activation is counted.

        Raises:
            DoesNotFit: with what it needs, and what the device has.
        """
        on = device()
        have = device_report(on).total_mib - (CONTEXT_MIB if on.type == "cuda" else 0)
        if size.held_mib > have:
            raise DoesNotFit(MemoryShortfall(need_mib=size.held_mib, have_mib=have))
        least = None if prepared is None else self.estimate_mib(sparing(settings), prepared)
        if least is not None and least > have:
            what = "weights, optimizer states and the activations of one row"
            raise DoesNotFit(MemoryShortfall(need_mib=least, have_mib=have, what=what))

    def estimate_mib(self, settings: TrialSettings, prepared: PreparedData) -> float | None:
        """MiB at the peak of a batch of the longest rows; None on a CPU."""
        if device().type == "cpu":
            return None
        rows = prepared.train.rows
        length = max(len(row["input_ids"]) for row in rows)
        targets = max(sum(label != IGNORED for label in row["labels"]) for row in rows)
        key = f"{length} {targets} {settings.structure}"
        if key not in self._estimates:
            estimate = estimate_trial(settings, device(), length=length, targets=targets)
            self._estimates[key] = estimate.total
        return self._estimates[key]


def _available_mib() -> float:
    """What a trial may have: what nobody has, and what this process holds (its base, torch's cache)."""
    return device_report(device()).free_mib + torch.cuda.memory_reserved() / 2**20
