"""What a night decided and what came of it: night.json, the memory from which the next night decides.

Frozen values, written whole after every step; a night that was cut short goes on from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from sweeper.config.settings import Objective, stored_text
from sweeper.config.space import Scalar
from sweeper.core.errors import StudyError
from sweeper.core.paths import NightFolder, NightsFolder, write_atomic
from sweeper.core.value import FrozenValue
from sweeper.nightly.champion import ChampionDecision
from sweeper.nightly.nightly_set import Policy

Choice = Literal["new", "continue", "skip"]
Status = Literal["planned", "done", "cut_short", "failed", "skipped"]
Result = Literal["no change", "new champion", "regression", "failure"]

ENDED: frozenset[Status] = frozenset({"done", "cut_short", "failed", "skipped"})


FORMAT = 1
"""Version of night.json: it cannot be made again, and the next night decides from it. It rises only when
an older program would misread it; a new key has a default instead."""
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

    format: int = FORMAT
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
    """Return a night's record; None if the night left none.

    Raises:
        StudyError: this version cannot read the record; says how the answers of its studies are read.
    """
    try:
        text = folder.record.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = _Numbered.model_validate_json(
            text
        ).format  # before keys that only a newer one knows
        if found > FORMAT:
            words = f"it is of format {found}, this version reads up to format {FORMAT}"
            raise StudyError(_unread(folder, words))
        return NightRecord.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise StudyError(_unread(folder, f"{place}: {problem['msg']}")) from None


class _Numbered(BaseModel):
    """The format of a record, whatever else is in it."""

    format: int = 1


def _unread(folder: NightFolder, reason: str) -> str:
    return (
        f"{folder.record} is not read ({reason}): no night continues from it; its studies stay: "
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


def last_of(name: str, history: Sequence[NightRecord]) -> EntryRecord | None:
    """The latest earlier night of an entry that has a best trial."""
    found = (night.entries.get(name) for night in history)
    return next((each for each in found if each and each.best and each.decided), None)


def comparable(entry: EntryRecord, last: EntryRecord) -> bool:
    """Whether two nights' values mean the same: the same data, base model and metric."""
    if entry.decided is None or last.decided is None:
        return False
    then, now = last.decided.identity, entry.decided.identity
    return all(stored_text(then, part) == now[part] for part in now if part.endswith(JUDGED_ON))


def regressed(entry: EntryRecord, last: EntryRecord | None, tolerance: float) -> bool:
    """Whether tonight's best is worse than the last comparable one by more than a tolerance."""
    if last is None or entry.best is None or last.best is None or not comparable(entry, last):
        return False
    return entry.best.gain(over=last.best) < -tolerance
