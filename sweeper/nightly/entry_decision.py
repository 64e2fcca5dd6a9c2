"""The decision for each entry of a set: continue a study, start a new one, or skip the night.

The decision rests on the records of earlier nights and on the studies' storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import optuna

from sweeper.config.settings import changed_parts, kept_defaults
from sweeper.core.paths import StudyFolder
from sweeper.driver.device_time import spent_seconds
from sweeper.driver.token_goal import token_goal
from sweeper.nightly.night_record import EntryDecision, EntryRecord, NightRecord
from sweeper.nightly.nightly_set import LoadedSet, SetEntry
from sweeper.nightly.study_identity import identity, question_of, with_templates
from sweeper.search.record_prefix import ARRIVED, next_turn
from sweeper.search.stored_defaults import kept_domains, named_keys, with_stored_defaults
from sweeper.search.study import counted, find_study, open_storage
from sweeper.search.study_plan import ArmPlan, StudyPlan

WINNERS = 3
"""Number of earlier studies whose winners a new study tries first."""
NAMED = 3
"""Number of changed parts that a reason names. The others are counted."""


@dataclass(frozen=True)
class StudySoFar:
    """The progress of a study."""

    counted: int
    """Number of the lora arm's trials that count to n_trials."""
    missing: int
    """Number of trials that all arms still lack."""
    seconds: float
    """Device time of all arms with finalists, to which the budget's device_hours apply."""
    ended: dict[str, list[int]]
    """Numbers of the finished trials, by arm."""


def progress(plan: StudyPlan) -> StudySoFar:
    """Return the progress of a study from its storage. A study that never ran has made none."""
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    # Opening the storage would create the database of a study that may never run.
    if plan.study.storage is None and not folder.database.exists():
        missing = sum(arm.n_trials for arm in plan.arms)
        return StudySoFar(0, missing, 0.0, {arm.name: [] for arm in plan.arms})
    storage = open_storage(plan.study.storage, folder)
    studies = {arm.name: find_study(plan, arm, storage) for arm in plan.arms}
    stored = {name: study for name, study in studies.items() if study is not None}
    plan, _ = with_stored_defaults(plan, stored, storage)
    first = studies[plan.arms[0].name]
    return StudySoFar(
        counted=0 if first is None else counted(first),
        missing=sum(_missing(plan, arm, studies) for arm in plan.arms),
        seconds=spent_seconds(studies, folder),
        ended={
            name: [trial.number for trial in study.get_trials() if trial.state.is_finished()]
            if study
            else []
            for name, study in studies.items()
        },
    )


def _missing(plan: StudyPlan, arm: ArmPlan, studies: Mapping[str, optuna.Study | None]) -> int:
    """Return how many trials an arm still lacks. One that ended at equal tokens lacks none."""
    study = studies[arm.name]
    if study is None:
        return arm.n_trials
    goal, trials = token_goal(plan, arm, studies), study.get_trials(deepcopy=False)
    if goal is not None and goal.reached(trials, next_turn(trials, ARRIVED)):
        return 0
    return max(0, arm.n_trials - counted(study))


def decide(
    loaded: LoadedSet, entry: SetEntry, on: date, history: Sequence[NightRecord]
) -> EntryDecision:
    """Decide by the entry's policy and by the changes since its last study.

    Args:
        loaded: the set.
        entry: one of its experiments.
        on: the night's date.
        history: records of earlier nights, the latest first.

    Raises:
        SweeperError: the data or the base model cannot be found.
    """
    plan = loaded.plan(entry)
    parts = identity(plan)
    past = _trained_nights(entry, history)
    last = past[0] if past else None
    if entry.policy == "continue" and last is not None and last.decided is not None:
        parts = _with_kept_parts(plan, last.decided.identity, parts)
    choice, reason = _choose(entry, parts, last)
    if choice == "skip" and last is not None and last.decided is not None:
        return last.decided.model_copy(update={"choice": "skip", "reason": reason})
    if choice == "continue" and last is not None and last.decided is not None:
        name = last.decided.study_name
    else:
        name = f"{loaded.name}_{entry.label}_{on}"
    earlier_studies = [each.decided.study_name for each in past if each.decided is not None]
    # A continued study already knows its own winners.
    winners = () if choice == "continue" else tuple(dict.fromkeys(earlier_studies))[:WINNERS]
    before = progress(loaded.plan(entry, name))
    first = entry.n_trials or plan.study.n_trials
    # n_trials is a total, so a night adds to the trials that already count.
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


def _trained_nights(entry: SetEntry, history: Sequence[NightRecord]) -> list[EntryRecord]:
    """Return the entry's earlier nights on which trials were trained, the latest first."""
    found = (night.entries.get(entry.label) for night in history)
    return [each for each in found if each and each.decided and each.status != "skipped"]


def _choose(entry: SetEntry, parts: dict[str, str], last: EntryRecord | None) -> tuple[str, str]:
    if last is None or last.decided is None:
        return "new", "first night"
    before = with_templates(last.decided.identity, parts)
    if entry.policy == "fresh":
        return "new", "policy fresh starts a study every night"
    if entry.policy == "continue":
        # Program versions do not matter here: a study may outlive an upgrade.
        differ = changed_parts(question_of(before), question_of(parts))
        return ("new", _changes(differ)) if differ else ("continue", "nothing changed")
    # Program versions count here: running again is cheap compared with skipping wrongly.
    differ = changed_parts(before, parts)
    if differ:
        return "new", _changes(differ)
    # A night that failed or was cut short did not answer its question.
    if last.status != "done":
        return "new", f"the last study did not finish ({last.status.replace('_', ' ')})"
    return "skip", f"nothing changed since study {last.decided.study_name}"


def _with_kept_parts(
    plan: StudyPlan, before: dict[str, str], parts: dict[str, str]
) -> dict[str, str]:
    """Return today's parts, with those of the last night where only a default has changed since."""
    found = dict(parts)
    for arm in plan.arms:
        prefix = f"{arm.name}: "
        then, now = (
            {part.removeprefix(prefix): parts[part] for part in parts if part.startswith(prefix)}
            for parts in (before, parts)
        )
        kept = kept_defaults(then, now, named_keys(arm))
        found |= {f"{prefix}{key}": text for key, text in kept.items()}
        for key, domain in kept_domains(arm, then).items():
            del found[f"{prefix}space {key}"]
            if domain is not None:
                found[f"{prefix}space {key}"] = str(domain)
    return found


def _changes(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return f"changed: {', '.join(parts[:NAMED])}{more}"
