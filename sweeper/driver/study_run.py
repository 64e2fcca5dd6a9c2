"""The run of a study: its arms, and then their finalists.

Arms begin in their order. Once an arm has handed out its last trial, slots that become free go to the
next arm. Only points beside a best one wait for what they follow from. Decisions read the record of
their own arm, so the tables are those of arms that run one after the other.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.storages import BaseStorage

from sweeper.config.input_sources import describe_changes, expected_inputs
from sweeper.config.settings import metric_words
from sweeper.config.space import Point
from sweeper.core.errors import InputsChanged, StudyError, StudyMismatch
from sweeper.core.outcome import ArmBaseline, BaselineRun
from sweeper.core.value import MemoryShortfall
from sweeper.driver.arm_context import ArmContext
from sweeper.driver.arm_probe import ProbeJob, facts_found
from sweeper.driver.arm_search import ArmSearch
from sweeper.driver.budget import ArmBudget, StudyBudget, typical_seconds
from sweeper.driver.command_handler import CommandHandler
from sweeper.driver.device_time import searched_seconds, spent_seconds
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_runs import FinalistRuns
from sweeper.driver.job_sequences import JobSequence, JobSequences
from sweeper.driver.jobs import JobList, JobSource
from sweeper.driver.results_writer import ResultsWriter
from sweeper.driver.start_forecast import StartForecast
from sweeper.driver.study_services import StudyServices
from sweeper.driver.token_goal import token_goal
from sweeper.driver.worker_pool import WorkerPool
from sweeper.reporting.result_tables import describe_data
from sweeper.search.first_points import fill_study
from sweeper.search.record_prefix import ARRIVED, reach
from sweeper.search.refinement import (
    REFINE,
    best_point,
    fix_refinement,
    queue_refined,
    rates_beside_best,
    refined_count,
    twin_warmup,
    warmup_beside_best,
)
from sweeper.search.search_outlook import store_outlook
from sweeper.search.searched_epochs import FEW_ROWS_WORDS, with_few_rows
from sweeper.search.study import WORKERS, counted, describe_equal_choices, open_study
from sweeper.search.study_plan import LORA, ArmPlan
from sweeper.tracking.tracker_factory import make_baselines
from sweeper.workers.engines import open_engine
from sweeper.workers.worker_count import WorkerCount, count_workers, this_machine

PAGED = "training.optim=paged_adamw_8bit"
"""Its states need no memory of the device: they move to the host's memory and back."""

ArmSources = Iterator[JobSource[Any] | None]
"""The sources of an arm's jobs, one after the other, and None while it waits for another arm."""


