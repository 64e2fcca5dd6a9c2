"""Forecast a study's trainings, time and memory before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sweeper.core.outcome import TrialTiming
from sweeper.driver.start_forecast import trainings_words
from sweeper.reporting.expected_gap import gap_line
from sweeper.reporting.text_table import duration
from sweeper.search.study_plan import ArmPlan, JudgedModels, StudyPlan
from sweeper.workers.worker_count import (
    MachineShare,
    WorkerCount,
    count_workers,
    this_machine,
)

ALONE = 0.8
"""Share of the forecast below which the time without other programs is said. A judgement."""


@dataclass(frozen=True)
class ArmForecast:
    """An arm with the timing of its largest point, None for an arm that is not trained."""

    arm: ArmPlan
    refined: int
    """Trials beside the best one of the arm's grid, at most."""
    further: int
    """Trainings with further seeds after the search."""
    judged: JudgedModels
    """Models that are judged after the search."""
    timing: TrialTiming | None

    @classmethod
    def of(cls, plan: StudyPlan, arm: ArmPlan, timing: TrialTiming | None) -> ArmForecast:
        """Return the forecast of an arm of a study."""
        further = plan.further_seeds(arm) + plan.recipe_seeds_at_most(arm)
        return cls(arm, plan.refined_at_most(arm), further, plan.judged_at_most(arm), timing)

    @property
    def trainings(self) -> int:
        """All trainings of the arm at most, those beside the best and further seeds included."""
        return 0 if self.arm.run_id is not None else self._searched + self.further

    @property
    def _searched(self) -> int:
        return self.arm.n_trials + self.refined

    def seconds_with(self, jobs: int) -> float | None:
        """Return the seconds of the arm if no trial ends early, or None if nothing was timed.

        Args:
            jobs: trials that run at the same time.
        """
        timing = self.timing
        if self.trainings == 0:
            return 0.0
        if timing is None or timing.training_s is None:
            return None
        # One worker judges the untuned base before the first trial
        begin_s = (timing.start_s or 0.0) + timing.untuned_s
        rounds = math.ceil(self._searched / jobs) + self.further / jobs
        return begin_s + rounds * timing.training_s + self.judging_s / jobs

    @property
    def judging_s(self) -> float:
        """Seconds of judging models after the search, all together."""
        timing = self.timing
        if timing is None:
            return 0.0
        tested = self.judged.test if timing.rows.get("test") else 0
        loads = max(tested, self.judged.general)
        judged_s = tested * timing.test_s + self.judged.general * timing.general_s
        return judged_s + loads * timing.load_s


def trainings_line(plan: StudyPlan) -> str:
    """Return the number of all trainings, by arm."""
    return f"trainings:  {trainings_words(plan)}"


def planned_workers(
    plan: StudyPlan,
    machine: Callable[[], MachineShare] = this_machine,
    stored: Sequence[Mapping[str, int] | None] = (),
) -> WorkerCount:
    """Return the devices and threads that a study would use here.

    Args:
        plan: the study.
        machine: looks at this machine, if that is necessary.
        stored: what each arm that has run before stored about its workers. Empty for a new study.
    """
    return count_workers(
        plan.study.n_jobs,
        next(filter(None, stored), None),
        begun=bool(stored),
        workers=plan.settings.workers,
        arms=[(arm.settings.trial, arm.n_trials) for arm in plan.arms],
        machine=machine,
    )


