"""What an entry of a set does tonight: continue a study, start a new one, or nothing.

Reads the records of earlier nights and the studies' storage; trains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from sweeper.config.settings import changed_parts
from sweeper.core.paths import StudyFolder
from sweeper.driver.device_time import spent_seconds
from sweeper.nightly.night_record import EntryDecision, EntryRecord, NightRecord
from sweeper.nightly.nightly_set import LoadedSet, SetEntry
from sweeper.nightly.study_identity import identity, question_of
from sweeper.search.study import counted, find_study, open_storage
from sweeper.search.study_plan import StudyPlan

WINNERS = 3
"""Studies of earlier nights whose winners a new study tries first."""
NAMED = 3
"""Changed parts that a reason names; the others are counted."""


@dataclass(frozen=True)
class StudySoFar:
    """What a study has so far."""

    counted: int
    """Trials of the lora arm that use up n_trials."""
    missing: int
    """Trials that its arms have not got to."""
    seconds: float
    """Device time of all arms, finalists included: what device_hours are counted by."""
    ended: dict[str, list[int]]
    """Numbers of the trials that ended, by arm."""


def progress(plan: StudyPlan) -> StudySoFar:
    """What the storage says of a study, whether or not it was ever opened."""
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    if plan.study.storage is None and not folder.database.exists():
        missing = sum(arm.n_trials for arm in plan.arms)
        return StudySoFar(0, missing, 0.0, {arm.name: [] for arm in plan.arms})
    storage = open_storage(plan.study.storage, folder)
    studies = {arm.name: find_study(plan, arm, storage) for arm in plan.arms}
    counts = {name: counted(study) if study else 0 for name, study in studies.items()}
    return StudySoFar(
        counted=counts[plan.arms[0].name],
        missing=sum(max(0, arm.n_trials - counts[arm.name]) for arm in plan.arms),
        seconds=spent_seconds(studies, folder),
        ended={
            name: [trial.number for trial in study.get_trials() if trial.state.is_finished()]
            if study
            else []
            for name, study in studies.items()
        },
    )


def decide(
    loaded: LoadedSet, entry: SetEntry, on: date, history: Sequence[NightRecord]
) -> EntryDecision:
    """Choose by the entry's policy and by what changed since its last study.

    Args:
        loaded: the set.
        entry: one of its experiments.
        on: the night's date.
        history: records of earlier nights, the latest first.

    Raises:
        SweeperError: the data or the base model cannot be found.
    """
    asked = loaded.plan(entry)
    parts = identity(asked)
    past = _past(entry, history)
    last = past[0] if past else None
    choice, reason = _choose(entry, parts, last)
    if choice == "skip" and last is not None and last.decided is not None:
        return last.decided.model_copy(update={"choice": "skip", "reason": reason})
    if choice == "continue" and last is not None and last.decided is not None:
        name = last.decided.study_name
    else:
        name = f"{loaded.name}_{entry.label}_{on}"
    earlier_studies = [each.decided.study_name for each in past if each.decided is not None]
    winners = () if choice == "continue" else tuple(dict.fromkeys(earlier_studies))[:WINNERS]
    before = progress(loaded.plan(entry, name))
    first = entry.n_trials or asked.study.n_trials
    grown = before.counted + (entry.extend_by or 0)
    return EntryDecision(
        choice="continue" if choice == "continue" else "new",
        reason=reason,
        study_name=name,
        identity=parts,
        n_trials=grown if choice == "continue" else first,
        warm_start=winners,
        ended_before=before.ended,
        seconds_before=before.seconds,
    )


def _past(entry: SetEntry, history: Sequence[NightRecord]) -> list[EntryRecord]:
    """The entry's earlier nights on which it trained something, the latest first."""
    found = (night.entries.get(entry.label) for night in history)
    return [each for each in found if each and each.decided and each.status != "skipped"]


def _choose(entry: SetEntry, parts: dict[str, str], last: EntryRecord | None) -> tuple[str, str]:
    if last is None or last.decided is None:
        return "new", "its first night"
    before = last.decided.identity
    if entry.policy == "fresh":
        return "new", "a new study every night"
    if entry.policy == "continue":
        differ = changed_parts(question_of(before), question_of(parts))
        return ("new", _in_words(differ)) if differ else ("continue", "nothing changed")
    differ = changed_parts(before, parts)
    if differ:
        return "new", _in_words(differ)
    if last.status != "done":
        return "new", f"the last one did not come to its end ({last.status.replace('_', ' ')})"
    return "skip", f"nothing changed since study {last.decided.study_name}"


def _in_words(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return f"changed: {', '.join(parts[:NAMED])}{more}"
