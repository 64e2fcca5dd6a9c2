"""What a study cost, what pruning saved, and what failed."""

from __future__ import annotations

import pytest

from sweeper.core.outcome import Outcome
from sweeper.reporting.cost_ledger import cost_sheet, failure_sheet, saved_seconds
from sweeper.reporting.finalist_results import FinalistRanking, FinalistResult, SeedRepeat
from sweeper.reporting.results import TrialResult
from sweeper.reporting.verdict import judge
from tests.reporting.studies import make_arm, make_results, make_trial

TWINS = ("finished", "duplicate", "duplicate")


def _ended(number: int, cause: str, steps: int, seconds: float, **fields: object) -> TrialResult:
    trial = make_trial("lora", number, cause, 4.0, {"cost/seconds": seconds})
    return trial.model_copy(
        update={"outcome": trial.outcome.model_copy(update={"steps": steps, **fields})}
    )


def test_pruning_saved_the_rest_of_the_steps() -> None:
    """Stopped after 16 of 64 steps in 10 s, a trial would have taken 30 s more."""
    arm = make_arm("lora", [_ended(0, "finished", 64, 40.0), _ended(1, "pruned", 16, 10.0)])
    assert saved_seconds(arm) == pytest.approx(30.0)
    row = cost_sheet(make_results(arm)).rows[0]
    assert row[1:5] == ("2", "1", "1", "0")
    assert row[-1] == "30.0 s (38 %)"  # of the 80 s it would all have taken


def test_a_pruned_trial_is_extrapolated_to_the_end_of_its_own_schedule() -> None:
    """Pruned at step 16 of its own 24 steps: 8 steps were saved, whatever others trained."""
    long = [_ended(n, "finished", 160, 100.0) for n in range(3)]
    short = _ended(3, "pruned", 16, 10.0)
    own = {**short.outcome.metrics, "training/total_steps": 24.0}
    short = short.model_copy(update={"outcome": short.outcome.model_copy(update={"metrics": own})})
    assert saved_seconds(make_arm("lora", [*long, short])) == pytest.approx(5.0)


def test_what_early_stopping_would_have_saved_is_no_saving_of_pruning() -> None:
    """Complete trials stop after half of their schedule, so a pruned one would have done so too."""
    schedule = {"training/total_steps": 100.0}
    trials = [_ended(n, "early_stopped", 50, 50.0) for n in range(3)] + [
        _ended(3, "pruned", 40, 40.0)
    ]
    timed = [
        trial.model_copy(
            update={
                "outcome": trial.outcome.model_copy(
                    update={"metrics": {**trial.outcome.metrics, **schedule}}
                )
            }
        )
        for trial in trials
    ]
    assert saved_seconds(make_arm("lora", timed)) == pytest.approx(10.0)


def test_a_cost_includes_the_finalists() -> None:
    """Ten seconds of search and the 35 s of further seeds are 45 s everywhere that costs are told."""
    arm = make_arm("lora", [_ended(0, "finished", 64, 10.0)])
    arm = arm.model_copy(update={"finalist_seconds": 35.0})
    results = make_results(arm)
    assert arm.device_seconds == pytest.approx(45.0)
    assert arm.seconds == pytest.approx(10.0)
    sheet = cost_sheet(results)
    cells = dict(zip(sheet.columns, sheet.rows[0], strict=True))
    assert (cells["search"], cells["finalists"], cells["device time"]) == (
        "10.0 s",
        "35.0 s",
        "45.0 s",
    )
    assert judge(results).sides[0].device_seconds == pytest.approx(45.0)


def test_an_older_answer_counts_the_finalists_that_it_lists() -> None:
    """results.json of an earlier version holds no sum, but each finalist's seconds."""
    outcomes = [
        Outcome(cause="finished", best_value=4.0, metrics={"cost/seconds": 10.0 + n})
        for n in range(3)
    ]
    repeats = tuple(SeedRepeat(seed=n, outcome=outcome) for n, outcome in enumerate(outcomes))
    final = FinalistRanking(finalists=(FinalistResult(number=0, repeats=repeats),), winner=0)
    arm = make_arm("lora", [_ended(0, "finished", 64, 10.0)])
    assert arm.model_copy(update={"final": final}).device_seconds == pytest.approx(33.0)


def test_nothing_to_go_by_is_no_saving() -> None:
    """Without a finished trial nobody knows how long one would have been."""
    arm = make_arm("lora", [_ended(1, "pruned", 16, 10.0)])
    assert saved_seconds(arm) is None
    assert cost_sheet(make_results(arm)).rows[0][-1] == "–"


def test_a_duplicate_costs_nothing() -> None:
    """It has its twin's figures; time and tokens were spent once."""
    costs = {"cost/seconds": 10.0, "cost/train_seconds": 8.0, "cost/tokens_per_second": 100.0}
    trials = [make_trial("lora", n, cause, 4.0, costs) for n, cause in enumerate(TWINS)]
    arm = make_arm("lora", trials)
    assert (arm.tried, arm.seconds, arm.tokens) == (1, 10.0, 800.0)
    assert cost_sheet(make_results(arm)).rows[0][-2] == "10.0 s"


def test_failures_by_cause() -> None:
    """One row a cause with its count and the last line of its first message; none, no table."""
    message = "Traceback …\nValueError: no"
    trials = [
        _ended(0, "oom", 4, 1.0),
        _ended(1, "crash", 4, 1.0, message=message),
        _ended(2, "oom", 4, 1.0, message="CUDA out of memory"),
        _ended(3, "pruned", 4, 1.0),
    ]
    sheet = failure_sheet(make_results(make_arm("lora", trials)))
    assert sheet is not None
    assert sorted(row[1:] for row in sheet.rows) == [
        ("crash", "1", "ValueError: no"),
        ("oom", "2", "CUDA out of memory"),
    ]
    assert failure_sheet(make_results(make_arm("lora", [_ended(0, "finished", 4, 1.0)]))) is None
