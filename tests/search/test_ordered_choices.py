"""Choices between numbers keep their order for every sampler, and their numbers in the storage."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.commands.run_study import run_study
from sweeper.config.settings import SamplerSettings
from sweeper.config.study_settings import SamplerName
from sweeper.search import samplers
from sweeper.search.ordered_choices import OrderedChoiceSampler, numbers_of, with_places
from sweeper.search.samplers import SamplerContext, make_sampler
from sweeper.search.study import ORDERED
from sweeper.search.study_plan import studies

RANKS = CategoricalDistribution((32, 8, 2, 16, 4))
NAMES = CategoricalDistribution(("mlp", "all-linear", "attention"))


def _trial(value: float, **params: Any) -> FrozenTrial:
    known: dict[str, BaseDistribution] = {"r": RANKS, "t": NAMES}
    return create_trial(
        value=value, params=params, distributions={name: known[name] for name in params}
    )


@given(st.lists(st.integers(-50, 50) | st.floats(-50, 50), min_size=3, max_size=8))
def test_the_order_of_a_choice_is_that_of_its_numbers(values: list[int | float]) -> None:
    """However they were typed; equal ones have no order."""
    found = numbers_of(values)
    assert found == (tuple(sorted(values)) if len(set(values)) == len(values) else None)


@pytest.mark.parametrize("values", [(1, 2, True), (1, 2, None), ("1", "2", "4"), (1, 2, "auto")])
def test_what_is_no_number_has_no_order(values: tuple[Any, ...]) -> None:
    """Booleans, null and words remain choices."""
    assert numbers_of(values) is None


def test_a_sampler_sees_places_and_the_storage_keeps_numbers() -> None:
    """Ranks are 0 to 4 in their order, words stay words, and the stored trial has what was asked for."""
    seen: list[FrozenTrial] = []
    asked: list[BaseDistribution] = []

    class Spy(RandomSampler):
        def sample_independent(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            param_name: str,
            param_distribution: BaseDistribution,
        ) -> Any:
            seen.extend(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
            asked.append(param_distribution)
            return super().sample_independent(study, trial, param_name, param_distribution)

    study = optuna.create_study(sampler=OrderedChoiceSampler(Spy(seed=0)))
    study.add_trial(_trial(1.0, r=16, t="mlp"))
    trial = study.ask()
    rank = trial.suggest_categorical("r", RANKS.choices)
    target = trial.suggest_categorical("t", NAMES.choices)
    assert asked == [IntDistribution(0, 4), NAMES]
    assert [(each.params["r"], each.params["t"]) for each in seen] == [(3, "mlp")] * 2
    assert seen[0].distributions["r"] == IntDistribution(0, 4)
    stored = study.get_trials()
    assert [each.params["r"] for each in stored] == [16, rank]
    assert stored[1].params["t"] == target
    assert stored[1].distributions["r"] == RANKS


def test_showing_a_trial_does_not_change_it() -> None:
    """A storage hands out trials of its cache."""
    trial = _trial(1.0, r=2)
    shown = with_places(trial)
    assert (shown.params, trial.params) == ({"r": 0}, {"r": 2})
    assert trial.distributions == {"r": RANKS}
    plain = _trial(1.0, t="mlp")
    assert with_places(plain) is plain


def _draws(wrap: Callable[[BaseSampler], BaseSampler], seeds: range) -> list[int]:
    """Return what TPE proposes after every odd number was tried, the best at 15."""
    numbers = CategoricalDistribution(tuple(range(32)))
    found = []
    for seed in seeds:
        study = optuna.create_study(sampler=wrap(TPESampler(seed=seed, n_startup_trials=4)))
        for x in range(1, 32, 2):
            study.add_trial(
                create_trial(value=abs(x - 15), params={"x": x}, distributions={"x": numbers})
            )
        found.append(int(study.ask().suggest_categorical("x", numbers.choices)))
    return found


def test_a_sampler_draws_between_two_good_numbers_because_of_their_order() -> None:
    """14 and 16 were never tried: next to the best one they are likely, as words they are not."""
    near = (12, 14, 16, 18)
    with_order = sum(x in near for x in _draws(OrderedChoiceSampler, range(40)))
    without = sum(x in near for x in _draws(lambda sampler: sampler, range(40)))
    assert with_order > 2 * without
    assert with_order >= 4


def _run(folder: Path, n_trials: int, *overrides: str) -> list[dict[str, Any]]:
    """Return the parameters of each trial of a study in a folder, continued to a total."""
    (plan,) = studies(
        [
            *("+experiment=lr_rank_sweep", "workers=fake", "workers.engine=inline"),
            *("tracking=none", "finalists=none", "pruner=none", "~hydra.sweeper.arms.full"),
            *("workers.fake.step_seconds=0", "workers.fake.steps=2", f"output_dir={folder}"),
            *(f"hydra.sweeper.n_trials={n_trials}", *overrides),
        ]
    )
    run_study(plan)
    study = optuna.load_study(
        study_name="lr_rank_sweep/lora", storage=f"sqlite:///{_database(folder)}"
    )
    return [trial.params for trial in study.trials]


def _database(folder: Path) -> Path:
    return folder / "lr_rank_sweep" / "study.db"


NSGA = ("sampler=optuna", "hydra.sweeper.sampler.class_name=NSGAIISampler")


def test_a_study_of_an_earlier_version_keeps_its_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has trials and no such attribute, and continues as it would have then. A new one is ordered."""
    with monkeypatch.context() as earlier:
        earlier.setattr(samplers, "IN_ORDER", ())
        whole = _run(tmp_path / "whole", 6, *NSGA)
        _run(tmp_path / "continued", 2, *NSGA)
    with closing(sqlite3.connect(_database(tmp_path / "continued"))) as database:
        database.execute("DELETE FROM study_user_attributes WHERE key = ?", (ORDERED,))
        database.commit()
    assert _run(tmp_path / "continued", 6, *NSGA) == whole
    assert _run(tmp_path / "new", 6, *NSGA) != whole


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_tpe_and_random_search_draw_from_the_choices_themselves(name: SamplerName) -> None:
    """An order would change their draws, and TPE's for the worse."""
    settings = SamplerSettings(name=name, seed=0, n_startup_trials=2, class_name=None, kwargs={})
    drawn = []
    for ordered in (True, False):
        sampler = make_sampler(settings, {}, 8, SamplerContext(ordered=ordered))
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda trial: trial.suggest_categorical("r", RANKS.choices), n_trials=8)
        drawn.append([trial.params for trial in study.trials])
    assert drawn[0] == drawn[1]
