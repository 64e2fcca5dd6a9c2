"""The interface between a running trial and its worker: reports out, a stop request in."""

from __future__ import annotations

from typing import Protocol

from sweeper.core.outcome import StopCause


class TrialObserver(Protocol):
    """The worker's side of a running trial. Every call returns at once."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """Report that an optimiser step was taken."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """Report an evaluation on the validation split: the value of the metric used for pruning."""

    def stop_cause(self) -> StopCause | None:
        """Return why the trial must stop at the next step, or None to continue."""
