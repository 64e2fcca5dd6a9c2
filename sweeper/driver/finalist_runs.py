"""Finalists: each arm's best configurations over further seeds, and the winners on unseen texts.

Runs when every search has ended, so that no search sees a figure of the test split. Winners are chosen
over the first seeds and judged over fresh ones: the seeds that chose a winner flatter it. An arm's best
recipe is trained and judged with as many fresh seeds, unless the recipe itself has won. While the answer
is PROVISIONAL the test split stays unread, and no recipe is trained.

Further seeds are trained like trials, but use no budget of n_trials and belong to no Optuna study.
Results on disk are used again: an ended training by its outcome.json, a judgement by its file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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
from sweeper.reporting.finalist_results import (
    ArmConclusion,
    FinalistRanking,
    RecipeResult,
    SeedRepeat,
    choose,
)
from sweeper.reporting.study_progress import TrialProgress
from sweeper.search.known_points import KnownRecipe
from sweeper.search.recipe_trial import best_recipe
from sweeper.search.states import STATES
from sweeper.search.study import point_of, settings_of, shown_point
from sweeper.search.study_plan import ArmPlan
from sweeper.tracking.provenance import origin
from sweeper.tracking.tracker import TrialRecord, dataset_record

Rankings = Mapping[str, FinalistRanking]
WINNERS = "winners"
"""Name on the screen of the trainings with fresh seeds, which are those of winners and recipes."""


@dataclass
class RecipeFinalist:
    """An arm's best recipe, with its trainings with fresh seeds."""

    known: KnownRecipe
    candidate: Candidate
    fresh: list[FinalistTraining] = field(default_factory=list)
    """Empty if the recipe won, whose fresh seeds are the winner's, or if the test split stays unread."""

    @property
    def stored(self) -> RecipeResult:
        """The recipe and its outcomes as a plain value."""
        return RecipeResult(
            name=self.known.name,
            source=self.known.source,
            number=self.candidate.number,
            judged=_repeats(self.fresh),
        )


@dataclass
class ArmFinalists:
    """An arm's candidates, and its winner once it was chosen."""

    arm: ArmPlan
    study: optuna.Study
    candidates: list[Candidate]
    ranking: FinalistRanking | None = None
    fresh: list[FinalistTraining] = field(default_factory=list)
    """Trainings of the winner with seeds that took no part in its choice."""
    recipe: RecipeFinalist | None = None
    """The best recipe that was tried to its end."""

    @property
    def facts(self) -> ArmBaseline:
        """The facts about the arm."""
        return ArmBaseline.model_validate(self.study.user_attrs["facts"])

    @property
    def winner(self) -> Candidate:
        """The candidate that won."""
        assert self.ranking is not None
        number = self.ranking.winner
        return next(each for each in self.candidates if each.number == number)

    def choose(self) -> FinalistRanking:
        """Choose the winner by the mean over the seeds so far."""
        finalists = tuple(candidate.finalist() for candidate in self.candidates)
        winner = choose(finalists, self.arm.settings.objective.direction)
        self.ranking = FinalistRanking(finalists=finalists, winner=winner)
        return self.ranking

    def settle(self) -> FinalistRanking:
        """Add the outcomes of the fresh seeds, and of those of the recipe, to the ranking."""
        assert self.ranking is not None
        recipe = None if self.recipe is None else self.recipe.stored
        update = {"judged": _repeats(self.fresh), "recipe": recipe}
        self.ranking = self.ranking.model_copy(update=update)
        return self.ranking


def _repeats(trainings: Sequence[FinalistTraining]) -> tuple[SeedRepeat, ...]:
    return tuple(SeedRepeat(seed=each.settings.seed, outcome=each.outcome) for each in trainings)


