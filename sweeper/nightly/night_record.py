"""The record of a night (night.json), from which a restarted night continues and the next one decides.

The record is rewritten after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, Field

from sweeper.config.settings import (
    ArmName,
    Objective,
    StudyName,
    stored_text,
    with_names_of_today,
)
from sweeper.config.space import Scalar
from sweeper.core.errors import StudyError, sentence
from sweeper.core.input_digests import InputDigests
from sweeper.core.paths import NightFolder, NightsFolder, write_atomic
from sweeper.core.stored_files import damage
from sweeper.core.value import FrozenValue
from sweeper.nightly.champion import ChampionDecision
from sweeper.nightly.nightly_set import Policy

Choice = Literal["new", "continue", "skip"]
Status = Literal["planned", "done", "cut_short", "failed", "skipped"]
Result = Literal["no change", "new champion", "regression", "failure"]

ENDED: frozenset[Status] = frozenset({"done", "cut_short", "failed", "skipped"})
"""Statuses of entries that need no further work tonight."""
FORMAT = 1
"""Version of night.json. It rises only when an older program would misread the record. A new key has a
default instead."""
# Suffixes, because each part begins with the name of its arm.
JUDGED_ON = (": data digest", ": base model", ": objective.metric", ": evaluation.look_rows")
"""Suffixes of the identity parts that must be equal for two values to be comparable, if the digests
of what was judged are not known."""
METRIC = ": objective.metric"
"""Suffix of the part that must be equal besides these digests."""


class BestTrial(FrozenValue):
    """The best trial of the lora arm so far."""

    arm: ArmName
    number: int
    value: float
    """The objective's metric on the validation split."""
    base_value: float
    """The untuned base's value of the same metric."""
    objective: Objective
    point: dict[str, Scalar]
    inputs: InputDigests | None = None
    """Digests of what the study's models were judged on. None: an earlier version stored the record."""

    def gain(self, over: BestTrial) -> float:
        """Return the improvement over another trial. Below zero this trial is worse."""
        return self.objective.gain(self.value, over=over.value)


class EntryDecision(FrozenValue):
    """The decision on an entry and its reason, made once per night before any training."""

    choice: Choice
    reason: str
    study_name: StudyName
    identity: dict[str, str]
    """Everything that the study's result depends on, by part (sweeper.nightly.study_identity)."""
    n_trials: int
    """Total number of the lora arm's trials after tonight."""
    warm_start: tuple[StudyName, ...]
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

    format: int = FORMAT
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
    """Return a night's record, or None if the night left none.

    Raises:
        StudyError: this version cannot read the record (the message says how to read its studies).
    """
    try:
        text = folder.record.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StudyError(_unread(folder, sentence(error))) from None
    try:
        found = _Numbered.model_validate_json(
            text
        ).format  # before keys that only a newer one knows
        if found > FORMAT:
            words = f"it is of format {found}, this version reads up to format {FORMAT}"
            raise StudyError(_unread(folder, words))
        return NightRecord.model_validate_json(text)
    except ValueError as error:
        raise StudyError(_unread(folder, damage(error))) from None


class _Numbered(BaseModel):
    """The format of a record, whatever else is in it."""

    format: int = 1


def _unread(folder: NightFolder, reason: str) -> str:
    return (
        f"{folder.record} is not read ({reason}): no night continues from it. Its studies stay: "
        "python -m sweeper study list"
    )


def earlier(nights: NightsFolder, set_name: str, on: date) -> tuple[list[NightRecord], list[str]]:
    """Return the records of the nights before a date, the latest first, and why others are not read."""
    found: list[NightRecord] = []
    problems: list[str] = []
    for day in nights.dates(set_name):
        if day < on.isoformat():
            try:
                record = read_record(nights.night(set_name, day))
            except StudyError as error:
                problems.append(str(error))
                continue
            found += [record] if record is not None else []
    return found, problems


def latest_entry(name: str, history: Sequence[NightRecord]) -> EntryRecord | None:
    """Return the entry's latest earlier record with a best trial, or None."""
    found = (night.entries.get(name) for night in history)
    return next((each for each in found if each and each.best and each.decided), None)


def comparable(entry: EntryRecord, last: EntryRecord) -> bool:
    """Return True if two nights' values rest on the same data, base model and metric."""
    if entry.decided is None or last.decided is None:
        return False
    then, now = last.decided.identity, with_names_of_today(entry.decided.identity)
    judged = _judged_alike(entry.best, last.best)
    if judged is not None:
        return judged and all(then.get(part) == now[part] for part in now if part.endswith(METRIC))
    # A changed space or sampler finds another best, but measures it in the same way.
    return all(stored_text(then, part) == now[part] for part in now if part.endswith(JUDGED_ON))


def _judged_alike(best: BestTrial | None, last: BestTrial | None) -> bool | None:
    """Return True if two trials were judged on the same rows and base model, None if that is unknown."""
    if best is None or last is None or best.inputs is None or last.inputs is None:
        return None
    known = [(each.judged, each.base, each.config) for each in (best.inputs, last.inputs)]
    return None if None in (*known[0], *known[1]) else known[0] == known[1]


def regressed(entry: EntryRecord, last: EntryRecord | None, tolerance: float) -> bool:
    """Return True if tonight's best is worse than the last comparable one by more than a tolerance."""
    if last is None or entry.best is None or last.best is None or not comparable(entry, last):
        return False
    return entry.best.gain(over=last.best) < -tolerance
