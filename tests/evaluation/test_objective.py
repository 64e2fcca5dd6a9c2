"""What a study may be decided by."""

from __future__ import annotations

import pytest

from sweeper.core.errors import ConfigError
from tests.conftest import make_settings

NONE = "evaluation.generation.num_examples=0"
SOME = "evaluation.generation.num_examples=1"
OWN = (SOME, "+evaluation.metrics.mine=my.metrics:f", "evaluation.metric_modules=[my]")


def test_loss_is_the_default_objective() -> None:
    """Loss decides, is cheap, and pruning goes by it."""
    objective = make_settings().objective
    assert (objective.metric, objective.direction) == ("eval/loss", "minimize")
    assert not objective.is_costly
    assert objective.judged_while_training == "eval/loss"


def test_a_costly_objective_is_pruned_by_the_loss() -> None:
    """ROUGE is maximised; looks inside the trial go by the loss, which is minimised."""
    objective = make_settings("objective=rougeL", SOME, "objective.pruning_metric=null").objective
    assert (objective.metric, objective.direction) == ("eval/rougeL", "maximize")
    assert objective.is_costly
    assert (objective.judged_while_training, objective.pruning_direction) == (
        "eval/loss",
        "minimize",
    )


def test_a_users_metric_is_an_objective_in_either_direction() -> None:
    """Only the user knows which way their metric is better."""
    for direction in ("minimize", "maximize"):
        choice = ("objective.metric=eval/mine", f"objective.direction={direction}")
        objective = make_settings(*OWN, *choice, "objective.pruning_metric=eval/mine").objective
        assert objective.pruning_direction == direction


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.metric=eval/bleu"], r"eval/bleu: no such metric. Choose one of eval/loss, "),
        (["objective.metric=eval/mine"], "name a function in evaluation.metrics"),
        (["objective.direction=maximize"], "for eval/loss better means minimize"),
        (["objective=rougeL", NONE], r"objective\.metric=eval/rougeL .*generates none"),
        (["objective.pruning_metric=eval/rouge1", NONE], "objective.pruning_metric=eval/rouge1"),
        (["objective.pruning_metric=eval/ppl"], "eval/ppl: no such metric"),
        ([*OWN, "objective.pruning_metric=eval/mine"], "which way is better is known of"),
    ],
)
def test_objectives_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    """Unknown, unmeasured and upside-down objectives are found before any training second."""
    with pytest.raises(ConfigError, match=message):
        make_settings(*overrides)
