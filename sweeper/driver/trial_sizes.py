"""What workers said about points before they were trained: possible and how large, or why not.

Asked once for every structure (TrialSettings.structure), so that points which differ in learning rate
or alpha alone cost no further question.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sweeper.config.settings import LoraAdapter, TrialSettings, flatten
from sweeper.core.outcome import Outcome, TrialSize
from sweeper.tracking.tracker import RUN_PARAMS
from sweeper.workers.protocol import CheckedEvent


class KnownSizes:
    """The answers so far."""

    def __init__(self) -> None:
        self._answers: dict[str, CheckedEvent] = {}

    def learn(self, settings: TrialSettings, answer: CheckedEvent) -> None:
        """Take note of an answer."""
        self._answers[settings.structure] = answer

    def size(self, settings: TrialSettings) -> TrialSize | None:
        """How large a trial is; None if that was not asked yet, or if it is impossible."""
        answer = self._answers.get(settings.structure)
        return None if answer is None else answer.size

    def refusal(self, settings: TrialSettings) -> Outcome | None:
        """How an impossible trial ended before it began; None if it is possible, or was not asked."""
        answer = self._answers.get(settings.structure)
        return None if answer is None else answer.refusal


def decided(settings: TrialSettings, size: TrialSize) -> dict[str, int] | None:
    """What was asked for and the rank that followed; None where the settings give the rank."""
    adapter = settings.adapter
    if not isinstance(adapter, LoraAdapter) or adapter.trainable_parameters is None:
        return None
    assert size.rank is not None
    return {"trainable_parameters": adapter.trainable_parameters, "rank": size.rank}


def recorded(
    settings: TrialSettings, size: TrialSize | None = None, searched: Iterable[str] = ()
) -> dict[str, Any]:
    """A trial's settings as a tracker records them: RUN_PARAMS and what else was searched.

    With the exact size once it is known. All settings are in the run's config.yaml.
    """
    ranked = settings if size is None else settings.with_rank(size.rank)
    known = flatten(ranked.model_dump(mode="json", exclude_none=True))
    kept = {name: known[name] for name in (*RUN_PARAMS, *searched) if name in known}
    return kept if size is None else {**kept, "parameters.trainable": size.trainable}
