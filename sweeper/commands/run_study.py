"""A study from start to end: everything put together, and taken apart again whatever happens.

Knows workers, search, tracking and reporting at once; only `single` does as well, for one trial.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from optuna.storages import RDBStorage
from rich.console import Console

from sweeper.commands.retention import delete, kept, losers
from sweeper.config.settings import metric_words
from sweeper.core.errors import StudyError, StudyLocked, TrackingError, WorkerError
from sweeper.core.outcome import ArmBaseline, BaselineRun
from sweeper.core.paths import StudyFolder, size_mib, write_atomic, write_json
from sweeper.core.quiet import silence_libraries
from sweeper.core.signals import StopSignal, deferred_interrupt
from sweeper.core.value import MemoryShortfall
from sweeper.driver.arm_search import POLL_SECONDS, ArmDriver
from sweeper.driver.budget import ArmBudget, StudyBudget
from sweeper.driver.device_time import spent_seconds
from sweeper.driver.finalist_runs import FinalistsDriver
from sweeper.driver.loop_context import LoopContext
from sweeper.driver.steering import Steering
from sweeper.reporting.console import make_console
from sweeper.reporting.finalist_results import ArmConclusion
from sweeper.reporting.held_out_results import LEFT_ALONE, NOT_ENDED, SWITCHED_OFF, settle
from sweeper.reporting.html_page import write_page
from sweeper.reporting.live_view import make_view, print_answer, print_results
from sweeper.reporting.result_tables import describe_data, markdown_report
from sweeper.reporting.results import StudyResults, collect_arm, to_document
from sweeper.reporting.study_progress import StudyProgress, StudyView
from sweeper.reporting.tracked_metrics import study_figures
from sweeper.reporting.verdict import judge, with_override
from sweeper.search.first_points import fill_study
from sweeper.search.study import (
    counted,
    find_study,
    open_storage,
    open_study,
    share_cache,
)
from sweeper.search.study_plan import LORA, ArmPlan, StudyPlan
from sweeper.tracking.provenance import provenance
from sweeper.tracking.tracker import RunStatus, StudyRecord
from sweeper.tracking.tracker_factory import (
    browse_command,
    make_baselines,
    make_registry,
    make_tracker,
)
from sweeper.workers.engines import open_engine
from sweeper.workers.protocol import Engine, LostEvent, ProbeCommand, ProbedEvent, SlotsEvent

LOCK_SECONDS = 1.0
"""Somebody who only looks whether there is a driver holds its lock for a moment."""
PAGED = "training.optim=paged_adamw_8bit"
"""Its states need no room on the device: they move to the host's memory and back."""
WRITING_SHARE = 0.05
"""Of the driver's time that may go into results.json and report.md while a study runs."""


def run_study(plan: StudyPlan) -> StudyResults:
    """Run a study to its end, or resume it; the answer is printed, written and recorded.

    Raises:
        SweeperError: it cannot be run; the message says what to do.
        KeyboardInterrupt: the user stopped it; the same command resumes it.
    """
    if plan.settings.verbosity != "verbose":
        silence_libraries()
    console = make_console()
    folder = StudyFolder(Path(plan.settings.output_dir) / plan.study.study_name)
    with _one_driver(folder), deferred_interrupt() as interrupt:
        storage = open_storage(plan.study.storage, folder)
        shared = plan.study.storage is not None  # else it lies in the folder that is locked
        with storage.owned(plan.study.study_name) if shared else nullcontext():
            return StudySession(plan, folder, storage, console, interrupt).run()


