"""One run of a nightly set: claim the night, run the experiments, write the digest.

The program contains no scheduler. However often a scheduler starts it, each night runs once. A failure
of one experiment is recorded and does not end the night. Only the user's stop does.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyError, SweeperError
from sweeper.core.paths import NightFolder, write_atomic
from sweeper.core.redaction import redact
from sweeper.core.steady_output import echo
from sweeper.nightly.challenge import GateJudge, challenge, judge_in_subprocess
from sweeper.nightly.champion import ChampionDecision
from sweeper.nightly.digest import UNFINISHED, digest, page
from sweeper.nightly.entry_decision import decide, progress
from sweeper.nightly.housekeeping import tidy
from sweeper.nightly.night_claims import NightClaim, NightLog, NightTaken
from sweeper.nightly.night_dates import Night
from sweeper.nightly.night_record import (
    ENDED,
    BestTrial,
    EntryDecision,
    EntryRecord,
    NightRecord,
    Result,
    earlier,
    latest_entry,
    read_record,
    regressed,
    write_record,
)
from sweeper.nightly.nightly_set import LoadedSet, NightlySet, SetEntry, load_set, plan_of
from sweeper.nightly.notify import notify
from sweeper.reporting.results import ArmResult, StudyResults, load_results
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.tracker_factory import make_registry

Clock = Callable[[], datetime]
TEST_SPLIT_UNREAD = "hydra.sweeper.finalists.test=false"
"""Override of every night's study: nightly evaluations would turn the test split into a validation
split. `champion certify` evaluates it instead."""
OWN_RETENTION = "hydra.sweeper.retention.adapters=null"
"""Override of every night's study: the set's nightly.retention deletes weights after the whole night."""
# A new champion and a regression are no failures. Codes from 10 on are free in shells.
EXIT_CODES: Mapping[Result, int] = {
    "no change": 0,
    "failure": 1,
    "new champion": 10,
    "regression": 11,
}
"""Exit codes of `sweeper nightly`. The code is also 0 if there was nothing to run."""


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def run_night(
    name: str,
    overrides: Sequence[str] = (),
    clock: Clock = utc_now,
    judge: GateJudge = judge_in_subprocess,
) -> Result | None:
    """Run tonight's night of a set unless it has run, or continue it after a crash.

    Args:
        name: name of the set.
        overrides: Hydra overrides for the set.
        clock: function that returns the current time.
        judge: function that evaluates challenger and champion on the gate split.

    Returns:
        The night's result, or None if there was nothing to run.

    Raises:
        ConfigError: all errors of the set and of its experiments.
        KeyboardInterrupt: the user stopped the night. The next start within the window continues it.
    """
    loaded = load_set(name, overrides)
    nightly = loaded.settings
    now = clock()
    # Schedulers may start the command every hour: the set itself knows its hours.
    night = nightly.rhythm.at(now)
    if night is None:
        following = nightly.rhythm.next_after(now)
        begins = following.begins.astimezone(nightly.rhythm.time_zone)
        _print_line(
            f"nightly {name}: no night at this hour. The next begins {begins:%Y-%m-%d %H:%M %Z}"
        )
        return None
    nights = NightLog(nightly.folder)
    try:
        wait = _seconds_to_wait(nightly, nights, name, night, now)
        with nights.claim(name, night.date, clock(), wait) as claim:
            result = NightRun(loaded, claim, night, clock, judge).run()
            _end(nights, claim, result, clock())
            return result
    except NightTaken as reason:
        _print_line(str(reason))
        return None


def _end(nights: NightLog, claim: NightClaim, result: Result, now: datetime) -> None:
    """Record that the night has finished. With a full disk the next start in the window retries."""
    try:
        nights.end(claim, result, now)
    except sqlite3.OperationalError as error:
        words = (
            f"the end of this night was not recorded ({error}). The next start continues the night."
        )
        echo(f"nightly {claim.set_name}: {words}", stderr=True)


def _seconds_to_wait(
    nightly: NightlySet, nights: NightLog, name: str, night: Night, now: datetime
) -> float:
    """Return the seconds to wait for an earlier night that still runs. `replace` stops it first."""
    holder = nights.holder(name)
    if holder is None or holder.date >= night.date or nightly.overlap == "skip":
        return 0.0
    if nightly.overlap == "replace":
        _print_line(
            f"nightly {name}: stopping the night of {holder.date} (process {holder.process})"
        )
        with suppress(ProcessLookupError):  # the process has just ended
            # SIGTERM lets the other night write its record and its digest.
            os.kill(holder.process, signal.SIGTERM)
    return (night.ends - now).total_seconds()


class NightRun:
    """A night while it runs: its entries, its record and its deadline."""

    def __init__(
        self,
        loaded: LoadedSet,
        claim: NightClaim,
        night: Night,
        clock: Clock,
        judge: GateJudge,
    ) -> None:
        self._judge = judge
        self._loaded = loaded
        self._nightly = nightly = loaded.settings
        self._clock = clock
        self._folder: NightFolder = nightly.folder.night(claim.set_name, claim.date.isoformat())
        self._history, unread = earlier(nightly.folder, claim.set_name, claim.date)
        new = NightRecord(
            set_name=claim.set_name, date=claim.date, began=claim.began, starts=claim.starts
        )
        # A restarted night continues from its record, so nothing is decided or extended twice.
        try:
            found = read_record(self._folder) or new
        except StudyError as error:
            found, unread = new, [str(error), *unread]
        self._record = found.model_copy(update={"starts": claim.starts})
        for problem in unread:
            self._problem(problem)
        # Counted from the first start, so that a crash does not renew the night's time.
        limit = timedelta(seconds=nightly.budget.wall_clock or nightly.window)
        self._deadline = min(night.ends, claim.began + limit)

    def run(self) -> Result:
        """Run all entries that have not ended, and write the digest even if one raises."""
        try:
            for entry in self._nightly.experiments:
                record = self._entry(entry)
                if record.status not in ENDED:
                    self._keep(self._run_entry(entry, record))
        finally:
            result = self._conclude()
        return result

    def _entry(self, entry: SetEntry) -> EntryRecord:
        new = EntryRecord(name=entry.label, experiment=entry.experiment, policy=entry.policy)
        return self._record.entries.get(entry.label, new)

    def _run_entry(self, entry: SetEntry, record: EntryRecord) -> EntryRecord:
        try:
            decided = record.decided or decide(
                self._loaded, entry, self._record.date, self._history
            )
            record = record.model_copy(update={"decided": decided})
            self._keep(record)
            # The decision is stored before training, so that a restart repeats it.
            if decided.choice == "skip":
                return record.model_copy(update={"status": "skipped"})
            limits = self._limits(entry, decided)
            if isinstance(limits, str):
                return record.model_copy(update={"status": "cut_short", "message": limits})
            plan = plan_of(self._nightly, entry, _study_overrides(decided, limits))
        except (SweeperError, OSError) as error:
            return _failed(record, error)
        return self._train(plan, record, decided)

    def _train(self, plan: StudyPlan, record: EntryRecord, decided: EntryDecision) -> EntryRecord:
        _print_line(f"nightly: {record.name} ({decided.choice}: {decided.reason})")
        try:
            results = run_study(plan)
        except Exception as error:  # noqa: BLE001 - one failed experiment must not end the night
            return _with_results(_failed(record, error), _stored(plan), decided)
        record = _with_results(record, results, decided)
        record = record.model_copy(update={"champion": self._challenge(plan, record)})
        missing = progress(plan).missing
        words = f"its budget ran out {missing} trials early" if missing else None
        return record.model_copy(
            update={"status": "cut_short" if missing else "done", "message": words}
        )

    def _challenge(self, plan: StudyPlan, record: EntryRecord) -> ChampionDecision | None:
        entry = next(each for each in self._nightly.experiments if each.label == record.name)
        if record.best is None:
            return None
        try:
            return challenge(entry, plan, record.best, self._nightly.champion, self._judge)
        except (SweeperError, OSError, ValueError) as error:
            self._problem(f"{entry.label}: no decision on the champion: {error}")
            return None

    def _limits(self, entry: SetEntry, decided: EntryDecision) -> list[str] | str:
        """Return the budget overrides for the entry's study, or the reason why no time is left."""
        seconds = (self._deadline - self._clock()).total_seconds()
        if seconds <= 0:
            return "the night's time is used up"
        own = self._loaded.plan(entry).study.budget
        walls = (seconds, entry.budget.wall_clock, own.wall_clock)
        others = [other for other in self._nightly.experiments if other.label != entry.label]
        limit = self._nightly.budget.device_hours
        left = limit and max(0.0, limit - sum(map(self._seconds_tonight, others)) / 3600)
        tonight = _least(left, entry.budget.device_hours)
        if tonight is not None and tonight * 3600 <= self._seconds_tonight(entry):
            return "the night's device-hours are used up"
        # device_hours is a total over a study's whole life, so the time of earlier nights is added.
        # The time that was used tonight before a crash is not, so a crash renews no budget.
        before = decided.seconds_before / 3600
        hours = _least(None if tonight is None else before + tonight, own.device_hours)
        wall = f"hydra.sweeper.budget.wall_clock={min(wall for wall in walls if wall):.1f}s"
        return [
            wall,
            *([] if hours is None else [f"hydra.sweeper.budget.device_hours={hours:.6f}"]),
        ]

    def _seconds_tonight(self, entry: SetEntry) -> float:
        """Return the device time that an entry has used tonight, including a start that crashed."""
        record = self._entry(entry)
        if record.status in ENDED or record.decided is None or record.decided.choice == "skip":
            return record.seconds
        now = progress(self._loaded.plan(entry, record.decided.study_name))
        return now.seconds - record.decided.seconds_before

    def _keep(self, record: EntryRecord) -> None:
        self._record = self._record.with_entry(record)
        self._store()

    def _store(self) -> None:
        try:
            write_record(self._folder, self._record)
        except OSError as error:
            self._problem(f"{self._folder.record}: {error}")

    def _problem(self, words: str) -> None:
        # The same file may fail after every step.
        if words not in self._record.problems:
            problems = (*self._record.problems, redact(words))
            self._record = self._record.model_copy(update={"problems": problems})
            echo(f"nightly: {redact(words)}", stderr=True)

    def _conclude(self) -> Result:
        result = _result(self._record, self._nightly.regression, self._history)
        if self._all_ended:
            self._tidy()
            # A night that was stopped has no result yet: the next start continues it.
            ended = {"ended": self._clock(), "result": result}
            self._record = self._record.model_copy(update=ended)
        self._store()
        if self._all_ended:
            for problem in notify(self._nightly.notify, self._title(), self._text()):
                self._problem(problem)
        self._write_digest(self._text())
        # A night that the user stopped must not wait for a server.
        if self._all_ended:
            self._log(self._text())
        _print_line(f"{self._title()}\nDigest     {self._folder.digest}")
        return result

    def _tidy(self) -> None:
        """Delete by the retention policy of this set. Errors are recorded as problems."""
        nights = (self._record, *self._history)
        entries = [entry for night in nights for entry in night.entries.values()]
        studies = dict.fromkeys(entry.decided.study_name for entry in entries if entry.decided)
        output_dir = Path(self._nightly.output_dir)
        try:
            lines = tidy(self._nightly.retention, list(studies), output_dir, self._registries())
        except (SweeperError, OSError) as error:
            self._problem(f"nothing more was deleted after this night: {error}")
            return
        self._record = self._record.model_copy(update={"tidied": tuple(lines)})

    def _registries(self) -> list[ModelRegistry]:
        """Return one registry for each MLflow server or store of the set's experiments."""
        trackings = [plan.settings.tracking for plan in self._loaded.plans.values()]
        # Experiments usually share one server, which is asked once.
        different = {each.model_dump_json(): each for each in trackings}
        return list(filter(None, map(make_registry, different.values())))

    def _log(self, text: str) -> None:
        """Record the digest as an MLflow run, if the set's experiments are tracked."""
        registry = next(iter(self._registries()), None)
        if registry is None:
            return
        name = f"{self._record.set_name} {self._record.date}"
        tags = {
            "sweeper.result": self._record.result or UNFINISHED,
            # MLflow limits the value of a run's tag to 8,000 characters.
            "mlflow.note.content": text[:8000],
        }
        try:
            registry.log_night(name, tags, [self._folder.digest, self._folder.page])
        except (SweeperError, OSError) as error:
            self._problem(f"the digest was not recorded: {error}")
            self._write_digest(self._text())

    def _text(self) -> str:
        return digest(self._record, self._nightly, self._history)

    def _title(self) -> str:
        record = self._record
        return f"nightly {record.set_name} {record.date}: {record.result or UNFINISHED}"

    def _write_digest(self, text: str) -> None:
        """Write the digest to its files, or to stderr if the files cannot be written."""
        try:
            write_atomic(self._folder.digest, text)
            write_atomic(self._folder.page, page(text, self._title()))
        except OSError as error:
            echo(f"nightly: the digest could not be written ({error}):\n{text}", stderr=True)

    @property
    def _all_ended(self) -> bool:
        """True if every entry has ended, so that the digest is final."""
        return all(self._entry(entry).status in ENDED for entry in self._nightly.experiments)


