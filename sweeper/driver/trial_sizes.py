"""The answers to checks of points before they are trained: possible and how large, or why not.

One check covers a whole structure (TrialSettings.structure), so that points which differ only in
learning rate or alpha need no further check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sweeper.config.settings import LoraAdapter, TrialSettings, flatten
from sweeper.core.outcome import Outcome, TrialSize
from sweeper.tracking.tracker import RUN_PARAMS


class KnownSizes:
    """The sizes and the refusals of the structures that were checked so far."""

    def __init__(self) -> None:
        self._sizes: dict[str, TrialSize] = {}
        self._refusals: dict[str, Outcome] = {}

    def learn(self, settings: TrialSettings, answer: TrialSize | Outcome) -> None:
        """Store the size of a possible trial, or the outcome of an impossible one."""
        if isinstance(answer, TrialSize):
            self._sizes[settings.structure] = answer
        else:
            self._refusals[settings.structure] = answer

    def size(self, settings: TrialSettings) -> TrialSize | None:
        """Return the size of a trial, or None if it is impossible or was not checked yet."""
        return self._sizes.get(settings.structure)

    def refusal(self, settings: TrialSettings) -> Outcome | None:
        """Return the outcome of an impossible trial, or None if it is possible or unchecked."""
        return self._refusals.get(settings.structure)


def decided(settings: TrialSettings, size: TrialSize) -> dict[str, int] | None:
    """Return the requested parameters and the derived rank, or None if settings give the rank."""
    adapter = settings.adapter
    if not isinstance(adapter, LoraAdapter) or adapter.trainable_parameters is None:
        return None
    assert size.rank is not None
    return {"trainable_parameters": adapter.trainable_parameters, "rank": size.rank}


def recorded(
    settings: TrialSettings, size: TrialSize | None = None, searched: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a trial's settings as a tracker records them: RUN_PARAMS and what else was searched.

    Includes the exact size once it is known. All settings are in the run's config.yaml.
    """
    ranked = settings if size is None else settings.with_rank(size.rank)
    known = flatten(ranked.model_dump(mode="json", exclude_none=True))
    kept = {name: known[name] for name in (*RUN_PARAMS, *searched) if name in known}
    return kept if size is None else {**kept, "parameters.trainable": size.trainable}
