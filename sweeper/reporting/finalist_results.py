"""The end of an arm: its finalists over their seeds, the winner, and its losses on unseen texts.

Plain values. `sweeper.driver.finalist_runs` makes them, reporting describes them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import Field

from sweeper.core.outcome import (
    ExampleLosses,
    HeldOutKind,
    HeldOutLosses,
    Outcome,
    ServeForm,
    device_seconds,
    stored_outcome,
)
from sweeper.core.paths import StudyFolder, TrialFolder
from sweeper.core.value import FrozenValue
from sweeper.search.states import STATES


class SeedRepeat(FrozenValue):
    """A configuration trained with one seed. The first is the trial of the search itself."""

    seed: int
    outcome: Outcome | None
    """None if the seed was left out (the budget)."""

    @property
    def value(self) -> float | None:
        """The objective's value on the validation split. None if the training did not end by itself."""
        if self.outcome is None or not STATES[self.outcome.cause].complete:
            return None
        return self.outcome.best_value


class FinalistResult(FrozenValue):
    """A configuration of an arm over its seeds."""

    number: int
    """The number of the trial in which the search tried it."""
    repeats: tuple[SeedRepeat, ...]

    @property
    def values(self) -> list[float]:
        """The objective's value of each seed whose training ended by itself."""
        return [repeat.value for repeat in self.repeats if repeat.value is not None]

    @property
    def mean(self) -> float:
        """Mean of those values."""
        return statistics.fmean(self.values)

    @property
    def diverged(self) -> int:
        """Number of seeds whose training showed that the configuration is impossible."""
        return impossible(self.repeats)

    @property
    def spread(self) -> float | None:
        """Standard deviation (n - 1) of those values, or None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def impossible(repeats: Sequence[SeedRepeat]) -> int:
    """Return the number of trainings that diverged or ran out of memory."""
    ended = [repeat.outcome for repeat in repeats if repeat.outcome is not None]
    return sum(STATES[outcome.cause].infeasible for outcome in ended)


class RecipeResult(FrozenValue):
    """The best known point of an arm, with which the winner of its search is compared."""

    name: str
    source: str
    """Where the point was read."""
    number: int
    """The number of the trial in which the search tried it."""
    judged: tuple[SeedRepeat, ...] = ()
    """Its fresh seeds. Empty if the recipe itself won, because the winner's seeds are its own, or if
    the test split stayed unread."""
    test_losses: dict[int, float] = Field(default_factory=dict)
    """Its loss on the test split, by seed, in nats per target token."""

    @property
    def values(self) -> list[float]:
        """The objective's value of each fresh seed whose training ended by itself."""
        return [repeat.value for repeat in self.judged if repeat.value is not None]


class FinalistRanking(FrozenValue):
    """The results of an arm's finalists."""

    finalists: tuple[FinalistResult, ...]
    winner: int
    """Number of the finalist with the best mean on the validation split."""
    judged: tuple[SeedRepeat, ...] = ()
    """The winner's fresh seeds, which took no part in the choice. Empty: its own seeds were judged."""
    test_losses: dict[int, float] = Field(default_factory=dict)
    """The winner's loss on the test split, by seed, in nats per target token."""
    untuned_test_loss: float | None = None
    """The base's loss on the test split, quantized as in the winner's trials."""
    general_losses: dict[int, float] = Field(default_factory=dict)
    """The winner's loss on general text, by seed, in nats per token."""
    untuned_general_loss: float | None = None
    """The base's loss on general text, quantized as in the winner's trials."""
    recipe: RecipeResult | None = None
    """The best known point that was tried to its end. None: there was none, or an older version stored
    the ranking."""

    @property
    def of_winner(self) -> FinalistResult:
        """The finalist that won."""
        return next(each for each in self.finalists if each.number == self.winner)

    @property
    def repeats(self) -> tuple[SeedRepeat, ...]:
        """The trainings of the winner that its judgement rests on."""
        return self.judged or self.of_winner.repeats

    @property
    def usable(self) -> int:
        """Number of those trainings that ended by themselves."""
        return sum(repeat.value is not None for repeat in self.repeats)

    @property
    def test_loss(self) -> float | None:
        """Mean over the winner's seeds, or None without a judgement."""
        return statistics.fmean(self.test_losses.values()) if self.test_losses else None

    @property
    def general_loss(self) -> float | None:
        """Mean over the winner's seeds, or None without a judgement."""
        return statistics.fmean(self.general_losses.values()) if self.general_losses else None

    @property
    def metrics(self) -> dict[str, float]:
        """The winner's figures on unseen texts, by the names under which they are recorded."""
        return unseen_metrics(self.test_loss, self.general_loss, self.untuned_general_loss)