def side_by_side(plan: StudyPlan, workers: WorkerCount) -> int:
    """Return the number of trials that run at the same time."""
    width = max(arm.settings.training.devices_per_trial for arm in plan.arms)
    return 1 if plan.settings.workers.engine == "inline" else max(1, workers.jobs // width)


def forecast_lines(
    plan: StudyPlan, arms: Sequence[ArmForecast], workers: WorkerCount
) -> Iterator[str]:
    """Yield the trainings, the time, the memory and the smallest gap of a study."""
    yield trainings_line(plan)
    yield _time_line(plan, arms, workers)
    yield from _busy_line(plan, arms, workers)
    yield from (line for each in arms for line in _part_lines(each))
    yield from (line for each in arms for line in _memory_lines(each))
    yield from _gap_lines(plan, arms)


def _gap_lines(plan: StudyPlan, arms: Sequence[ArmForecast]) -> Iterator[str]:
    """Yield the smallest gap that the test rows can show, where arms are compared by their loss."""
    rows = next((each.timing.rows for each in arms if each.timing and each.timing.rows), None)
    wanted = plan.study.finalists
    judged = rows is not None and wanted.top > 0 and wanted.test
    if rows is None or not judged or len(arms) < 2 or plan.objective.metric != "eval/loss":
        return
    # each winner is compared with its recipe on the same split
    recipes = sum(plan.recipe_seeds_at_most(arm) > 0 for arm in plan.arms)
    yield gap_line(rows.get("test", 0), wanted.fresh_seeds, len(arms) - 1 + recipes)


def data_lines(timing: TrialTiming) -> Iterator[str]:
    """Yield the data in short, as `sweeper data` says it at length."""
    counts = " / ".join(f"{count:,} {name}" for name, count in timing.rows.items())
    lost = sum(timing.dropped.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in timing.dropped.items())
    yield f"data:       {timing.source}: {counts} rows"
    yield f"            dropped {lost:,}{f': {reasons}' if reasons else ''}"
    if timing.unread:
        unread = ", ".join(
            f"{name or repr(name)} ({count:,} rows)" for name, count in timing.unread.items()
        )
        yield f"            columns not read: {unread}"


def _time_line(plan: StudyPlan, arms: Sequence[ArmForecast], workers: WorkerCount) -> str:
    trained = [each for each in arms if each.trainings]
    unknown = [each.arm.name for each in trained if each.seconds_with(1) is None]
    if unknown:
        return f"time:       unknown, because arm {' and '.join(unknown)} could not be timed"
    jobs = side_by_side(plan, workers)
    total = sum(each.seconds_with(jobs) or 0.0 for each in trained)
    beside = f" with {jobs} workers" if jobs > 1 else ""
    parts = "; ".join(
        f"{each.arm.name} {each.trainings} × {duration(each.timing.training_s or 0.0)}"
        for each in trained
        if each.timing is not None
    )
    mean = ", at the mean number of epochs" if plan.searches_epochs else ""
    return (
        f"time:       about {duration(total)}{beside} if no trial ends early: {parts} (from a few "
        f"timed steps of each arm's largest point{mean})"
    )


def _busy_line(plan: StudyPlan, arms: Sequence[ArmForecast], workers: WorkerCount) -> Iterator[str]:
    """Yield the time without other programs, if they took CPU time from the timed steps."""
    jobs = side_by_side(plan, workers)
    found = [(each.seconds_with(jobs), each.timing) for each in arms if each.trainings]
    alone = [
        seconds * min(1.0, timing.cpu_share or 1.0)
        for seconds, timing in found
        if seconds is not None and timing is not None
    ]
    total = sum(seconds or 0.0 for seconds, _ in found)
    if len(alone) == len(found) and sum(alone) < ALONE * total:
        yield (
            f"            other programs took CPU time from the timed steps: without them at most "
            f"{duration(sum(alone))}"
        )


def _part_lines(forecast: ArmForecast) -> Iterator[str]:
    """Yield the parts of an arm's time, so that a reader sees which setting to change."""
    timing, judged = forecast.timing, forecast.judged
    if timing is None or timing.training_s is None or not forecast.trainings:
        return
    parts = {
        "of steps": timing.setup_s + timing.steps * (timing.step_s or 0.0),
        "of looks": timing.looks * timing.look_s,
        "of judging": timing.judgement_s,
        "of answers as long as their references": timing.answers_s,
        "of loading and storing": timing.load_s + timing.save_s,
    }
    words = ", ".join(f"{duration(seconds)} {name}" for name, seconds in parts.items() if seconds)
    yield f"            a training of arm {forecast.arm.name}: {words}"
    texts = [
        f"{count} models on {rows:,} {name}"
        for count, rows, name in (
            (judged.test, timing.rows.get("test", 0), "test rows"),
            (judged.general, timing.windows, "windows of general text"),
        )
        if count and rows
    ]
    before = f"            before the search: {duration(timing.untuned_s)} of judging the base"
    after = f"; after it: {duration(forecast.judging_s)} of judging {' and '.join(texts)}"
    yield before + (after if texts else "")


def _memory_lines(forecast: ArmForecast) -> Iterator[str]:
    timing, name = forecast.timing, forecast.arm.name
    if timing is None:
        return
    if timing.problem is not None:
        yield f"            arm {name}: {timing.problem}"
    elif timing.need_mib is not None and timing.free_mib is not None:
        fits = timing.training_s is not None
        yield (
            f"memory:     arm {name} {'needs' if fits else 'DOES NOT FIT: it needs'} about "
            f"{timing.need_mib:,.0f} MiB of {timing.free_mib:,.0f} MiB free"
        )
