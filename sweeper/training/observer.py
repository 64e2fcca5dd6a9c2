"""What a trial in training tells the outside, and how the outside can stop it."""

from __future__ import annotations

from typing import Protocol

from sweeper.core.outcome import StopCause


class TrialObserver(Protocol):
    """The worker's side of a running trial; every call returns at once."""

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        """An optimiser step was taken."""

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        """The validation split was judged: the value of the metric that pruning goes by."""

    def stop_cause(self) -> StopCause | None:
        """Why the trial shall stop at the next step, or None to go on."""
