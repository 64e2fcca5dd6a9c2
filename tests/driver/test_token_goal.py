"""Equal tokens where epochs are searched: when a later arm ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.commands.run_study import run_study
from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.outcome import Outcome
from sweeper.driver.token_goal import EQUAL_TOKENS, TokenGoal, searched_tokens
from sweeper.nightly.entry_decision import progress
from sweeper.search.record_prefix import TURN, TrialTurn
from sweeper.search.study_plan import EPOCHS, studies
from sweeper.workers import fake_runner


def _trial(place: int, tokens: float, cause: str = "finished") -> FrozenTrial:
    outcome = {
        "cause": cause,
        "best_value": 4.0,
        "metrics": {"cost/tokens_per_second": tokens, "cost/train_seconds": 2.0},
    }
    return create_trial(
        state=TrialState.COMPLETE,
        value=4.0,
        user_attrs={"outcome": outcome, TURN: [place, place]},
    )


@pytest.mark.parametrize(("ended", "reached"), [(1, False), (2, False), (3, True), (4, True)])
def test_an_arm_ends_nearest_to_the_goal(ended: int, reached: bool) -> None:
    """Trials of 2,000 tokens and a goal of 6,400: a fourth would bring the arm to 8,000."""
    read = [_trial(place, 1000.0) for place in range(ended)]
    assert TokenGoal(6400.0).reached(read, TrialTurn(ended, ended)) is reached


def test_trials_that_are_not_read_count_as_typical() -> None:
    """Two of four trials still run: the answer is that of four typical ones."""
    read = [_trial(place, 1000.0) for place in range(2)]
    assert TokenGoal(8000.0).reached(read, TrialTurn(4, 2))
    assert not TokenGoal(8000.0).reached(read, TrialTurn(2, 2))


def test_a_goal_is_not_reached_before_a_trial_has_ended() -> None:
    """Nothing is known about the length of a trial."""
    assert not TokenGoal(10.0).reached([], TrialTurn(0, 0))


def test_a_duplicate_trained_nothing() -> None:
    """It has the metrics of the trial that it repeats, and cost no tokens."""
    study = optuna.create_study()
    study.add_trial(_trial(0, 1000.0))
    study.add_trial(_trial(1, 1000.0, "duplicate"))
    assert searched_tokens(study) == 2000.0


@pytest.mark.parametrize(("share", "fewer"), [(0.7, False), (2.0, True)])
def test_a_later_arm_ends_with_the_tokens_of_the_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    share: float,
    fewer: bool,
) -> None:
    """A full fine-tune that trains on more or fewer tokens than LoRA gets fewer or more trials.

    The same command adds none.
    """
    ended = fake_runner._ended

    def with_tokens(settings: TrialSettings, *rest: Any) -> Outcome:
        outcome = ended(settings, *rest)
        of_arm = 1.0 if isinstance(settings.adapter, LoraAdapter) else share
        costs = {
            "cost/tokens_per_second": 1000.0 * of_arm,
            "cost/train_seconds": float(settings.training.num_train_epochs),
        }
        return outcome.model_copy(update={"metrics": {**outcome.metrics, **costs}})

    monkeypatch.setattr(fake_runner, "_ended", with_tokens)
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "space=real", "training=real", "workers=fake"),
            *("workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none"),
            *("finalists=none", "pruner=none", f"output_dir={tmp_path}"),
            *("hydra.sweeper.n_trials=6", "hydra.sweeper.arms.full.n_trials=6"),
        ]
    )
    lora, full = run_study(plan).arms
    longest = 5000 * share
    assert lora.tried == plan.arms[1].n_trials == 6
    assert abs(full.tokens - lora.tokens) <= longest / 2 + 1000 * share
    assert (full.tried < 6) == fewer
    assert (EQUAL_TOKENS in capsys.readouterr().out) == fewer
    assert {trial.params[EPOCHS] for trial in (*lora.trials, *full.trials)} <= {1, 2, 3, 4, 5}
    assert [arm.tried for arm in run_study(plan).arms] == [lora.tried, full.tried]
    assert progress(plan).missing == 0, "a night would take the study for one that was cut short"
