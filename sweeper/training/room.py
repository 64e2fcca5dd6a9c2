"""Room: what trials are estimated to need of a GPU's memory, and whether they fit.

A CPU's memory is not estimated: a rehearsal costs as much as a small trial, recomputing activations
gains nothing there, and the resident size depends more on the allocator than on the trial. dry_run=true
prints the estimate on any machine.
"""

from __future__ import annotations

from sweeper.data.tokens import IGNORED
from sweeper.modeling.hardware import device, device_report
from sweeper.modeling.memory_estimate import estimate_trial
from sweeper.settings import TrialSettings
from sweeper.training.batch import Fits
from sweeper.training.prepare import Prepared

USABLE_MEMORY = 0.8
"""Of what is free: the share that an estimate may reach before memory is saved by recomputing."""


class Room:
    """The memory of this process's device; every estimate is made once."""

    def __init__(self) -> None:
        self._estimates: dict[str, float] = {}

    def fits(self, prepared: Prepared) -> Fits:
        """Whether a trial on these data fits; not known on a CPU."""
        free = device_report(device()).free_mib

        def fit(settings: TrialSettings) -> bool | None:
            needed = self.estimate_mib(settings, prepared)
            return None if needed is None else needed < USABLE_MEMORY * free

        return fit

    def estimate_mib(self, settings: TrialSettings, prepared: Prepared) -> float | None:
        """MiB at the peak of a batch of the longest rows; None on a CPU."""
        if device().type == "cpu":
            return None
        rows = prepared.train.rows
        length = max(len(row["input_ids"]) for row in rows)
        targets = max(sum(label != IGNORED for label in row["labels"]) for row in rows)
        parts = (settings.model, settings.adapter, settings.quantization, settings.training)
        key = " ".join([f"{length} {targets}", *(part.model_dump_json() for part in parts)])
        if key not in self._estimates:
            estimate = estimate_trial(settings, device(), length=length, targets=targets)
            self._estimates[key] = estimate.total
        return self._estimates[key]