@dataclass
class StudyRun:
    """Runs the searches of all arms, then their finalists."""

    services: StudyServices
    storage: BaseStorage
    pool: WorkerPool
    dispatcher: Dispatcher
    commands: CommandHandler
    budget: StudyBudget
    results: ResultsWriter
    on_confirmed: Callable[[], None]
    """Called when an arm's study is known to answer the plan's question."""
    _ran: dict[str, int] = field(default_factory=dict)
    """The total to which each arm was run."""
    _searches: dict[str, ArmSearch] = field(default_factory=dict)
    """The search of each arm that has begun and not ended."""
    _probed: dict[str, tuple[ArmPlan, ArmBaseline]] = field(default_factory=dict)
    """The arms that this run has probed, and the facts about them."""
    _count: WorkerCount = field(init=False)
    """The devices and the CPU threads that the study uses."""
    _devices: int = 0
    """The devices of each worker in the pool."""
    _forecast: StartForecast = field(init=False)
    _announced: bool = False
    """True once the data and the device were announced."""

    def __post_init__(self) -> None:
        self._state = self.results.state
        self._forecast = StartForecast(self._state.plan, self.services.view.event, this_machine)

    def run(self) -> None:
        """Run everything that the plan wants.

        Raises:
            StudyMismatch: data or base model were changed while the study ran.
            SweeperError: the study cannot continue.
            KeyboardInterrupt: a person or a signal stopped the study.
        """
        try:
            self._run_arms()
        except InputsChanged as changed:
            raise self._mismatch(changed) from changed

    def _run_arms(self) -> None:
        self._count = self._count_workers()
        self.services.view.event(f"workers: {self._count}")
        # before the arms are chosen: a kept `study extend` gives
        # an arm that was complete more to do
        self.commands.catch_up()
        while arms := self._next_arms():
            self._host(arms)
            self._run_together(arms)
        if not self._announced:
            raise StudyError(
                "the time is used up before the base and the data of any arm were loaded. Give the "
                "study more time (hydra.sweeper.budget)"
            )
        self._state.searches_ended = True
        # the finalists of all arms take turns on the same workers,
        # so these must be wide enough for each
        self._host(self._state.plan.arms)
        self._run_finalists()

    def _next_arms(self) -> list[ArmPlan]:
        """Return the next arms that share workers, of those that were not run to their totals.

        An extended arm comes again, and one that gave its device time to another. Arms whose trials need
        other numbers of devices share no workers, so a wide trial never waits for enough narrow ones to
        end.
        """
        arms = [arm for arm in self._state.plan.arms if self._ran.get(arm.name) != arm.n_trials]
        # an adopted arm costs little, and its problems are best known first
        arms.sort(key=lambda arm: arm.run_id is None)
        if self._state.plan.study.protocol == "paper" or self._state.plan.equal_tokens:
            return arms[:1]  # how long another arm is searched follows from the whole first search
        return list(itertools.takewhile(lambda arm: _width(arm) == _width(arms[0]), arms))

    def _run_together(self, arms: Sequence[ArmPlan]) -> None:
        """Run arms to their ends on the same workers."""
        sequences: dict[str, JobSequence] = {}
        for arm in arms:
            sequences[arm.name] = JobSequence(self._sources(arm, dict(sequences)))
        self.dispatcher.run(JobSequences(list(sequences.values())))
        for name, sequence in sequences.items():
            if not sequence.ended:  # the time is used up, and no worker starts
                self._end_arm(name)

    def _host(self, arms: Sequence[ArmPlan]) -> None:
        """Have workers that are wide enough for the trials of these arms."""
        devices = max(map(_width, arms))
        if devices == self._devices:
            return
        self.pool.close()  # the next engine needs the devices of this one
        workers = self._state.plan.settings.workers
        log, say = self.services.folder.worker_log, self.services.view.event
        count, threads = self._workers(devices), self._count.threads
        self.pool.host_with(open_engine(workers, count, log, devices, say, threads))
        self._devices = devices

    def _workers(self, devices: int) -> int:
        """Return the number of workers of that many devices each."""
        if self._state.plan.settings.workers.engine == "inline":
            return 1
        return max(1, self._count.jobs // devices)

    def _places(self, arm: ArmPlan) -> int:
        """Return how many places a trial of an arm lies behind those that decide about it."""
        if not self._state.plan.study.reproducible:
            return ARRIVED
        return reach(self._workers(_width(arm)))

    def _count_workers(self) -> WorkerCount:
        plan, studies = self._state.plan, self._state.studies
        stored = [
            study.user_attrs[WORKERS] for study in studies.values() if WORKERS in study.user_attrs
        ]
        return count_workers(
            plan.study.n_jobs,
            stored[0] if stored else None,
            begun=bool(studies),
            workers=plan.settings.workers,
            arms=[(arm.settings.trial, arm.n_trials) for arm in plan.arms],
        )

    def _sources(self, arm: ArmPlan, before: Mapping[str, JobSequence]) -> ArmSources:
        """Run an arm: yield its probe, its search, and the search of points beside its best one.

        Args:
            arm: the arm.
            before: the arms that take free slots before this one, by name.
        """
        while not all(each.ended or self._leaves_slots(name) for name, each in before.items()):
            yield None
        adopted = self._adopted(arm)
        model = None if adopted is None else adopted.model
        probe = ProbeJob(arm.name, arm.settings.trial, model)
        yield JobList([probe])
        facts = facts_found(probe)
        if isinstance(facts, MemoryShortfall):
            self._leave_out(arm, facts)
        elif facts is not None:
            yield from self._search(arm, facts, adopted, before)
        self._end_arm(arm.name)

    def _leaves_slots(self, name: str) -> bool:
        """Return True if an arm's search has begun and handed out its last trial."""
        # before that even a slot in which the search waits for a trial is kept: a worker holds one base,
        # and would load that of the other arm and then the first one again
        return name in self._searches and self._searches[name].done

    def _end_arm(self, name: str) -> None:
        search = self._searches.pop(name, None)
        if search is not None and search.gave_way:
            return  # it comes again, with what the other arms leave
        self._ran[name] = self._state.total(name)
        if search is not None:
            search.conclude()
            # once, because it takes as long as several draws of the sampler
            store_outlook(self._state.studies[name], self._state.plan, self._state.arm(name))
        if name not in self._probed and name not in self.results.misfits:
            words = "the time is used up, and its base and data were not loaded"
            self.services.view.event(f"arm {name} is not run: {words}")

    def _search(
        self,
        arm: ArmPlan,
        facts: ArmBaseline,
        adopted: BaselineRun | None,
        before: Mapping[str, JobSequence],
    ) -> ArmSources:
        self._require_same_inputs(arm, facts)
        for remark in (
            *facts.base_remarks,
            *describe_equal_choices(arm.space, facts.equal_presets),
        ):
            self.services.view.event(f"arm {arm.name}: {remark}")
        if facts.padded_because is not None:
            words = f"arm {arm.name}: batches are padded, because {facts.padded_because}"
            self.services.view.event(words)
        arm = self._state.arm(arm.name)  # a command may have raised its total during the probe
        longer = with_few_rows(arm, facts.rows["train"])
        if longer is not arm:
            arm = longer
            self._state.replace_arm(arm)
            self.services.view.event(f"arm {arm.name}: {FEW_ROWS_WORDS}")
        context = self._open_arm(arm, facts, adopted)
        search = ArmSearch(
            context,
            lambda trials: self._state.total(arm.name) + refined_count(trials),
            lambda: self._on_trial_finished(context),
        )
        search.begin()
        self.commands.on_arm_opened()  # points for this arm may wait in the inbox
        self._searches[arm.name] = search
        yield search
        yield from self._refinement(context, search, before)
        # its trial has a copy now
        shutil.rmtree(self.services.folder.adopted(arm.name), ignore_errors=True)

    def _on_trial_finished(self, context: ArmContext) -> None:
        self.results.on_trial_finished()
        arm, trials = context.arm, self.services.board.trials.values()
        seconds = [t.seconds for t in trials if t.arm == arm.name and t.complete and t.seconds]
        left = self._state.total(arm.name) - counted(context.study)
        jobs = self._workers(_width(arm))
        self._forecast.trial_finished(arm, left, typical_seconds(seconds) or None, jobs)

    def _refinement(
        self, context: ArmContext, search: ArmSearch, before: Mapping[str, JobSequence]
    ) -> ArmSources:
        """Try points beside the best one of the arm's grid, once the whole grid was tried."""
        arm, study = context.arm, context.study
        if counted(study) < self._state.total(arm.name):
            return
        yield from self._beside(context, search, rates_beside_best(arm, study))
        while LORA in before and not before[LORA].ended:  # its winner's warm-up comes next
            yield None
        if search.gave_way:  # the rates come first, and decide beside which point
            return
        lora = self._state.studies.get(LORA)
        winner = {} if lora is None else best_point(self._state.arm(LORA), lora)
        for point in warmup_beside_best(arm, study, winner):
            steps = twin_warmup(arm, study, point)
            if steps is None:
                yield from self._beside(context, search, [point])
                continue
            words = (
                f"the warm-up of arm {LORA}'s winner is not tried: it has as many steps ({steps})"
            )
            self.services.view.event(f"arm {arm.name}: {words}")

    def _beside(
        self, context: ArmContext, search: ArmSearch, points: Sequence[Point]
    ) -> ArmSources:
        """Train the points that were not tried yet."""
        arm, study = context.arm, context.study
        if new := queue_refined(arm, study, points):
            trials = study.get_trials(deepcopy=False)
            self.services.board.want(arm.name, self._state.total(arm.name) + refined_count(trials))
            points_word = "point" if new == 1 else "points"
            words = f"arm {arm.name}: {new} further {points_word} beside the best of its grid"
            self.services.view.event(words)
            yield search

    def _require_same_inputs(self, arm: ArmPlan, facts: ArmBaseline) -> None:
        """Refuse an arm that finds other files than an arm before it, where both name the same.

        Raises:
            InputsChanged: arms that are compared with each other would answer different questions.
        """
        settings = arm.settings.trial
        for other, known in self._probed.values():
            expected = expected_inputs(known, other.settings.trial, settings)
            if lines := describe_changes(expected, facts.inputs, settings):
                words = (
                    f"arm {arm.name} found other data or another base model than arm {other.name}"
                )
                raise InputsChanged("\n".join([f"{words}:", *lines]))
        self._probed[arm.name] = arm, facts

    def _mismatch(self, changed: InputsChanged) -> StudyMismatch:
        name = self._state.plan.study.study_name
        commits = {facts.base_commit for _, facts in self._probed.values()} - {None}
        return StudyMismatch(
            f"study {name!r} was stopped, because its data or base model were changed while it ran. "
            f"{changed}\n"
            "  ways out:\n"
            "    continue this study:    put the earlier files back, and give the same command again\n"
            f"    start a new study:      hydra.sweeper.study_name={name}_2"
            # a branch of the hub may have moved
            + "".join(f"\n    take the hub's commit:  model.revision={each}" for each in commits)
        )

    def _open_arm(
        self, arm: ArmPlan, facts: ArmBaseline, adopted: BaselineRun | None
    ) -> ArmContext:
        """Open the arm's study, fill it with the points to try first, and announce the arm."""
        base_value = facts.base_value(self._state.plan.objective.metric)
        plan = self._state.plan
        study = open_study(plan, arm, facts, self.storage, self.services.study)
        # the next start uses the same number, from which follows which trials decide about which
        study.set_user_attr(WORKERS, self._count.stored())
        self.on_confirmed()
        self._state.studies[arm.name] = study
        if adopted is not None:
            study.set_user_attr("adopted", adopted.model_dump(mode="json"))
        fix_refinement(study, arm)
        words = fill_study(study, plan, arm, facts, self.storage)
        budget = self._arm_budget(arm)
        words += [left] if (left := budget.left([])) else []
        goal = token_goal(plan, arm, self._state.studies)
        words += [] if goal is None else [f"ends at {goal.tokens:,.0f} tokens, as arm {LORA} did"]
        done = counted(study)
        self._announce(arm, facts, done, words)
        self._forecast.open_arm(arm, facts, done, self._workers(_width(arm)))
        self.services.board.open_arm(arm.name, arm.n_trials, base_value)
        return ArmContext(
            arm=arm,
            study=study,
            facts=facts,
            pruner=plan.study.pruner,
            costs=plan.study.costs,
            budget=budget,
            services=self.services,
            places=self._places(arm),
            adopted=adopted,
            goal=goal,
        )

    def _adopted(self, arm: ArmPlan) -> BaselineRun | None:
        """Return the run that replaces the arm's search, if there is one.

        Once that run was judged, the trial's own copy of its model is enough.

        Raises:
            TrackingError: there is no such run, or it holds no model.
        """
        if arm.run_id is None:
            return None
        study = self._state.studies.get(arm.name)
        if study is not None and counted(study):
            known = BaselineRun.model_validate(study.user_attrs["adopted"])
            own = self.services.folder.trial(arm.name, 0).model
            return known.model_copy(update={"model": own.resolve()})
        baselines = make_baselines(self._state.plan.settings.tracking)
        return baselines.find(arm.run_id, self.services.folder.adopted(arm.name))

    def _leave_out(self, arm: ArmPlan, misfit: MemoryShortfall) -> None:
        """Announce that an arm cannot fit. The other arms still run.

        Raises:
            StudyError: no arm fits.
        """
        self.results.misfits[arm.name] = misfit
        words = [f"arm {arm.name} is not run: {misfit}", *self._ways_out(arm)]
        if len(self.results.misfits) == len(self._state.plan.arms):
            raise StudyError("\n".join(words))
        for line in words:
            self.services.view.event(line)

    def _ways_out(self, arm: ArmPlan) -> list[str]:
        smaller = "    a smaller base:           model.base_model=PATH_OR_HUB_ID"
        if arm.name == LORA:
            packed = arm.settings.quantization.kind == "nf4"
            return [
                *([] if packed else ["    a 4-bit base:             quantization=nf4"]),
                "    shorter rows:             data.max_length=TOKENS",
                f"    a paged 8-bit optimizer:  {PAGED}",
                smaller,
            ]
        where = f"hydra.sweeper.arms.{arm.name}"
        overrides = ",".join((*self._state.plan.study.arms[arm.name].overrides, PAGED))
        return [
            f"    a paged 8-bit optimizer:  {shlex.quote(f'{where}.overrides=[{overrides}]')}",
            smaller,
            "    an earlier full run:      baseline.run_id=MLFLOW_RUN_ID",
            f"    a study without it:       {shlex.quote(f'~{where}')}",
        ]

    def _run_finalists(self) -> None:
        """Train further seeds of the best trials, and judge the winners on unseen texts."""
        plan, studies = self._state.plan, self._state.studies
        if plan.study.finalists.top == 0:
            return
        runs = FinalistRuns(
            wanted=plan.study.finalists,
            budget=self.budget.of_arm(1.0, self._spent(), self._devices),
            services=self.services,
            dispatcher=self.dispatcher,
            provisional=self.results.is_doubtful,
        )
        arms = [(arm, studies[arm.name]) for arm in plan.arms if arm.name in studies]
        finals = runs.run(arms)
        self._state.cut_short = runs.cut_short
        self.results.unsettled = runs.unsettled
        self.results.finals = finals

    def _arm_budget(self, arm: ArmPlan) -> ArmBudget:
        """Return the arm's share of what the study may still use."""
        plan = self._state.plan
        wanted = {each.name: self._lacking(each) for each in plan.arms}
        names = list(wanted)
        following = sum(wanted[name] for name in names[names.index(arm.name) :])
        share = wanted[arm.name] / max(1, following)
        # arms whose last trials still run need what those will take, and nothing more
        running = sum(search.pass_budget_on() for search in self._searches.values())
        budget = self.budget.of_arm(share, self._spent() + running, self._devices)
        if plan.study.protocol == "paper" and arm.name != names[0]:
            equal = self._seconds_left_to_equal(arm, names[0])
            limit = budget.device_seconds
            budget.device_seconds = equal if limit is None else min(limit, equal)
        return budget

    def _lacking(self, arm: ArmPlan) -> int:
        """Return how many trials an arm may still begin."""
        study = self._state.studies.get(arm.name)
        if study is None:
            return arm.n_trials
        refined = refined_count(study.get_trials(deepcopy=False))
        lacking = arm.n_trials + refined - counted(study)
        if lacking <= 0 and study.user_attrs.get(REFINE):  # points beside the best one may follow
            lacking = self._state.plan.refined_at_most(arm) - refined
        return max(0, lacking)

    def _seconds_left_to_equal(self, arm: ArmPlan, first: str) -> float:
        """Return the device seconds that an arm's search lacks to have as many as the first arm's."""
        seconds = {
            name: searched_seconds(study)
            for name, study in self._state.studies.items()
            if name in (arm.name, first)
        }
        # Trials end whole, so an arm ends a little below or above: within what fairness tolerates.
        wanted = (1 + self._state.plan.study.fairness.tolerance / 2) * seconds.get(first, 0.0)
        return max(0.0, wanted - seconds.get(arm.name, 0.0))

    def _spent(self) -> float:
        """Return the device time of all trials and finalists so far, in seconds."""
        return spent_seconds(self._state.studies, self.services.folder)

    def _announce(self, arm: ArmPlan, facts: ArmBaseline, done: int, words: Sequence[str]) -> None:
        say = self.services.view.event
        if not self._announced:
            self._announced = True
            say(f"data: {describe_data(facts)}")
            say(f"device: {facts.device}, computing in {facts.dtype}")
        text = f"arm {arm.name}: {arm.n_trials} trials"
        if arm.run_id is not None:
            text = f"arm {arm.name}: adopted from MLflow run {arm.run_id}, judged and not trained"
        elif done >= arm.n_trials:
            text += ", all of them done before: nothing to train"
        elif done:
            text += f", {done} of them done before"
        metric = self._state.plan.objective.metric
        say(f"{text}. Untuned base: {metric_words(metric)} {facts.base_value(metric):.4f}")
        for word in words:
            say(f"arm {arm.name}: {word}")


def _width(arm: ArmPlan) -> int:
    """Return the devices that each trial of an arm occupies."""
    return arm.settings.training.devices_per_trial