def _least(*limits: float | None) -> float | None:
    """Return the lowest of several limits, where None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def _study_overrides(decided: EntryDecision, limits: Sequence[str]) -> list[str]:
    found = [
        f"hydra.sweeper.study_name={decided.study_name}",
        f"hydra.sweeper.n_trials={decided.n_trials}",
        TEST_SPLIT_UNREAD,
        OWN_RETENTION,
        *limits,
    ]
    if decided.warm_start:
        found.append(f"hydra.sweeper.warm_start=[{','.join(decided.warm_start)}]")
    return found


def _failed(record: EntryRecord, error: Exception) -> EntryRecord:
    words = redact(str(error)) if isinstance(error, SweeperError) else redact(repr(error))
    return record.model_copy(update={"status": "failed", "message": words})


def _stored(plan: StudyPlan) -> StudyResults | None:
    """Return the results that a failed study had written, or None."""
    try:
        return load_results(plan.study.study_name, Path(plan.settings.output_dir))
    except (SweeperError, OSError):
        return None


def _with_results(
    record: EntryRecord, results: StudyResults | None, decided: EntryDecision
) -> EntryRecord:
    """Return the record with the outcomes of tonight's trials."""
    if results is None or not results.arms:
        return record
    tonight = [
        trial
        for arm in results.arms
        for trial in arm.trials
        if trial.number not in decided.ended_before.get(arm.name, [])
    ]
    return record.model_copy(
        update={
            "causes": dict(Counter(trial.outcome.cause for trial in tonight)),
            "seconds": sum(trial.outcome.spent.get("cost/seconds", 0.0) for trial in tonight),
            "best": _best(results.arms[0]),
        }
    )


def _best(arm: ArmResult) -> BestTrial | None:
    found = arm.best
    if found is None or found.value is None:
        return None
    return BestTrial(
        arm=arm.name,
        number=found.number,
        value=found.value,
        base_value=arm.base_value,
        objective=arm.objective,
        point=dict(found.params),
        inputs=arm.facts.inputs,
    )


def _result(record: NightRecord, tolerance: float, history: Sequence[NightRecord]) -> Result:
    entries = record.entries.values()
    if any(entry.status == "failed" for entry in entries):
        return "failure"
    if any(regressed(entry, latest_entry(entry.name, history), tolerance) for entry in entries):
        return "regression"
    if any(entry.champion and entry.champion.verdict == "promoted" for entry in entries):
        return "new champion"
    return "no change"


def _print_line(words: str) -> None:
    echo(words)
