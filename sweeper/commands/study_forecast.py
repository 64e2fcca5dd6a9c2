"""What a study will take: trainings, time and memory, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sweeper.core.outcome import TrialTiming
from sweeper.reporting.text_table import duration
from sweeper.search.study_plan import ArmPlan, StudyPlan


@dataclass(frozen=True)
class ArmForecast:
    """An arm with the timing of its largest first point, None for an arm that is not trained."""

    arm: ArmPlan
    further: int
    """Trainings with further seeds after the search."""
    timing: TrialTiming | None

    @property
    def trainings(self) -> int:
        """All trainings of the arm, further seeds included."""
        return 0 if self.arm.run_id is not None else self.arm.n_trials + self.further

    @property
    def seconds(self) -> float | None:
        """Seconds of the arm on one worker if no trial ends early, or None if nothing was timed."""
        timing = self.timing
        if self.trainings == 0:
            return 0.0
        if timing is None or timing.training_s is None:
            return None
        # The untuned base is judged on the validation split before the first trial
        judged = (timing.row_s or 0.0) * timing.rows.get("validation", 0)
        return (timing.start_s or 0.0) + judged + self.trainings * timing.training_s

    @property
    def words(self) -> str:
        """The arm's trainings in words."""
        further = f" and {self.further} with further seeds" if self.further else ""
        return f"{self.arm.name} {self.arm.n_trials} in the search{further}"


def trainings_line(arms: Sequence[ArmForecast]) -> str:
    """Return the number of all trainings, by arm."""
    total = sum(each.trainings for each in arms)
    parts = "; ".join(each.words for each in arms if each.trainings)
    return f"trainings:  {total} in all: {parts}"


def forecast_lines(plan: StudyPlan, arms: Sequence[ArmForecast]) -> Iterator[str]:
    """Yield the trainings, the time and the memory of a study."""
    yield trainings_line(arms)
    yield _time_line(plan, arms)
    yield from (line for each in arms for line in _memory_lines(each))


def data_lines(timing: TrialTiming) -> Iterator[str]:
    """Yield the data in short, as `sweeper data` says it at length."""
    counts = " / ".join(f"{count:,} {name}" for name, count in timing.rows.items())
    lost = sum(timing.dropped.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in timing.dropped.items())
    yield f"data:       {timing.source}: {counts} rows"
    yield f"            dropped {lost:,}{f': {reasons}' if reasons else ''}"
    if timing.unread:
        unread = ", ".join(f"{name} ({count:,} rows)" for name, count in timing.unread.items())
        yield f"            columns not read: {unread}"


def _time_line(plan: StudyPlan, arms: Sequence[ArmForecast]) -> str:
    trained = [each for each in arms if each.trainings]
    unknown = [each.arm.name for each in trained if each.seconds is None]
    if unknown:
        return f"time:       unknown, because arm {' and '.join(unknown)} could not be timed"
    jobs = plan.study.n_jobs if plan.study.n_jobs != "auto" else 1
    total = sum(each.seconds or 0.0 for each in trained) / jobs
    workers = f" with {jobs} workers" if jobs > 1 else ""
    parts = "; ".join(
        f"{each.arm.name} {each.trainings} × {duration(each.timing.training_s or 0.0)}"
        for each in trained
        if each.timing is not None
    )
    return (
        f"time:       about {duration(total)}{workers} if no trial ends early: {parts} (from a few "
        "timed steps of the largest first point of each arm)"
    )


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
