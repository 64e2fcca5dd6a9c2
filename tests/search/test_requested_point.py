"""Points that people ask for, held against the space and against what was tried."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest

from sweeper.config.space import Branch, Branches, Choice
from sweeper.core.errors import CommandRefused
from sweeper.search.requested_point import earlier_point, queue, read_draw
from sweeper.search.study import QUEUED_BY, ask, suggest
from sweeper.search.study_plan import ArmPlan, studies

SEARCH = ("+experiment=lr_rank_sweep", "workers=fake", "tracking=none")


def _arm(*overrides: str) -> ArmPlan:
    return studies([*SEARCH, *overrides])[0].arms[0]


def _study() -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_values_are_read_by_the_grammar_of_the_space() -> None:
    """Numbers are numbers, a whole one is a real one where the domain is real, words are words."""
    arm = _arm("training.weight_decay=interval(0.0,1.0)")
    texts = {"adapter.r": "8", "training.learning_rate": "3e-3", "training.weight_decay": "1"}
    draw = read_draw(arm, {**texts, "adapter.target_modules": "mlp"})
    assert draw == {
        **{"adapter.r": 8, "training.learning_rate": 0.003},
        **{"training.weight_decay": 1.0, "adapter.target_modules": "mlp"},
    }
    assert isinstance(draw["training.weight_decay"], float)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"adapter.r": "5"}, r"adapter.r=5: not in choice\(2, 4, 8, 16, 32\)"),
        ({"training.learning_rate": "7"}, r"not in tag\(log, interval\(0.0003, 0.03\)\)"),
        ({"training.learning_rate": "fast"}, "not in tag"),
        ({"adapter.r": "2,4"}, "one value, not a range"),
        ({"adapter.r": "interval(2,4)"}, "one value, not a range"),
        ({"adapter.r": "]["}, "not a search-space expression"),
        (
            {"adapter.rank": "4"},
            r"adapter.rank: not searched in arm lora. Searched keys:\n.*r=choice",
        ),
        ({"seed": "4"}, "seed: not searched"),
        ({"../../x": "$(reboot)"}, "not searched"),
        ({}, "at least one KEY=VALUE"),
    ],
)
def test_wrong_points_are_refused_with_what_is_valid(values: dict[str, str], words: str) -> None:
    """Every refusal names the key and the choices."""
    with pytest.raises(CommandRefused, match=f"(?s){words}"):
        read_draw(_arm(), values)


def test_a_value_inside_a_branch_needs_its_branch() -> None:
    """r=4 exists only with DoRA; a clone that leaves the branch must name the new one's keys."""
    branches = {
        True: Branch({}, {"adapter.r": Choice((4, 8))}),
        False: Branch({}, {"adapter.r": Choice((16, 32))}),
    }
    arm = replace(_arm(), space={"adapter.use_dora": Branches(branches)})
    assert read_draw(arm, {"adapter.r": "4"}) == {
        **{"adapter.use_dora": True, "adapter.use_dora=true/adapter.r": 4},
    }
    before = {"adapter.use_dora": True, "adapter.r": 4}
    with pytest.raises(CommandRefused, match="no branch of the space takes these values together"):
        read_draw(arm, {"adapter.use_dora": "false"}, before)
    both = read_draw(arm, {"adapter.use_dora": "false", "adapter.r": "16"}, before)
    assert both == {"adapter.use_dora": False, "adapter.use_dora=false/adapter.r": 16}


def test_what_was_queued_by_hand_comes_before_what_waited_already() -> None:
    """Next means next, also in a grid whose points all wait."""
    study = _study()
    study.enqueue_trial({"x": 1})
    study.enqueue_trial({"x": 2})
    queue(study, {"x": 3}, "first", {})
    queue(study, {"x": 4}, "second", {})
    asked = [ask(study).suggest_int("x", 0, 9) for _ in range(4)]
    assert asked == [3, 4, 1, 2]


def test_a_command_queues_once_however_often_it_is_obeyed() -> None:
    """Killed between queueing and saying so, the driver obeys it again: nothing is queued twice."""
    study = _study()
    for _ in range(3):
        queue(study, {"x": 3}, "the same", {})
    assert [trial.user_attrs[QUEUED_BY] for trial in study.trials] == ["the same"]


def test_a_point_that_is_known_is_refused_with_its_fate() -> None:
    """Waiting, running, tried: each is said; a failed one may be tried again."""
    study, draw = _study(), {"x": 1.0}
    queue(study, draw, "a", {})
    with pytest.raises(CommandRefused, match="waits in the queue already"):
        queue(study, draw, "b", {})
    trial = ask(study)
    trial.suggest_float("x", 0, 2)
    with pytest.raises(CommandRefused, match="is being trained as trial 0"):
        queue(study, draw, "b", {})
    trial.set_user_attr("cause", "finished")
    study.tell(trial, 4.0)
    with pytest.raises(CommandRefused, match=r"was tried as trial 0: finished, 4.0000"):
        queue(study, draw, "b", {})
    queue(study, {"x": 1.5}, "c", {})
    study.tell(ask(study), state=optuna.trial.TrialState.FAIL)
    queue(study, {"x": 1.5}, "d", {})


def test_the_point_of_an_earlier_trial() -> None:
    """Of one that was drawn; not of one that waits, and not of one that never was."""
    arm, study = _arm(), _study()
    with pytest.raises(CommandRefused, match=r"no trial 0\. It has no trial yet"):
        earlier_point(study, arm, 0)
    drawn = suggest(study.ask(), arm.space)
    queue(study, {"adapter.r": 4}, "a", {})
    assert earlier_point(study, arm, 0) == drawn
    with pytest.raises(CommandRefused, match="trial 1 of arm lora waits in the queue"):
        earlier_point(study, arm, 1)
    with pytest.raises(CommandRefused, match=r"no trial 7\. It has trials 0 to 1"):
        earlier_point(study, arm, 7)