class StudySession:
    """A study while it runs."""

    def __init__(
        self,
        plan: StudyPlan,
        folder: StudyFolder,
        storage: RDBStorage,
        console: Console,
        interrupt: StopSignal,
    ) -> None:
        self._interrupt = interrupt
        self._folder = folder
        self._console = console
        self._storage = share_cache(storage)
        self._provenance = provenance(plan.command)
        self._tracker = make_tracker(plan.settings.tracking, folder.tracking)
        self._board = StudyProgress(plan.objective)
        self._engine: Engine | None = None
        self._devices = 0
        self._slots: dict[int, int] = {}
        self._finals: dict[str, ArmConclusion] | None = None
        self._announced = False
        self._misfits: dict[str, MemoryShortfall] = {}
        self._next_write = 0.0
        self._budget = StudyBudget(plan.study.budget, plan.objective.direction == "minimize")
        found = {arm.name: find_study(plan, arm, self._storage) for arm in plan.arms}
        studies = {name: study for name, study in found.items() if study is not None}
        self._steering = Steering(plan, folder, interrupt, self._budget, self._board, studies)
        self._ran: dict[str, int] = {}
        """To which total each arm was run."""

    @property
    def _plan(self) -> StudyPlan:
        """With the totals that were raised while it ran."""
        return self._steering.plan

    def run(self) -> StudyResults:
        """See run_study."""
        status: RunStatus = "FAILED"
        self._tracker.open_study(self._record())
        try:
            with make_view(self._console, self._plan.settings.verbosity) as view:
                presets = ", ".join(f"{group}={name}" for group, name in self._plan.presets.items())
                name = self._plan.study.study_name
                view.event(f"study {name} ({presets}): loading the base model and the data")
                self._steering.catch_up(view)
                while (arm := self._next_arm()) is not None:
                    self._run_arm(arm, self._workers_of([arm]), view)
                    self._ran[arm.name] = self._steering.total(arm.name)
                self._steering.searched = True
                self._run_finalists(self._workers_of(self._plan.arms), view)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if self._engine is not None:
                self._engine.close()
            results = self._conclude(status)
            self._steering.close(status)
        return results

    def _next_arm(self) -> ArmPlan | None:
        """The first arm that was not run to its total; one that was extended comes again."""
        arms = [arm for arm in self._plan.arms if self._ran.get(arm.name) != arm.n_trials]
        # an adopted arm costs little, and what is wrong with it is to be known first
        return min(arms, key=lambda arm: arm.run_id is None, default=None)

    def _workers_of(self, arms: Sequence[ArmPlan]) -> Engine:
        """Workers that are wide enough for the trials of some arms.

        Arms run one after the other, so a wide trial never waits for enough narrow ones to end.
        """
        devices = max(arm.settings.training.devices_per_trial for arm in arms)
        if self._engine is None or devices != self._devices:
            if self._engine is not None:
                self._engine.close()
                self._slots.clear()
            count = max(1, self._plan.study.n_jobs // devices)
            workers = self._plan.settings.workers
            self._engine = open_engine(workers, count, self._folder.worker_log, devices)
            self._devices = devices
        return self._engine

    def _run_arm(self, arm: ArmPlan, engine: Engine, view: StudyView) -> None:
        adopted = self._adopted(arm)
        facts = self._probe(arm, engine, adopted)
        if isinstance(facts, MemoryShortfall):
            self._leave_out(arm, facts, view)
            return
        base_value = facts.base_value(self._plan.objective.metric)
        study = open_study(self._plan, arm, facts, self._storage)
        self._steering.open_arm(arm.name, study)
        if adopted is not None:
            study.set_user_attr("adopted", adopted.model_dump(mode="json"))
        words = fill_study(study, self._plan, arm, facts, self._storage)
        done = counted(study)
        budget = self._arm_budget(arm)
        words += [left] if (left := budget.left([])) else []
        self._announce(arm, facts, done, words, view)
        self._board.open_arm(arm.name, arm.n_trials, base_value)
        driver = ArmDriver(
            arm=arm,
            study=study,
            facts=facts,
            pruner=self._plan.study.pruner,
            budget=budget,
            costs=self._plan.study.costs,
            context=self._context(engine, view),
            steering=self._steering,
            told=self._write_results,
            adopted=adopted,
        )
        driver.run()
        shutil.rmtree(self._folder.adopted(arm.name), ignore_errors=True)  # its trial has it now

    def _context(self, engine: Engine, view: StudyView) -> LoopContext:
        return LoopContext(
            folder=self._folder,
            engine=engine,
            tracker=self._tracker,
            view=view,
            board=self._board,
            provenance=self._provenance,
            slots=self._slots,
            interrupt=self._interrupt,
        )

    def _adopted(self, arm: ArmPlan) -> BaselineRun | None:
        """What stands in for the arm's search; once it was judged, its own copy is all that is needed.

        Raises:
            TrackingError: there is no such run, or it holds no model.
        """
        if arm.run_id is None:
            return None
        study = find_study(self._plan, arm, self._storage)
        if study is not None and counted(study):
            known = BaselineRun.model_validate(study.user_attrs["adopted"])
            own = self._folder.trial(arm.name, 0).model
            return known.model_copy(update={"model": own.resolve()})
        baselines = make_baselines(self._plan.settings.tracking)
        return baselines.find(arm.run_id, self._folder.adopted(arm.name))

    def _leave_out(self, arm: ArmPlan, misfit: MemoryShortfall, view: StudyView) -> None:
        """An arm that cannot fit ends nothing: the others go on.

        Raises:
            StudyError: it is the only one.
        """
        self._misfits[arm.name] = misfit
        words = [f"arm {arm.name} is not run: {misfit}", *self._ways_out(arm)]
        if len(self._misfits) == len(self._plan.arms):
            raise StudyError("\n".join(words))
        for line in words:
            view.event(line)

    def _ways_out(self, arm: ArmPlan) -> list[str]:
        smaller = "    a smaller base:           model.base_model=PATH_OR_HUB_ID"
        if arm.name == LORA:
            return [f"    a paged 8-bit optimizer:  {PAGED}", smaller]
        where = f"hydra.sweeper.arms.{arm.name}"
        overrides = ",".join((*self._plan.study.arms[arm.name].overrides, PAGED))
        return [
            f"    a paged 8-bit optimizer:  {shlex.quote(f'{where}.overrides=[{overrides}]')}",
            smaller,
            "    an earlier full run:      baseline.run_id=MLFLOW_RUN_ID",
            f"    a study without it:       {shlex.quote(f'~{where}')}",
        ]

    def _run_finalists(self, engine: Engine, view: StudyView) -> None:
        """Once every search has ended: further seeds for the best, and the test split."""
        wanted = self._plan.study.finalists
        if wanted.top == 0:
            return
        found = [(arm, find_study(self._plan, arm, self._storage)) for arm in self._plan.arms]
        driver = FinalistsDriver(
            wanted=wanted,
            budget=self._budget.of_arm(1.0, self._spent(), self._devices),
            context=self._context(engine, view),
            steering=self._steering,
        )
        self._finals = driver.run([(arm, study) for arm, study in found if study is not None])

    def _probe(
        self, arm: ArmPlan, engine: Engine, adopted: BaselineRun | None
    ) -> ArmBaseline | MemoryShortfall:
        """Ask the first free worker what this arm starts from, or why it cannot."""
        while not any(self._slots.values()):
            self._wait_for_slots(engine)
        worker = next(worker for worker, free in self._slots.items() if free)
        self._slots[worker] -= 1
        model = None if adopted is None else adopted.model
        engine.probe(worker, ProbeCommand(arm=arm.name, settings=arm.settings.trial, adopted=model))
        while True:
            self._interrupt.check()
            event = engine.next_event(POLL_SECONDS)
            if isinstance(event, SlotsEvent):
                self._slots[event.worker] = event.free
            elif isinstance(event, LostEvent) and event.worker != worker:
                self._slots.pop(event.worker, None)  # its successor announces itself
            elif isinstance(event, LostEvent):
                raise WorkerError(
                    f"the worker died while it loaded the base model:\n{event.message}"
                )
            elif isinstance(event, ProbedEvent) and event.misfit is not None:
                return event.misfit
            elif isinstance(event, ProbedEvent) and event.facts is None:
                raise StudyError(f"arm {arm.name}: {event.message}")
            elif isinstance(event, ProbedEvent) and event.facts is not None:
                return event.facts

    def _wait_for_slots(self, engine: Engine) -> None:
        self._interrupt.check()
        event = engine.next_event(POLL_SECONDS)
        if isinstance(event, SlotsEvent):
            self._slots[event.worker] = event.free

    def _arm_budget(self, arm: ArmPlan) -> ArmBudget:
        """This arm's share of what the study may still use."""
        studies = [find_study(self._plan, each, self._storage) for each in self._plan.arms]
        wanted = {
            each.name: max(0, each.n_trials - (counted(study) if study else 0))
            for each, study in zip(self._plan.arms, studies, strict=True)
        }
        names = list(wanted)
        following = sum(wanted[name] for name in names[names.index(arm.name) :])
        share, devices = wanted[arm.name] / max(1, following), self._devices
        return self._budget.of_arm(share, self._spent(), devices)

    def _spent(self) -> float:
        """Device time of all trials and finalists so far."""
        plan = self._plan
        studies = {arm.name: find_study(plan, arm, self._storage) for arm in plan.arms}
        return spent_seconds(studies, self._folder)

    def _announce(
        self, arm: ArmPlan, facts: ArmBaseline, done: int, words: Sequence[str], view: StudyView
    ) -> None:
        if not self._announced:
            self._announced = True
            view.event(f"data: {describe_data(facts)}")
            view.event(f"device: {facts.device}, computing in {facts.dtype}")
        text = f"arm {arm.name}: {arm.n_trials} trials"
        if arm.run_id is not None:
            text = f"arm {arm.name}: adopted from MLflow run {arm.run_id}, judged and not trained"
        elif done >= arm.n_trials:
            text += ", all of them done before: nothing to train"
        elif done:
            text += f", {done} of them done before"
        metric = self._plan.objective.metric
        view.event(f"{text}; untuned base: {metric_words(metric)} {facts.base_value(metric):.4f}")
        for word in words:
            view.event(f"arm {arm.name}: {word}")

    def _results(self) -> StudyResults:
        """What all arms have so far, from their storage."""
        found = [(arm, find_study(self._plan, arm, self._storage)) for arm in self._plan.arms]
        results = StudyResults(
            study_name=self._plan.study.study_name,
            command=self._plan.command,
            provenance=self._provenance,
            arms=tuple(
                collect_arm(arm, study, self._plan.study.costs)
                for arm, study in found
                if study is not None
            ),
            fairness=self._plan.study.fairness,
            untested=NOT_ENDED if self._plan.study.finalists.top else SWITCHED_OFF,
            misfits=self._misfits,
        )
        if self._finals is None:
            return results
        untested = None if self._plan.study.finalists.test else LEFT_ALONE
        return settle(replace(results, untested=untested), self._finals)

    def _write_results(self) -> None:
        """After a trial, so that a report can be read while the study runs or after a crash.

        Not after every trial where trials end faster than hundreds of them are written.
        """
        began = time.monotonic()
        if began < self._next_write:
            return
        try:
            self._write(self._results())
        except OSError as error:  # a full disk: the storage has it all, the next trial tries again
            self._console.print(f"results are not written: {error}", style="yellow")
        took = time.monotonic() - began
        self._next_write = began + took / WRITING_SHARE

    def _write(self, results: StudyResults) -> None:
        verdict = judge(results)
        document = {**to_document(results), "verdict": verdict.document()}
        write_json(self._folder.results, document)
        write_atomic(self._folder.report, markdown_report(results, verdict))

    def _conclude(self, status: RunStatus) -> StudyResults:
        """Write, record and print what there is, whether or not the study came to its end."""
        results = self._results()
        if results.arms:
            self._write(results)
            self._show(results, status)
            write_page(results, self._folder, self._storage)
        if status == "FINISHED" and results.arms:
            adapters = self._plan.study.retention.adapters
            most = sys.maxsize if adapters is None else adapters
            self._tracker.keep(kept(results, self._folder, most))
        self._tracker.close_study(
            status,
            *study_figures(results),
            markdown_report(results, judge(results)) if results.arms else "",
            [path for path in self._folder.answers if path.exists()],
        )
        left = self._tracker.close(hurry=status == "KILLED")
        for problem in left:
            self._console.print(f"not recorded in MLflow: {problem}", style="yellow")
        if left:
            command = f"python -m sweeper sync {self._plan.study.study_name}{self._elsewhere()}"
            self._console.print(f"Record     {command}", highlight=False, soft_wrap=True)
        if status == "FINISHED" and results.arms:
            self._make_room(results)
        return results

    def _show(self, results: StudyResults, status: RunStatus) -> None:
        if self._plan.settings.verbosity == "quiet":
            print_answer(results, self._console)
            text = f"\nResults    {self._folder.page}"
        else:
            print_results(results, self._console)
            text = self._next_commands(results, status)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _make_room(self, results: StudyResults) -> None:
        """Remove the losers' weights (sweeper.commands.retention), and say what the study takes up."""
        adapters = self._plan.study.retention.adapters
        freed, words = 0.0, ""
        if adapters is not None and losers(results, self._folder, adapters):
            try:
                registry = make_registry(self._plan.settings.tracking)
                held = [] if registry is None else [each.folder for each in registry.champions()]
                freed = delete(losers(results, self._folder, adapters, held))
                words = (
                    f"; {freed:,.1f} MiB of losers' weights freed (retention.adapters={adapters})"
                )
            except TrackingError as error:
                words = f"; nothing freed, since nobody tells which trial is a champion ({error})"
        used = size_mib(self._folder.path)
        text = f"Disk       {used:,.1f} MiB in {self._folder.path}{words}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _next_commands(self, results: StudyResults, status: RunStatus) -> str:
        name = self._plan.study.study_name
        total = self._plan.study.n_trials
        lines = ["", f"Results    {self._folder.page}"]
        best = results.arms[0].best
        if best is not None:
            artifact = self._folder.trial(best.arm, best.number).artifact
            lines.append(f"Best       {artifact or self._folder.trial(best.arm, best.number).path}")
        if status == "FAILED":
            return "\n".join(lines)
        if status == "KILLED":
            return "\n".join([*lines, f"Resume     python -m sweeper {self._plan.command}"])
        extended = with_override(self._plan.command, "hydra.sweeper.n_trials", str(2 * total))
        anew = with_override(self._plan.command, "hydra.sweeper.study_name", f"{name}_2")
        return "\n".join(
            [
                *lines,
                f"Read       python -m sweeper report {name}{self._elsewhere()}",
                f"Browse     {browse_command(self._plan.settings.tracking)}",
                f"Extend     python -m sweeper {extended}",
                f"Anew       python -m sweeper {anew}",
            ]
        )

    def _elsewhere(self) -> str:
        output_dir = self._plan.settings.output_dir
        return "" if output_dir == "outputs" else f" --output-dir {shlex.quote(output_dir)}"

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
            write_atomic(owner, f"{os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            yield
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
        raise StudyLocked(
            f"study {folder.path.name!r} is already run by another driver (process {who}); wait for "
            "it, or start another study with hydra.sweeper.study_name=NAME"
        ) from None
