"""Finalists: each arm's best configurations over further seeds, and the winners on unseen texts.

Runs when every search has ended, so that no search sees a figure of the test split. Further seeds are
trained like trials, but use no budget of n_trials and belong to no Optuna study. Results on disk are
used again: an ended training by its outcome.json, a judgement by its file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from sweeper.config.input_sources import expected_inputs
from sweeper.config.settings import FinalistSettings
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.driver.budget import ArmBudget, typical_seconds
from sweeper.driver.dispatcher import Dispatcher
from sweeper.driver.finalist_jobs import Candidate, FinalistTraining
from sweeper.driver.jobs import JobList
from sweeper.driver.study_services import StudyServices
from sweeper.driver.trial_sizes import recorded
from sweeper.driver.winner_judging import WinnerJudging
from sweeper.reporting.finalist_results import ArmConclusion, FinalistRanking, choose
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.states import STATES
from sweeper.search.study import point_of, settings_of, shown_point
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import TrialRecord, dataset_record


@dataclass
class FinalistRuns:
    """Trains and judges the finalists of all arms."""

    wanted: FinalistSettings
    budget: ArmBudget
    services: StudyServices
    dispatcher: Dispatcher
    cut_short: bool = field(default=False, init=False)
    """True if the budget ended before all further seeds were trained."""

    def run(self, arms: Sequence[tuple[ArmPlan, optuna.Study]]) -> dict[str, ArmConclusion]:
        """Return the end of each arm that has a complete trial.

        Raises:
            KeyboardInterrupt: after the running trainings were stopped. The same command continues.
        """
        finals = {}
        for arm, study in arms:
            candidates = self._candidates(arm, study)
            if candidates:
                facts = _facts(study)
                self._train(arm, candidates, facts)
                finalists = tuple(candidate.finalist() for candidate in candidates)
                winner = choose(finalists, arm.settings.objective.direction)
                final = FinalistRanking(finalists=finalists, winner=winner)
                chosen = next(each for each in candidates if each.number == winner)
                judging = WinnerJudging(self.services, self.wanted.test, chosen, facts)
                finals[arm.name] = judging.run(final, self.dispatcher)
        return finals

    def _candidates(self, arm: ArmPlan, study: optuna.Study) -> list[Candidate]:
        """Return the best complete trials, each with the trainings that its further seeds need."""
        minimize = arm.settings.objective.direction == "minimize"
        found: list[tuple[float, int, FrozenTrial, Outcome]] = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            outcome = Outcome.model_validate(trial.user_attrs["outcome"])
            if STATES[outcome.cause].complete and outcome.best_value is not None:
                # ties go to the trial that was tried first
                order = outcome.best_value if minimize else -outcome.best_value
                found.append((order, trial.number, trial, outcome))
        best = sorted(found, key=lambda item: item[:2])[: self.wanted.top]
        candidates = [
            Candidate(
                arm,
                number,
                shown_point(trial),
                settings_of(arm, trial),
                arm.settings_at(point_of(trial)).trial,
                outcome,
            )
            for _, number, trial, outcome in best
        ]
        for candidate in candidates:
            first = candidate.settings.seed
            further = 0 if arm.run_id else self.wanted.seeds - 1  # an adopted run is never trained
            seeds = range(first + 1, first + 1 + further)
            candidate.trainings = [self._training(candidate, study, seed) for seed in seeds]
        return candidates

    def _training(self, candidate: Candidate, study: optuna.Study, seed: int) -> FinalistTraining:
        arm, number, settings = candidate.arm, candidate.number, candidate.settings_of(seed)
        key = f"{arm.name}/{number:04d}_seed_{seed}"
        facts = _facts(study)
        tags = {
            **{"arm": arm.name, "finalist": f"{arm.name}/{number:04d}"},
            **origin(self.services.provenance, facts),
        }
        folder = self.services.folder.finalist(arm.name, number, seed)
        params = recorded(settings, searched=candidate.point)
        record = TrialRecord(key, folder, params, tags, dataset_record(facts, settings.data))
        view = TrialProgress(key=key, arm=_title(arm), number=number, point=candidate.point)
        expected = expected_inputs(facts, arm.settings.trial, settings)
        identity = self.services.claims.claim(record, settings, expected)
        return FinalistTraining(record, settings, view, self.services, expected, identity)

    def _train(self, arm: ArmPlan, candidates: Sequence[Candidate], facts: ArmBaseline) -> None:
        trainings = [training for each in candidates for training in each.trainings]
        missing = [training for training in trainings if not training.reuse_outcome()]
        if missing:
            numbers = ", ".join(str(each.number) for each in candidates)
            self.services.view.event(
                f"arm {arm.name}: the finalists are the configurations of trials {numbers}; "
                f"training them with {len(missing)} further seeds"
            )
            base_value = facts.base_value(arm.settings.objective.metric)
            self.services.board.open_arm(_title(arm), len(trainings), base_value)
        for training in trainings:
            if training.outcome is not None:
                self._record(training)
        typical = typical_seconds(
            [each.own.metrics.get("cost/seconds", 0.0) for each in candidates]
        )
        source = JobList(
            missing,
            self._finished,
            refusal=lambda: self.budget.refusal(self._started(), typical, []),
            budget_left=lambda: self.budget.left(self._started()),
        )
        self.dispatcher.run(source)
        if source.refused is not None:
            self.cut_short = True
            left = sum(training.outcome is None for training in trainings)
            self.services.view.event(
                f"arm {arm.name}: {left} further seeds of its finalists left out: {source.refused}"
            )

    def _started(self) -> list[float]:
        """Return a start for each running job: now, because only their number is known."""
        return [self.budget.clock()] * len(self.dispatcher.busy)

    def _finished(self, training: FinalistTraining) -> None:
        outcome = training.outcome
        assert outcome is not None, f"{training.key} ended without an outcome"
        self.budget.ended.append(outcome.metrics.get("cost/seconds", 0.0))
        self._record(training)
        words = training.view.summary(outcome, training.settings.objective.metric)
        left_out = "" if training.complete else "; left out of its configuration's mean"
        self.services.view.event(words + left_out)

    def _record(self, training: FinalistTraining) -> None:
        outcome = training.outcome
        assert outcome is not None, f"{training.key} ended without an outcome"
        training.view.end(outcome)
        self.services.board.add(training.view)
        status, cause = STATES[outcome.cause].status or "KILLED", outcome.cause
        self.services.tracker.end(training.record, status, outcome.metrics, {"cause": cause})


def _title(arm: ArmPlan) -> str:
    return f"{arm.name} finalists"


def _facts(study: optuna.Study) -> ArmBaseline:
    return ArmBaseline.model_validate(study.user_attrs["facts"])
