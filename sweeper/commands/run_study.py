"""A study from start to end: opened, run, and concluded whatever happens.

Knows workers, search, tracking and reporting at once. Only `single` does as well, for one trial.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from rich.console import Console

from sweeper.commands.guarded_steps import GuardedSteps
from sweeper.commands.study_conclusion import StudyConclusion
from sweeper.core.errors import StudyLocked
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.quiet import silence_libraries
from sweeper.core.signals import StopSignal, deferred_interrupt
from sweeper.core.stored_files import read_words
from sweeper.driver.budget import StudyBudget
from sweeper.driver.command_files import CommandInbox
from sweeper.driver.command_handler import CommandHandler
from sweeper.driver.command_log import CommandLog
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.folder_owner import record_owner, settle_owner
from sweeper.driver.job_waits import JobWaits
from sweeper.driver.pause_clock import PauseClock
from sweeper.driver.results_writer import ResultsWriter
from sweeper.driver.status_writer import StatusWriter
from sweeper.driver.study_run import StudyRun
from sweeper.driver.study_services import StudyServices
from sweeper.driver.study_state import StudyState
from sweeper.driver.study_supervisor import StudySupervisor
from sweeper.driver.worker_pool import WorkerPool
from sweeper.reporting.console import make_console
from sweeper.reporting.live_view import LiveView, make_view
from sweeper.reporting.results import StudyResults
from sweeper.reporting.study_progress import StudyProgress, StudyView
from sweeper.search.stored_defaults import with_stored_defaults
from sweeper.search.study import (
    find_study,
    open_storage,
    require_same_settings,
    share_cache,
    study_uuid,
)
from sweeper.search.study_plan import StudyPlan
from sweeper.tracking.provenance import provenance
from sweeper.tracking.tracker import RunStatus, StudyRecord
from sweeper.tracking.tracker_factory import make_tracker

LOCK_SECONDS = 1.0
"""A verb that only looks for a driver holds its lock for a moment."""


def run_study(plan: StudyPlan) -> StudyResults:
    """Run a study to its end, or resume it, and print, write and record the answer.

    Raises:
        SweeperError: the study cannot be run. The message says what to do.
        KeyboardInterrupt: the user stopped the study. The same command resumes it.
    """
    if plan.settings.verbosity != "verbose":
        silence_libraries()
    console = make_console()
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    with _one_driver(folder), deferred_interrupt() as interrupt:
        # made before the wait for a database, which a wall-clock limit includes
        budget = StudyBudget(plan.study.budget, plan.objective.direction == "minimize")
        storage = open_storage(plan.study.storage, folder, budget.seconds_over, interrupt.check)
        shared = plan.study.storage is not None  # else it lies in the folder that is locked
        with storage.owned(plan.study.study_name) if shared else nullcontext():
            return StudySession(plan, folder, storage, console, interrupt, budget).run()


class StudySession:
    """A study whose folder and storage belong to this process."""

    def __init__(
        self,
        plan: StudyPlan,
        folder: StudyFolder,
        storage: RDBStorage,
        console: Console,
        interrupt: StopSignal,
        budget: StudyBudget,
    ) -> None:
        self._folder = folder
        self._budget = budget
        self._console = console
        self._interrupt = interrupt
        self._storage = share_cache(storage)
        found = {arm.name: find_study(plan, arm, self._storage) for arm in plan.arms}
        studies = {name: study for name, study in found.items() if study is not None}
        # before the comparison: a default that has changed since is no other question
        plan, self._kept = with_stored_defaults(plan, studies, self._storage)
        for arm in plan.arms:
            if arm.name in studies:
                require_same_settings(studies[arm.name], plan, arm)
        stored = next(filter(None, map(study_uuid, studies.values())), None)
        self._uuid, self._moved = settle_owner(folder, stored, opened=bool(studies))
        self._provenance = provenance(plan.command)
        self._tracker = make_tracker(plan.settings.tracking, folder.tracking)
        self._recorded = False
        self._asked = False
        self._state = StudyState(plan, StudyProgress(plan.objective), studies)
        self._log = CommandLog(folder)
        # n_trials as `study extend` has raised it in earlier runs
        self._state.raise_totals(self._log.totals)
        self._status = StatusWriter(self._state, folder)

    def run(self) -> StudyResults:
        """See run_study."""
        end: RunStatus = "FAILED"
        if not self._state.studies:
            self._open_record()  # else the stored question is confirmed first
        writer = ResultsWriter(self._state, self._folder, self._provenance, self._warn)
        try:
            with (
                make_view(self._console, self._plan.settings.verbosity) as view,
                WorkerPool() as pool,
            ):
                self._make_run(view, pool, writer).run()
            end = "FINISHED"
        except KeyboardInterrupt:
            end = "KILLED"
            raise
        finally:
            results = self._conclude(writer, end)
        assert results is not None, "a study that ran to its end was recorded"
        return results

    def _conclude(self, writer: ResultsWriter, end: RunStatus) -> StudyResults | None:
        """Take the last steps of the run, the status last of all."""
        steps = GuardedSteps(self._folder.path, self._warn)
        conclusion = StudyConclusion(
            self._folder, self._storage, self._tracker, self._console, writer, steps
        )
        if not self._recorded:
            conclusion.leave_answer(end)
            self._status.restore()
            return None
        done = False
        try:
            results = conclusion.conclude(end)
            done = True
        finally:
            # a study whose answer could not be written has not finished
            last: RunStatus = end if done or end != "FINISHED" else "FAILED"
            steps.take("the status", lambda: self._status.end(last))
        return results

    @property
    def _plan(self) -> StudyPlan:
        return self._state.plan

    def _confirm(self) -> None:
        """Take the folder for the study, and open its run in MLflow.

        Raises:
            TrackingError: MLflow refuses the run for good. No trial was started.
        """
        record_owner(self._folder, self._uuid)
        self._open_record()
        if not self._asked and (reason := self._tracker.require_store()) is not None:
            self._warn(f"MLflow does not record yet, and gets everything later: {reason}")
        self._asked = True

    def _open_record(self) -> None:
        """Open the study's run in MLflow, once."""
        if not self._recorded:
            self._recorded = True
            self._tracker.open_study(self._record())

    def _make_run(self, view: StudyView, pool: WorkerPool, writer: ResultsWriter) -> StudyRun:
        """Put the parts of a run together."""
        presets = ", ".join(f"{group}={name}" for group, name in self._plan.presets.items())
        name, board = self._plan.study.study_name, self._state.board
        view.event(f"study {name} ({presets}): loading the base model and the data")
        for note in (self._plan.name_note, *self._moved, *self._kept):
            if note:
                view.event(note)
        budget = self._budget
        commands = CommandHandler(
            self._state, CommandInbox(self._folder), self._log, self._status, view.event
        )
        return StudyRun(
            services=StudyServices(
                self._folder, self._tracker, view, board, self._provenance, self._uuid
            ),
            storage=self._storage,
            pool=pool,
            dispatcher=Dispatcher(
                pool,
                self._interrupt,
                view.event,
                StudySupervisor(commands, self._status, board, view),
                PauseClock(budget.paused),
                JobWaits(
                    view.event,
                    self._plan.settings.workers,
                    budget.seconds_over,
                    # the live table shows the trials
                    announce_trial=None if isinstance(view, LiveView) else view.event,
                ),
            ),
            commands=commands,
            budget=budget,
            results=writer,
            on_confirmed=self._confirm,
        )

    def _warn(self, text: str) -> None:
        self._console.print(text, style="yellow", soft_wrap=True)

    def _record(self) -> StudyRecord:
        arms = {f"{arm.name}.n_trials": str(arm.n_trials) for arm in self._plan.arms}
        spaces = {
            f"{arm.name}.space.{key}": str(domain)
            for arm in self._plan.arms
            for key, domain in arm.space.items()
        }
        name = self._plan.study.study_name
        tags = {**arms, **self._provenance}
        return StudyRecord(self._plan.experiment, name, spaces, tags, self._plan.objective)


@contextmanager
def _one_driver(folder: StudyFolder) -> Iterator[None]:
    folder.path.mkdir(parents=True, exist_ok=True)
    owner = folder.lock.with_suffix(".pid")
    try:
        with FileLock(folder.lock, timeout=LOCK_SECONDS):
            # for the message to a second driver
            write_atomic(owner, f"{os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            yield
    except Timeout:
        who = read_words(owner).strip() or "unknown"
        raise StudyLocked(
            f"study {folder.path.name!r} is already run by another driver (process {who}). Wait for "
            "it, or start another study with hydra.sweeper.study_name=NAME"
        ) from None
