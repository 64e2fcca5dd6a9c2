"""Limits of time, device time and patience, with a clock of our own."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.config.settings import BudgetSettings, PlateauRule
from sweeper.driver.budget import ArmBudget, StudyBudget, next_time, plateaued

BERLIN = ZoneInfo("Europe/Berlin")  # summer time began 2026-03-29 02:00 and ended 2026-10-25 03:00


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def _budget(**limits: object) -> BudgetSettings:
    nothing = {"wall_clock": None, "until": None, "device_hours": None, "plateau": None}
    return BudgetSettings.model_validate({**nothing, **limits})


def _berlin(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


@pytest.mark.parametrize(
    ("now", "until", "hours"),
    [
        ("2026-06-01 06:30", "07:30", 1),
        ("2026-06-01 07:30", "07:30", 24),  # not now, but tomorrow
        ("2026-06-01 22:00", "07:30", 9.5),
        ("2026-03-28 22:00", "07:30", 8.5),  # the night that is an hour short
        ("2026-10-24 22:00", "07:30", 10.5),  # the night that is an hour long
        ("2026-03-29 00:00", "02:30", 2.5),  # skipped: the moment after the gap, 03:30
        ("2026-10-25 00:00", "02:30", 2.5),  # twice: the first
        ("2026-10-25 02:45", "02:30", 24.75),  # the first is over, the second does not count
    ],
)
def test_until_is_a_wall_clock_time(now: str, until: str, hours: float) -> None:
    """Nights of 23 and 25 hours end at the time that a clock on the wall shows."""
    moment = _berlin(now)
    assert next_time(until, moment, BERLIN) - moment == hours * 3600


@given(
    now=st.floats(1.7e9, 1.9e9),
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
    zone=st.sampled_from(["Europe/Berlin", "America/New_York", "Asia/Kolkata", "UTC"]),
)
def test_until_is_the_next_such_moment(now: float, hour: int, minute: int, zone: str) -> None:
    """Always in the future, and at most a day and an hour away."""
    found = next_time(f"{hour:02d}:{minute:02d}", now, ZoneInfo(zone))
    assert 0 < found - now <= 25 * 3600 + 3600


def test_the_earlier_of_two_deadlines_holds() -> None:
    """wall_clock=6h started at 22:00 ends at 04:00, before until=07:30."""
    clock = FakeClock(_berlin("2026-06-01 22:00"))
    budget = StudyBudget(_budget(wall_clock="6h", until="07:30"), True, clock, clock, BERLIN)
    arm = budget.of_arm(1.0, 0.0)
    assert arm.left([]) == "6 h 00 min left"
    assert arm.refusal([], 0.0, []) is None
    clock.now += 6 * 3600
    assert arm.refusal([], 0.0, []) == "the time is used up"


def test_a_clock_that_is_set_moves_no_duration() -> None:
    """An hour forth: wall_clock=6h has six hours left as before, until=23:00 has one less."""
    steady, wall = FakeClock(), FakeClock(_berlin("2026-06-01 12:00"))
    for limits, before, after in (
        ({"wall_clock": "6h"}, "6 h 00 min left", "6 h 00 min left"),
        ({"until": "23:00"}, "11 h 00 min left", "10 h 00 min left"),
    ):
        wall.now = _berlin("2026-06-01 12:00")
        arm = StudyBudget(_budget(**limits), True, steady, wall, BERLIN).of_arm(1.0, 0.0)
        assert arm.left([]) == before
        wall.now += 3600
        assert arm.left([]) == after


def test_no_trial_is_started_that_would_not_end_in_time() -> None:
    """Ten minutes are left and a trial takes fifteen: none is started."""
    arm = ArmBudget(deadline=600.0, device_seconds=None, plateau=None, clock=FakeClock())
    assert arm.refusal([], 900.0, []) == "the time is used up"
    assert arm.refusal([], 300.0, []) is None


def test_arms_share_what_is_left() -> None:
    """12 and 6 open trials: two thirds of the time for the first, all that is left for the last."""
    clock = FakeClock()
    budget = StudyBudget(_budget(wall_clock="9h", device_hours=18), True, clock)
    assert budget.of_arm(12 / 18, 0.0).left([]) == "6 h 00 min left, 12.00 device-hours left"
    clock.now = 5 * 3600.0  # it used less than its share
    assert budget.of_arm(1.0, 10 * 3600.0).left([]) == "4 h 00 min left, 8.00 device-hours left"


def test_device_hours_count_running_trials_as_well() -> None:
    """An hour in all, 30 minutes ended, two running: no third one of 10 minutes."""
    clock = FakeClock(1200.0)
    arm = ArmBudget(None, device_seconds=3600.0, plateau=None, clock=clock, ended=[1800.0])
    assert arm.refusal([1200.0], 600.0, []) is None
    assert arm.refusal([1200.0, 1200.0], 600.0, []) == "the device-hours are used up"
    assert arm.refusal([0.0], 600.0, []) == "the device-hours are used up"  # runs for 20 minutes


def test_an_arm_keeps_what_its_last_trials_need_and_passes_the_rest_on() -> None:
    """Ten of fourteen hours, one used, two trials of two hours run: they keep four, 9 are left."""
    clock = FakeClock(3600.0)
    budget = StudyBudget(_budget(device_hours=14), True, clock)
    first = budget.of_arm(10 / 14, 0.0)
    first.ended.append(3600.0)
    running = [0.0, 3600.0]
    assert first.pass_on(running, typical=7200.0) == 4 * 3600.0
    assert budget.of_arm(1.0, 3600.0 + 4 * 3600.0).left([]) == "9.00 device-hours left"
    assert first.left(running) == "3.00 device-hours left"
    assert first.refusal(running, 7200.0, []) == "the device-hours are used up"


def test_a_pause_extends_the_time_of_every_arm_that_runs() -> None:
    """Two arms run when an hour's pause begins: both end an hour later."""
    clock = FakeClock()
    budget = StudyBudget(_budget(wall_clock="4h"), True, clock)
    arms = [budget.of_arm(0.5, 0.0), budget.of_arm(1.0, 0.0)]
    clock.now = 3600.0
    budget.paused(3600.0)
    assert [arm.left([]) for arm in arms] == ["2 h 00 min left", "4 h 00 min left"]


