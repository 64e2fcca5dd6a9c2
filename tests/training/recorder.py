"""An observer for tests."""

from __future__ import annotations

from sweeper.core.outcome import StopCause


class Recorder:
    """An observer that remembers, and can ask for a stop after some evaluations."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: list[tuple[int, float]] = []
        self._stop_after = stop_after

    def progress(self, step: int, total_steps: int, tokens_per_second: float) -> None:
        assert 0 < step <= total_steps
        assert tokens_per_second > 0

    def evaluated(self, step: int, total_steps: int, value: float) -> None:
        self.losses.append((step, value))

    def stop_cause(self) -> StopCause | None:
        enough = self._stop_after is not None and len(self.losses) >= self._stop_after
        return "pruned" if enough else None
