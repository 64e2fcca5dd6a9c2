"""When a trial stops by itself."""

from __future__ import annotations

import math

import pytest

from sweeper.training.stop_rules import EarlyStopping, MovingAverage, StopRules
from tests.conftest import make_settings

NAN = math.nan


def _rules(*overrides: str, total_steps: int = 100) -> StopRules:
    settings = make_settings(*overrides)
    return StopRules(settings.training, settings.objective, total_steps)


def _stopped_at(rules: StopRules, losses: list[float]) -> int | None:
    """The step, 10 for each evaluation, at which the rules say stop."""
    for number, loss in enumerate(losses, start=1):
        rules.add_evaluation(10 * number, {"eval/loss": loss})
        if rules.stop:
            return 10 * number
    return None


def test_moving_average_is_of_the_last_window() -> None:
    """Window 3 over 4, 1, 4, 7: fewer values at the start, then exactly three."""
    average = MovingAverage(3)
    assert [average.add(value) for value in (4, 1, 4, 7)] == [4, 2.5, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.early_stopping_patience=2", "training.early_stopping_min_fraction=0"], 30),
        (["training.early_stopping_patience=2", "training.early_stopping_min_fraction=0.4"], 40),
        (["training.early_stopping_patience=3", "training.early_stopping_min_fraction=0"], 40),
        (["training.early_stopping_patience=null"], None),
    ],
)
def test_patience_and_the_first_step_that_may_stop(
    overrides: list[str], expected: int | None
) -> None:
    """Evaluations before min_fraction count, but none of them stops the trial."""
    assert _stopped_at(_rules(*overrides), [3.0, 3.1, 3.2, 3.3, 3.4, 3.5]) == expected


def test_small_improvements_add_up_to_the_threshold() -> None:
    """0.04 an evaluation passes a threshold of 0.05 at every second one; 0.01 never does in time."""
    stopping = EarlyStopping(patience=2, threshold=0.05, first_step=0)
    assert not any(stopping.update(step, 3 - 0.04 * step) for step in range(20))
    stopping = EarlyStopping(patience=2, threshold=0.05, first_step=0)
    assert [stopping.update(step, 3 - 0.01 * step) for step in range(3)] == [False, False, True]


def test_moving_average_can_be_the_signal() -> None:
    """A loss that jumps up and down has no new best for long, while its average still falls."""
    losses = [4.0, 3.0, 3.9, 3.05, 3.6, 3.02, 3.3]
    common = ["training.early_stopping_patience=3", "training.early_stopping_min_fraction=0"]
    average = ["training.early_stopping_metric=eval/loss_moving_average"]
    assert _stopped_at(_rules(*common), losses) == 50
    assert _stopped_at(_rules(*common, *average), losses) is None


@pytest.mark.parametrize(("signal", "expected"), [("objective", 40), ("eval/loss", None)])
def test_more_is_better_where_the_objective_says_so(signal: str, expected: int | None) -> None:
    """ROUGE-L that falls while the loss falls too: patience runs out by the one, not by the other."""
    rules = _rules(
        *("objective=rougeL", "evaluation.generation.num_examples=1"),
        *("training.early_stopping_patience=2", "training.early_stopping_min_fraction=0"),
        f"training.early_stopping_metric={signal}",
    )
    stopped = None
    for number, score in enumerate([0.1, 0.3, 0.2, 0.1, 0.05], start=1):
        rules.add_evaluation(10 * number, {"eval/loss": 3 - 0.1 * number, "eval/rougeL": score})
        stopped = stopped or (10 * number if rules.stop else None)
    assert stopped == expected


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"train/loss": NAN, "train/grad_norm": 1.0}, "train/loss is nan"),
        ({"train/loss": 1.0, "train/grad_norm": math.inf}, "train/grad_norm is inf"),
        ({"train/loss": 1.0, "train/grad_norm": NAN, "train/loss_scale": 0.5}, "grad_norm is nan"),
    ],
)
def test_what_is_not_finite_is_divergence(metrics: dict[str, float], words: str) -> None:
    """Loss and gradient norm of every logged step are looked at."""
    rules = _rules()
    rules.add_training_step(5, metrics)
    assert words in (rules.diverged or "")
    assert "step 5" in (rules.diverged or "")


def test_an_overflow_under_loss_scaling_is_none() -> None:
    """fp16 finds its loss scale by overflowing: such a step is skipped, not a divergence."""
    rules = _rules()
    rules.add_training_step(
        1, {"train/loss": 1.0, "train/grad_norm": math.inf, "train/loss_scale": 32768.0}
    )
    assert rules.diverged is None


@pytest.mark.parametrize("first", ["train/loss", "eval/loss"])
def test_a_first_loss_of_zero_is_the_first(first: str) -> None:
    """A later loss does not take the place of a first one that is exactly zero."""
    rules = _rules("training.divergence_threshold=2", "training.divergence_patience=2")
    if first == "train/loss":
        rules.add_training_step(1, {"train/loss": 0.0})
    else:
        rules.add_evaluation(1, {"eval/loss": 0.0})
    rules.add_training_step(2, {"train/loss": 3.0})
    rules.add_evaluation(10, {"eval/loss": 3.0})
    assert rules.diverged is None
    rules.add_evaluation(20, {"eval/loss": 3.0})
    assert "more than 2 times the first loss (0)" in (rules.diverged or "")


def test_a_loss_far_above_the_first_is_divergence_when_it_lasts() -> None:
    """Twice the first training loss in two evaluations in a row; one alone is forgiven."""
    rules = _rules("training.divergence_threshold=2", "training.divergence_patience=2")
    rules.add_training_step(1, {"train/loss": 3.0})
    for step, loss in [(10, 6.1), (20, 5.9), (30, 6.1)]:
        rules.add_evaluation(step, {"eval/loss": loss})
    assert rules.diverged is None
    rules.add_evaluation(40, {"eval/loss": 6.2})
    assert rules.diverged == (
        "eval/loss is 6.2 at step 40, more than 2 times the first loss (3) in 2 evaluations"
    )


def test_replayed_rows_bring_a_new_watch_to_the_same_state() -> None:
    """Stopping where the uninterrupted trial stops is all that a resumed one needs."""
    losses = [3.0, 2.9, 2.95, 2.96, 2.97, 2.98]
    whole = _stopped_at(_rules("training.early_stopping_patience=3"), losses)
    rules = _rules("training.early_stopping_patience=3")
    rows = [{"step": 10 * i, "eval/loss": loss} for i, loss in enumerate(losses[:3], start=1)]
    rules.replay([{"step": 5, "train/loss": 3.1}, *rows])
    assert not rules.stop
    for step, loss in [(40, 2.96), (50, 2.97)]:
        rules.add_evaluation(step, {"eval/loss": loss})
    assert rules.stop
    assert whole == 50
