"""The record of a night (night.json), from which a restarted night continues and the next one decides.

The record is rewritten after every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Literal

from pydantic import Field, ValidationError

from sweeper.config.settings import Objective
from sweeper.config.space import Scalar
from sweeper.core.paths import NightFolder, NightsFolder, write_atomic
from sweeper.core.value import FrozenValue
from sweeper.nightly.champion import ChampionDecision
from sweeper.nightly.nightly_set import Policy

Choice = Literal["new", "continue", "skip"]
Status = Literal["planned", "done", "cut_short", "failed", "skipped"]
Result = Literal["no change", "new champion", "regression", "failure"]

ENDED: frozenset[Status] = frozenset({"done", "cut_short", "failed", "skipped"})
"""Statuses of entries that need no further work tonight."""
# Suffixes, because each part begins with the name of its arm.
JUDGED_ON = (": data digest", ": base model", ": objective.metric", ": evaluation.max_samples")
"""Suffixes of the identity parts that must be equal for two values to be comparable."""


class BestTrial(FrozenValue):
    """The best trial of the lora arm so far."""

    arm: str
    number: int
    value: float
    """The objective's metric on the validation split."""
    base_value: float
    """The untuned base's value of the same metric."""
    objective: Objective
    point: dict[str, Scalar]

    def gain(self, over: BestTrial) -> float:
        """Return the improvement over another trial. Below zero this trial is worse."""
        return self.objective.gain(self.value, over=over.value)


class EntryDecision(FrozenValue):
    """The decision on an entry and its reason, made once per night before any training."""

    choice: Choice
    reason: str
    study_name: str
    identity: dict[str, str]
    """Everything that the study's result depends on, by part (sweeper.nightly.study_identity)."""
    n_trials: int
    """Total number of the lora arm's trials after tonight."""
    warm_start: tuple[str, ...]
    """Names of studies whose winners are tried first."""
    ended_before: dict[str, list[int]]
    """Numbers of the trials that had ended before tonight, by arm."""
    seconds_before: float
    """Device time of the study before tonight in seconds."""


class EntryRecord(FrozenValue):
    """The record of one experiment of a night."""

    name: str
    experiment: str
    policy: Policy
    decided: EntryDecision | None = None
    status: Status = "planned"
    message: str | None = None
    """Reason why the experiment failed or was cut short."""
    causes: dict[str, int] = Field(default_factory=dict)
    """Number of tonight's trials by outcome, over all arms."""
    seconds: float = 0.0
    """Device time of tonight's trials in seconds."""
    best: BestTrial | None = None
    champion: ChampionDecision | None = None


class NightRecord(FrozenValue):
    """The record of one night of a set."""

    set_name: str
    date: date
    began: datetime
    starts: int
    ended: datetime | None = None
    result: Result | None = None
    problems: tuple[str, ...] = ()
    """Problems with files, notifications or tracking, one message each."""
    tidied: tuple[str, ...] = ()
    """Deletions after the night, one line each."""
    entries: dict[str, EntryRecord] = Field(default_factory=dict)

    def with_entry(self, entry: EntryRecord) -> NightRecord:
        """Return the record with one entry replaced."""
        return self.model_copy(update={"entries": {**self.entries, entry.name: entry}})


def write_record(folder: NightFolder, record: NightRecord) -> None:
    """Write night.json atomically."""
    # A night may be killed at any time, and a half-written record would be lost.
    write_atomic(folder.record, record.model_dump_json(indent=2) + "\n")


def read_record(folder: NightFolder) -> NightRecord | None:
    """Return a night's record, or None if there is none that this version can read."""
    try:
        return NightRecord.model_validate_json(folder.record.read_text(encoding="utf-8"))
    # A record that is unreadable must not keep tonight from running.
    except (FileNotFoundError, ValidationError, json.JSONDecodeError):
        return None


def earlier(nights: NightsFolder, set_name: str, on: date) -> Iterator[NightRecord]:
    """Yield the records of the nights before a date, the latest first."""
    # ISO dates sort like the days that they name.
    for day in nights.dates(set_name):
        if day < on.isoformat():
            record = read_record(nights.night(set_name, day))
            if record is not None:
                yield record


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of the parts in which two identities differ."""
    # A part that only one identity has counts as changed.
    return [part for part in {**before, **now} if before.get(part) != now.get(part)]


def latest_entry(name: str, history: Sequence[NightRecord]) -> EntryRecord | None:
    """Return the entry's latest earlier record with a best trial, or None."""
    found = (night.entries.get(name) for night in history)
    return next((each for each in found if each and each.best and each.decided), None)


def comparable(entry: EntryRecord, last: EntryRecord) -> bool:
    """Return True if two nights' values rest on the same data, base model and metric."""
    if entry.decided is None or last.decided is None:
        return False
    then, now = last.decided.identity, entry.decided.identity
    # A changed space or sampler finds another best, but measures it in the same way.
    return all(then.get(part) == now[part] for part in now if part.endswith(JUDGED_ON))


def regressed(entry: EntryRecord, last: EntryRecord | None, tolerance: float) -> bool:
    """Return True if tonight's best is worse than the last comparable one by more than a tolerance."""
    if last is None or entry.best is None or last.best is None or not comparable(entry, last):
        return False
    return entry.best.gain(over=last.best) < -tolerance
