"""Forecast a study at its start, and again after the first finished trial of each arm.

Costs nothing: the hours come from the time that the probe took to judge the untuned base, and later from
the trials themselves. Arms begin one after the other, so each is forecast when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sweeper.core.errors import ConfigError
from sweeper.core.outcome import ANSWERING_SECONDS, ArmBaseline
from sweeper.driver.budget import duration
from sweeper.search.searched_epochs import mean_epochs
from sweeper.search.study_plan import ArmPlan, StudyPlan
from sweeper.training.schedule import look_steps, plan_schedule
from sweeper.workers.worker_count import MachineShare, needed_mib

TRAINING_FACTOR = 3.0
"""Cost of training on a row in costs of judging the row: a backward pass costs two forward passes."""


def estimated_seconds(arm: ArmPlan, facts: ArmBaseline) -> float | None:
    """Return the seconds of a trial that runs to its end, or None if the base's judging was not timed.

    Args:
        arm: the arm. A trial of it is taken to have the mean of the searched numbers of epochs.
        facts: the probe's answer.
    """
    judged, settings = facts.rows.get("validation", 0), arm.settings.trial
    if facts.judging_s is None or not judged:
        return None
    try:
        schedule = plan_schedule(settings.training, facts.rows["train"])
    except ConfigError:  # a point of the space decides the schedule
        return None
    row_s = facts.judging_s / judged
    longer = mean_epochs(arm) / settings.training.num_train_epochs
    trained = longer * schedule.total_steps * settings.training.effective_batch_size
    looks = len(look_steps(schedule))
    looked_at = looks * min(settings.evaluation.look_rows or judged, judged)
    # the base's answers are the longer ones if it does not know when to stop
    answered = 1 + (looks if settings.objective.is_costly else 0)
    answers_s = answered * facts.base_metrics.get(ANSWERING_SECONDS, 0.0)
    return row_s * (TRAINING_FACTOR * trained + looked_at + judged) + answers_s


def trainings_words(plan: StudyPlan) -> str:
    """Return all trainings of a study by arm, as in "15 in all: lora 12 and 3 with further seeds".

    An arm that tries further points beside the best of its grid makes it a range, "23 to 26 in all". So
    does a recipe, whose seeds are trained unless the recipe itself wins.
    """
    arms = [arm for arm in plan.arms if arm.run_id is None]
    total = sum(arm.n_trials + plan.further_seeds(arm) for arm in arms)
    parts = "; ".join(f"{arm.name} {_parts(plan, arm, arm.n_trials)}" for arm in arms)
    most = sum(plan.refined_at_most(arm) + plan.recipe_seeds_at_most(arm) for arm in arms)
    count = f"{total} to {total + most}" if most else str(total)
    return f"{count} in all: {parts}"


def _parts(plan: StudyPlan, arm: ArmPlan, trials: int) -> str:
    further = plan.further_seeds(arm)
    seeds = f" and {further} with further seeds" if further else ""
    most = plan.refined_at_most(arm)
    refined = f" (and up to {most} beside the best of its grid)" if most else ""
    of_recipe = plan.recipe_seeds_at_most(arm)
    recipe = f" (and up to {of_recipe} of its recipe)" if of_recipe else ""
    # at equal tokens a later arm's trials are more or fewer, because their lengths differ
    about = "about " if plan.equal_tokens and arm.name != plan.arms[0].name else ""
    return f"{about}{trials} in the search{refined}{seeds}{recipe}"


@dataclass
class StartForecast:
    """Says what a study will take."""

    plan: StudyPlan
    say: Callable[[str], None]
    machine: Callable[[], MachineShare]
    _begun: bool = False
    _untimed: set[str] = field(default_factory=set)
    """Arms whose first finished trial is awaited."""

    def open_arm(self, arm: ArmPlan, facts: ArmBaseline, done: int, jobs: int) -> None:
        """Say what an arm will take. At the start of a study all trainings and the memory come first.

        Args:
            arm: with the total that it runs to.
            facts: the probe's answer.
            done: trials of earlier runs.
            jobs: trials that run at the same time.
        """
        left = arm.n_trials - done
        if not self._begun and not done:
            self.say(f"trainings: {trainings_words(self.plan)}")
            if (words := self._memory_words()) is not None:
                self.say(words)
        self._begun = True
        if arm.run_id is not None or left <= 0:
            return
        self._untimed.add(arm.name)
        seconds = estimated_seconds(arm, facts)
        if seconds is None:
            self.say(f"arm {arm.name}: hours unknown until its first finished trial")
        else:
            words = self._time_words(arm, left, seconds, jobs)
            self.say(f"{words} (estimated from judging the base)")

    def trial_finished(self, arm: ArmPlan, left: int, seconds: float | None, jobs: int) -> None:
        """Say what is left after the first finished trial of an arm.

        Args:
            arm: the arm.
            left: trials that its search still lacks.
            seconds: median seconds of its finished trials, or None if none has finished.
            jobs: trials that run at the same time.
        """
        if arm.name not in self._untimed or seconds is None:
            return
        self._untimed.remove(arm.name)
        if left > 0:
            self.say(f"{self._time_words(arm, left, seconds, jobs)} (from the finished trials)")

    def _time_words(self, arm: ArmPlan, left: int, seconds: float, jobs: int) -> str:
        more = left + self.plan.refined_at_most(arm) + self.plan.further_seeds(arm)
        more += self.plan.recipe_seeds_at_most(arm)
        beside = f" with {jobs} workers" if jobs > 1 else ""
        return (
            f"arm {arm.name}: about {duration(more * seconds / jobs)}{beside} if no trial ends early: "
            f"{_parts(self.plan, arm, left)}, about {duration(seconds)} each"
        )

    def _memory_words(self) -> str | None:
        """Return the memory of a worker by arm, or None where it is not known: GPUs, unknown bases."""
        machine = self.machine()
        arms = [arm for arm in self.plan.arms if arm.run_id is None]
        needs = {arm.name: needed_mib(arm.settings.trial) for arm in arms}
        if machine.devices.names or None in needs.values():
            return None
        parts = [
            f"{name} needs about {need:,.0f} MiB"
            + ("" if need <= machine.free_mib else ", which DOES NOT FIT")
            for name, need in needs.items()
            if need is not None
        ]
        return f"memory: a worker of {'; '.join(parts)}; {machine.free_mib:,.0f} MiB are free"
