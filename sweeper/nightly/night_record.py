"""What a night decided and what came of it: night.json, the memory from which the next night decides.

Frozen values, written whole after every step; a night that was cut short goes on from them.
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


JUDGED_ON = (": data digest", ": base model", ": objective.metric", ": evaluation.max_samples")
"""Parts of an identity without which two values do not compare."""


class BestTrial(FrozenValue):
    """The best trial of the lora arm so far."""

    arm: str
    number: int
    value: float
    """Of the objective's metric, on the validation split."""
    base_value: float
    """Of the untuned base."""
    objective: Objective
    point: dict[str, Scalar]

    def gain(self, over: BestTrial) -> float:
        """How much better it is than another one; below zero, it is worse."""
        return self.objective.gain(self.value, over=over.value)


class EntryDecision(FrozenValue):
    """What an entry does tonight, and why; settled once a night, before anything is trained."""

    choice: Choice
    reason: str
    study_name: str
    identity: dict[str, str]
    """What the answer depends on, part by part (see sweeper.nightly.study_identity)."""
    n_trials: int
    """Total of the lora arm after tonight."""
    warm_start: tuple[str, ...]
    ended_before: dict[str, list[int]]
    """Trials by arm that had ended before tonight."""
    seconds_before: float
    """Worker time of the study before tonight."""


class EntryRecord(FrozenValue):
    """One experiment of a night."""

    name: str
    experiment: str
    policy: Policy
    decided: EntryDecision | None = None
    status: Status = "planned"
    message: str | None = None
    """Why it failed, or was cut short."""
    causes: dict[str, int] = Field(default_factory=dict)
    """How tonight's trials ended, over all arms."""
    seconds: float = 0.0
    """Worker time of tonight's trials."""
    best: BestTrial | None = None
    champion: ChampionDecision | None = None


class NightRecord(FrozenValue):
    """One night of a set."""

    set_name: str
    date: date
    began: datetime
    starts: int
    ended: datetime | None = None
    result: Result | None = None
    problems: tuple[str, ...] = ()
    """What could not be written, sent or recorded."""
    tidied: tuple[str, ...] = ()
    """What was deleted after the night, a line each."""
    entries: dict[str, EntryRecord] = Field(default_factory=dict)

    def with_entry(self, entry: EntryRecord) -> NightRecord:
        """The record with one entry replaced."""
        return self.model_copy(update={"entries": {**self.entries, entry.name: entry}})


def write_record(folder: NightFolder, record: NightRecord) -> None:
    """Write night.json, whole or not at all."""
    write_atomic(folder.record, record.model_dump_json(indent=2) + "\n")


def read_record(folder: NightFolder) -> NightRecord | None:
    """A night's record; None if it left none that this version can read."""
    try:
        return NightRecord.model_validate_json(folder.record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, json.JSONDecodeError):
        return None


def earlier(nights: NightsFolder, set_name: str, on: date) -> Iterator[NightRecord]:
    """The records of the nights before a date, the latest first."""
    for day in nights.dates(set_name):
        if day < on.isoformat():
            record = read_record(nights.night(set_name, day))
            if record is not None:
                yield record


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts of two identities that differ."""
    return [part for part in {**before, **now} if before.get(part) != now.get(part)]


def last_of(name: str, history: Sequence[NightRecord]) -> EntryRecord | None:
    """The latest earlier night of an entry that has a best trial."""
    found = (night.entries.get(name) for night in history)
    return next((each for each in found if each and each.best and each.decided), None)


def comparable(entry: EntryRecord, last: EntryRecord) -> bool:
    """Whether two nights' values mean the same: the same data, base model and metric."""
    if entry.decided is None or last.decided is None:
        return False
    then, now = last.decided.identity, entry.decided.identity
    return all(then.get(part) == now[part] for part in now if part.endswith(JUDGED_ON))


def regressed(entry: EntryRecord, last: EntryRecord | None, tolerance: float) -> bool:
    """Whether tonight's best is worse than the last comparable one by more than a tolerance."""
    if last is None or entry.best is None or last.best is None or not comparable(entry, last):
        return False
    return entry.best.gain(over=last.best) < -tolerance