def test_no_limit_refuses_nothing_and_says_nothing() -> None:
    """All limits null: the default."""
    arm = StudyBudget(_budget(), True, FakeClock()).of_arm(0.5, 1e9)
    assert arm.refusal([0.0] * 100, 1e9, [1.0] * 100) is None
    assert arm.left([0.0]) == ""


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([3.0, 2.0, 2.0, 2.0, 2.0], True),
        ([3.0, 2.0, 2.5, None, None], True),  # pruned and infeasible trials improve nothing
        ([3.0, 2.0, 2.0, 2.0, 1.9], False),
        ([3.0, 2.0, 2.0, 2.0, 1.995], True),  # by less than min_improvement
        ([3.0, 2.0, 2.0], False),  # too few
        ([None, None, None, None], False),  # nothing to compare with
        ([None, 3.0, 2.0, 2.0, 2.0], False),
    ],
)
def test_plateau(values: list[float | None], stops: bool) -> None:
    """The last three brought no more than 0.01."""
    rule = PlateauRule(trials=3, min_improvement=0.01)
    assert plateaued(rule, values, minimize=True) is stops
    mirrored = [None if value is None else -value for value in values]
    assert plateaued(rule, mirrored, minimize=False) is stops


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6h", 21600), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("2d", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    """Written as people write them."""
    assert _budget(wall_clock=text).wall_clock == seconds


@pytest.mark.parametrize("text", ["6", 6, "6x", "", "h", "-1h", "1h 30"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    """A number without a unit could be anything."""
    with pytest.raises(ValueError, match=r"is no duration\. Write it as 6h"):
        _budget(wall_clock=text)


@pytest.mark.parametrize("text", ["7:30", "24:00", "07:60", "noon", 1170])
def test_what_is_no_time_is_refused(text: object) -> None:
    """Two digits each, quoted in YAML (which reads 19:30 as a number)."""
    with pytest.raises(ValueError, match="until"):
        _budget(until=text)