@dataclass(frozen=True)
class ArmConclusion:
    """An arm's end, and the losses of its winner and of its base on unseen texts."""

    final: FinalistRanking
    seeds: Mapping[int, HeldOutLosses] = field(default_factory=dict)
    untuned: HeldOutLosses = field(default_factory=HeldOutLosses)
    served: Mapping[ServeForm, HeldOutLosses] = field(default_factory=dict)
    """Losses of one model of the winner in each form in which it can be served."""
    recipe_seeds: Mapping[int, HeldOutLosses] = field(default_factory=dict)
    """Losses of the recipe's fresh seeds on the test split."""

    def with_recipe(self, seeds: Mapping[int, HeldOutLosses]) -> ArmConclusion:
        """Return the end with the losses of the recipe's fresh seeds."""
        recipe = self.final.recipe
        assert recipe is not None, "only a recipe that was a finalist is judged"
        losses = {seed: found.test.loss for seed, found in seeds.items() if found.test}
        judged = recipe.model_copy(update={"test_losses": losses})
        final = self.final.model_copy(update={"recipe": judged})
        return replace(self, final=final, recipe_seeds=seeds)

    @classmethod
    def judged(
        cls, final: FinalistRanking, seeds: Mapping[int, HeldOutLosses], untuned: HeldOutLosses
    ) -> ArmConclusion:
        """Return the end with the figures that follow from these losses."""
        figures = {
            "test_losses": {s: found.test.loss for s, found in seeds.items() if found.test},
            "untuned_test_loss": untuned.test and untuned.test.loss,
            "general_losses": {
                s: found.general.loss for s, found in seeds.items() if found.general
            },
            "untuned_general_loss": untuned.general and untuned.general.loss,
        }
        return cls(final.model_copy(update=figures), seeds, untuned)

    def losses(self, kind: HeldOutKind) -> list[ExampleLosses]:
        """Return the losses of those of the winner's seeds that were judged on one kind of text."""
        found = (getattr(unseen, kind) for unseen in self.seeds.values())
        return [examples for examples in found if examples is not None]

    @property
    def recipe_losses(self) -> list[ExampleLosses]:
        """The losses of those of the recipe's seeds that were judged on the test split."""
        return [unseen.test for unseen in self.recipe_seeds.values() if unseen.test is not None]


def unseen_metrics(
    test: float | None, general: float | None, untuned_general: float | None
) -> dict[str, float]:
    """Return the measured losses on unseen texts, by the names under which they are recorded."""
    metrics = {} if test is None else {"test/loss": test, "test/perplexity": math.exp(test)}
    if general is None or untuned_general is None:
        return metrics
    forgetting = general - untuned_general
    general_metrics = {"loss": general, "untuned_loss": untuned_general, "forgetting": forgetting}
    return {**metrics, **{f"general/{name}": value for name, value in general_metrics.items()}}


def choose(finalists: Sequence[FinalistResult], direction: str) -> int:
    """Return the winner's number: the best mean among those of which the fewest seeds failed."""
    sign = 1.0 if direction == "minimize" else -1.0

    def order(finalist: FinalistResult) -> tuple[int, int, float]:
        missing = len(finalist.repeats) - len(finalist.values)
        return finalist.diverged, missing, sign * finalist.mean

    return min(finalists, key=order).number


def finalists_seconds(folder: StudyFolder, arm: str) -> float:
    """Return the device time of an arm's further seeds so far, in seconds, from their folders."""
    outcomes = (
        stored_outcome(TrialFolder(path.parent))
        # Optuna's storage holds the search's own trials alone.
        for path in folder.finalists(arm).glob("trial_*/outcome.json")
    )
    return math.fsum(device_seconds(found.metrics) for found in outcomes if found is not None)