@dataclass
class FinalistRuns:
    """Trains and judges the finalists of all arms."""

    wanted: FinalistSettings
    budget: ArmBudget
    services: StudyServices
    dispatcher: Dispatcher
    provisional: Callable[[Rankings], bool]
    """Returns True if the answer with these winners is PROVISIONAL."""
    unsettled: bool = field(init=False, default=False)
    """True if the test split was left unread because the answer is PROVISIONAL."""
    cut_short: bool = field(default=False, init=False)
    """True if the budget ended before all further seeds were trained."""

    def run(self, arms: Sequence[tuple[ArmPlan, optuna.Study]]) -> dict[str, ArmConclusion]:
        """Return the end of each arm that has a complete trial.

        Raises:
            KeyboardInterrupt: after the running trainings were stopped. The same command continues.
        """
        found = [ArmFinalists(arm, study, self._candidates(arm, study)) for arm, study in arms]
        ended = [each for each in found if each.candidates]
        for each in ended:
            self._train_candidates(each)
        rankings = {each.arm.name: each.choose() for each in ended}
        # Every look at the test split uses it up, so an answer that may change is worth none.
        self.unsettled = self.provisional(rankings)
        # Also without a test split: forgetting and a champion's margin need the spread between seeds.
        if ended:
            self._train_fresh(ended)
        return {each.arm.name: self._judged(each) for each in ended}

    @property
    def _reads_test(self) -> bool:
        return self.wanted.test and not self.unsettled

    def _judged(self, found: ArmFinalists) -> ArmConclusion:
        assert found.ranking is not None
        judging = WinnerJudging(
            self.services, self._reads_test, found.winner, found.facts, found.fresh or None
        )
        ended = judging.run(found.ranking, self.dispatcher)
        recipe = found.recipe
        if recipe is None or not recipe.fresh:
            return ended
        of_recipe = WinnerJudging(
            self.services, self._reads_test, recipe.candidate, found.facts, recipe.fresh
        )
        return ended.with_recipe(of_recipe.run_on_test_split(self.dispatcher))

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
        candidates = [_candidate(arm, trial) for _, _, trial, _ in best]
        for candidate in candidates:
            first = candidate.settings.seed
            further = 0 if arm.run_id else self.wanted.seeds - 1  # an adopted run is never trained
            seeds = range(first + 1, first + 1 + further)
            title = _title(arm.name)
            candidate.trainings = [self._training(candidate, study, seed, title) for seed in seeds]
        return candidates

    def _training(
        self, candidate: Candidate, study: optuna.Study, seed: int, title: str
    ) -> FinalistTraining:
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
        view = TrialProgress(key=key, arm=title, number=number, point=candidate.point)
        expected = expected_inputs(facts, arm.settings.trial, settings)
        identity = self.services.claims.claim(record, settings, expected)
        return FinalistTraining(record, settings, view, self.services, expected, identity)

    def _train_candidates(self, found: ArmFinalists) -> None:
        """Train an arm's best configurations with the seeds that choose among them."""
        name = found.arm.name
        numbers = ", ".join(str(each.number) for each in found.candidates)
        trainings = [training for each in found.candidates for training in each.trainings]
        self._train(
            _title(name),
            [(found, training) for training in trainings],
            f"arm {name}: the finalists are the configurations of trials {numbers}; "
            "training them with {count} further seeds",
        )

    def _train_fresh(self, arms: Sequence[ArmFinalists]) -> None:
        """Train each winner with fresh seeds, and each arm's best recipe if both will be compared."""
        for found in arms:
            found.fresh = self._fresh_trainings(found, found.winner)
            found.recipe = self._best_recipe(found)
        recipes = [found.recipe for found in arms if found.recipe is not None]
        rivals = [recipe.known.name for recipe in recipes if recipe.fresh]
        winners = ", ".join(f"{found.arm.name}/{found.winner.number:04d}" for found in arms)
        trained = f"them and the recipe {' and '.join(rivals)}" if rivals else "them"
        # in turns, so that seeds whose times are compared meet the same load of the machine
        self._train(
            WINNERS,
            [
                *_in_turns([[(f, each) for each in f.fresh] for f in arms]),
                *_in_turns([[(f, each) for each in f.recipe.fresh] for f in arms if f.recipe]),
            ],
            f"the winners are {winners}; training {trained} with {{count}} fresh seeds, which alone "
            "judge them",
        )
        for found in arms:
            found.settle()

    def _best_recipe(self, found: ArmFinalists) -> RecipeFinalist | None:
        """Return an arm's best recipe, with trainings of its own if it will be compared."""
        known = None if found.arm.run_id else best_recipe(found.arm, found.study)
        if known is None:
            return None
        recipe, trial = known
        candidate = _candidate(found.arm, trial)
        judged = self._reads_test and found.facts.rows.get("test", 0) > 0
        # a recipe that won has the winner's seeds, and one that is not judged needs none
        compared = judged and candidate.number != found.winner.number
        fresh = self._fresh_trainings(found, candidate) if compared else []
        return RecipeFinalist(recipe, candidate, fresh)

    def _fresh_trainings(self, found: ArmFinalists, candidate: Candidate) -> list[FinalistTraining]:
        """Return the trainings of a configuration with the seeds after those that choose a winner."""
        first = candidate.settings.seed + self.wanted.seeds
        # an adopted run is never trained
        count = 0 if found.arm.run_id else self.wanted.fresh_seeds
        return [
            self._training(candidate, found.study, seed, WINNERS)
            for seed in range(first, first + count)
        ]

    def _train(
        self, title: str, jobs: Sequence[tuple[ArmFinalists, FinalistTraining]], words: str
    ) -> None:
        """Train what is not on disk, in this order, as far as the budget allows.

        Args:
            title: the jobs' name on the screen.
            jobs: the trainings, each with its arm.
            words: what is announced, with {count} for the number of missing trainings.
        """
        trainings = [training for _, training in jobs]
        missing = [training for training in trainings if not training.reuse_outcome()]
        if missing:
            self.services.view.event(words.format(count=len(missing)))
            found = jobs[0][0]
            base_value = found.facts.base_value(found.arm.settings.objective.metric)
            self.services.board.open_arm(title, len(trainings), base_value)
        for training in trainings:
            if training.outcome is not None:
                self._record(training)
        owners = {found.arm.name: found for found, _ in jobs}.values()
        typical = typical_seconds(
            [
                each.own.metrics.get("cost/seconds", 0.0)
                for found in owners
                for each in found.candidates
            ]
        )
        source = JobList(
            missing,
            self._finished,
            # without values: a plateau ends searches only
            refusal=lambda: self.budget.refusal(self._started(), typical, []),
            budget_left=lambda: self.budget.left(self._started()),
        )
        self.dispatcher.run(source)
        if source.refused is not None:
            self.cut_short = True
            left = sum(training.outcome is None for training in trainings)
            self.services.view.event(f"{title}: {left} further seeds left out: {source.refused}")

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


def _candidate(arm: ArmPlan, trial: FrozenTrial) -> Candidate:
    """Return the configuration of a complete trial as one that may win its arm."""
    return Candidate(
        arm,
        trial.number,
        shown_point(trial),
        settings_of(arm, trial),
        arm.settings_at(point_of(trial)).trial,
        Outcome.model_validate(trial.user_attrs["outcome"]),
    )


def _in_turns(
    jobs: Sequence[Sequence[tuple[ArmFinalists, FinalistTraining]]],
) -> list[tuple[ArmFinalists, FinalistTraining]]:
    """Return the jobs of several arms in one list, one of each arm after the other."""
    turns = itertools.zip_longest(*jobs)
    return [pair for turn in turns for pair in turn if pair is not None]


def _title(arm: str) -> str:
    return f"{arm} finalists"


def _facts(study: optuna.Study) -> ArmBaseline:
    return ArmBaseline.model_validate(study.user_attrs["facts"])
