"""sampler=lora on functions whose best point is known, and on records of every kind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeper.config.settings import LoraAdapter, SamplerSettings
from sweeper.config.space import Choice, Interval, Point, Space
from sweeper.search.adapter_geometry import RANK, RATE, RATIO, WARMUP, AdapterGeometry
from sweeper.search.geometry_sampler import MODELLED, distribution_of, modelled
from sweeper.search.record_prefix import TURN
from sweeper.search.samplers import SamplerContext, make_sampler
from sweeper.search.study import suggest
from sweeper.search.telling import INFEASIBLE
from tests.conftest import make_settings

LORA = SamplerSettings(name="lora", seed=0, n_startup_trials=4, class_name=None, kwargs={})
TARGETS = "adapter.target_modules"
SPACE: Space = {
    RATE: Interval(3e-4, 3e-2, log=True),
    RANK: Choice((2, 4, 8, 16, 32)),
    RATIO: Choice((1, 2, 4)),
    TARGETS: Choice(("attention", "mlp", "all-linear")),
    WARMUP: Interval(0.0, 0.1),
}
DISTRIBUTIONS = {key: distribution_of(domain) for key, domain in SPACE.items()}  # type: ignore[arg-type]
PENALTY = {"attention": 0.04, "mlp": 0.02, "all-linear": 0.0}


def loss(point: Point) -> float:
    """Nats of a valley whose best rate falls with the root of alpha, as the bank of curves has it."""
    rate, rank, ratio = (float(point[key] or 0) for key in (RATE, RANK, RATIO))
    away = math.log10(rate * math.sqrt(rank * ratio) / 1.2e-2)
    return 3.54 + 0.1 * away**2 + 0.01 * math.log2(32 / rank) + PENALTY[str(point[TARGETS])]


def _sampler(seed: int = 0, space: Space = SPACE, **context: Any) -> BaseSampler:
    adapter = make_settings().adapter
    assert isinstance(adapter, LoraAdapter)
    settings = LORA.model_copy(update={"seed": seed})
    return make_sampler(settings, space, 12, SamplerContext(adapter=adapter, **context))


def _best_after(sampler: BaseSampler, count: int) -> float:
    study = optuna.create_study(sampler=sampler)
    for _ in range(count):
        trial = study.ask()
        study.tell(trial, loss(suggest(trial, SPACE)))
    return float(study.best_value)


def _random_record(count: int, seed: int = 0, spread: float = 0.0) -> list[FrozenTrial]:
    """Return trials at random points, each with the loss of its point and some noise."""
    source = optuna.create_study(sampler=RandomSampler(seed=seed))
    noise = np.random.default_rng(seed)
    found = []
    for place in range(count):
        point = suggest(source.ask(), SPACE)
        value = loss(point) + spread * float(noise.standard_normal())
        found.append(_ended(point, value, place))
    return found


def _ended(
    point: Point, value: float, place: int, infeasible: float = -1.0, **changes: Any
) -> FrozenTrial:
    return create_trial(
        value=value,
        params=dict(point),
        distributions=DISTRIBUTIONS,
        user_attrs={"cause": "finished", TURN: [place, 0]},
        constraints={INFEASIBLE: infeasible},
        **changes,
    )


def _next(
    record: Sequence[FrozenTrial],
    seed: int = 0,
    direction: str = "minimize",
    fixed: Point | None = None,
    **context: Any,
) -> Point:
    """Return what the sampler proposes after a record."""
    study = optuna.create_study(sampler=_sampler(seed, **context), direction=direction)
    study.add_trials(record)
    if fixed is not None:
        study.enqueue_trial(fixed)
    return suggest(study.ask(), SPACE)


def test_it_finds_the_valley_in_a_third_of_what_random_search_leaves() -> None:
    """Twelve trials on each of eight seeds, in the product's own space."""
    left = [_best_after(_sampler(seed), 12) - 3.54 for seed in range(8)]
    by_chance = [_best_after(RandomSampler(seed=seed), 12) - 3.54 for seed in range(8)]
    assert np.mean(left) < np.mean(by_chance) / 3


def test_the_same_record_and_seed_give_the_same_point() -> None:
    """In whatever order the trials arrive; another seed gives another point."""
    record = _random_record(20)
    assert _next(record) == _next(record) == _next(record[::-1])
    assert _next(record) != _next(record, seed=1)


PROGRAM = """
import json
from tests.search.test_geometry_sampler import _next, _random_record
print(json.dumps(_next(_random_record(12))))
"""


def test_every_process_draws_the_same() -> None:
    """Names are hashed differently in each process, and the number of threads differs."""
    found = []
    for hashed, threads in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": hashed, "OMP_NUM_THREADS": threads}
        environment["OPENBLAS_NUM_THREADS"] = threads
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=120,
        )
        found.append(json.loads(result.stdout.splitlines()[-1]))
    assert found[0] == found[1]


def test_a_maximised_objective_is_searched_as_its_reverse() -> None:
    """With every value reversed the same point is proposed."""
    record = _random_record(20)
    reversed_record = [
        _ended(trial.params, -float(trial.value or 0), place) for place, trial in enumerate(record)
    ]
    assert _next(reversed_record, direction="maximize") == _next(record)


def test_a_value_that_a_user_gave_is_kept_and_the_rest_fits_it() -> None:
    """At four times the usual rate the drawn alpha is lower than at a quarter of it."""
    record = _random_record(60)
    alphas = []
    for rate in (2e-2, 1e-3):
        points = [_next(record, seed, fixed={RATE: rate}) for seed in range(5)]
        assert {point[RATE] for point in points} == {rate}
        doublings = [math.log2(float(p[RANK] or 0) * float(p[RATIO] or 0)) for p in points]
        alphas.append(np.mean(doublings))
    assert alphas[0] < alphas[1] - 1


def test_stopped_trials_keep_the_search_away() -> None:
    """Thirty trials in the lower half of the rates were stopped: fewer of the next points lie there."""
    middle = 3e-3
    ended = [
        _ended(trial.params, float(trial.value or 0), place, intermediate_values={250: 3.9})
        for place, trial in enumerate(_random_record(40))
        if trial.params[RATE] > middle
    ]
    stopped = [
        create_trial(
            state=TrialState.PRUNED,
            params=trial.params,
            distributions=DISTRIBUTIONS,
            intermediate_values={250: 4.5},
            user_attrs={"cause": "pruned", TURN: [100 + place, 0]},
        )
        for place, trial in enumerate(_random_record(60, seed=1))
        if trial.params[RATE] < middle
    ]
    low = sum(float(_next([*ended, *stopped], seed)[RATE] or 0) < middle for seed in range(8))
    assert low <= 1


def test_points_that_cannot_be_trained_keep_the_search_away() -> None:
    """Every rank above 8 runs out of memory and would be best: at most one of eight goes there."""
    record = [
        _ended(trial.params, float(trial.value or 0), place, int(trial.params[RANK]) - 8)
        for place, trial in enumerate(_random_record(40))
    ]
    high = sum(int(_next(record, seed)[RANK] or 0) > 8 for seed in range(8))
    assert high <= 1


def test_until_a_point_can_be_trained_draws_are_random() -> None:
    """Six impossible points at one rate say nothing about good ones: the next ones lie anywhere."""
    record = []
    for place in range(6):
        point: Point = {RATE: 4e-4 * 1.1**place, RANK: 8, RATIO: 2, TARGETS: "mlp", WARMUP: 0.05}
        record.append(_ended(point, 4.5, place, infeasible=1.0))
    rates = [float(_next(record, seed)[RATE] or 0) for seed in range(8)]
    assert min(rates) < 3e-3 < max(rates)


@pytest.mark.parametrize("seed", range(3))
def test_running_trials_keep_others_away(seed: int) -> None:
    """Of four points that are asked at once, any two are apart in some coordinate."""
    study = optuna.create_study(sampler=_sampler())
    study.add_trials(_random_record(12, seed))
    points = [suggest(study.ask(), SPACE) for _ in range(4)]
    geometry = AdapterGeometry(SPACE, make_settings().adapter)  # type: ignore[arg-type]
    rows = geometry.coordinates(geometry.columns(points), 0.5)
    distances = [float(np.abs(one - other).max()) for one, other in combinations(rows, 2)]
    assert min(distances) > 0.02


def test_no_point_of_a_finite_space_is_proposed_twice() -> None:
    """Steps and choices: after four random ones, each of the rest is new until all are tried."""
    space: Space = {"s": Interval(0.0, 0.4, step=0.1), "c": Choice(("a", "b")), "b": Choice((1, 2))}
    study = optuna.create_study(sampler=_sampler(space=space))
    points = []
    for _ in range(18):
        trial = study.ask()
        point = suggest(trial, space)
        study.tell(trial, float(point["s"] or 0) + float(point["b"] or 0))
        points.append(str(sorted(point.items())))
    random, modelled = set(points[:4]), points[4:]
    assert len(set(modelled)) == len(modelled)
    assert not random & set(modelled)


@pytest.mark.parametrize(
    "space",
    [
        {"training.weight_decay": Interval(0.0, 0.1)},
        {RATE: Interval(1e-6, 1e-3, log=True)},
        {RANK: Choice((2, 4, 8))},
        {
            "quantization": Choice(("nf4", "none")),
            "data.max_length": Interval(64, 512, integer=True),
        },
        {RATE: Choice((1e-3, 3e-3, 1e-2)), "adapter.use_dora": Choice((True, False))},
    ],
    ids=str,
)
def test_spaces_without_loras_keys_are_searched_too(space: Space) -> None:
    """Whatever is searched is drawn inside its domain, before and after the model is there."""
    study = optuna.create_study(sampler=_sampler(space=space))
    inside = []
    for number in range(8):
        trial = study.ask()
        point = suggest(trial, space)
        inside.append(all(value in space[key] for key, value in point.items()))  # type: ignore[operator]
        study.tell(trial, float(number % 3))
    assert inside == [True] * 8


def test_equal_values_and_a_single_one_are_no_error() -> None:
    """After one trial, and after trials that all have one value."""
    eager = make_sampler(LORA.model_copy(update={"n_startup_trials": 1}), SPACE, 12)
    study = optuna.create_study(sampler=eager)
    points = []
    for _ in range(6):
        trial = study.ask()
        points.append(str(suggest(trial, SPACE)))
        study.tell(trial, 3.5)
    assert len(set(points)) == 6


@pytest.mark.parametrize(
    ("count", "limit_s"), [(10, 0.1), (200, 0.1), pytest.param(3000, 1.0, marks=pytest.mark.slow)]
)
def test_a_draw_takes_a_tenth_of_a_second(count: int, limit_s: float) -> None:
    """CPU seconds of a draw after that many trials, the least of five."""
    record = _random_record(count, spread=0.006)
    study = optuna.create_study(sampler=_sampler())
    study.add_trials(record)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        suggest(study.ask(), SPACE)
        seconds.append(time.process_time() - started)
    assert min(seconds) < limit_s


def test_of_many_trials_the_best_half_and_a_spread_of_the_others_are_modelled() -> None:
    """The model's time is bounded, and no good trial is forgotten."""
    costs = np.random.default_rng(0).random(4 * MODELLED)
    kept = modelled(costs)
    assert len(kept) == len(set(kept.tolist())) == MODELLED
    assert set(np.argsort(costs)[: MODELLED // 2]) <= set(kept)
    assert int(np.argmax(costs)) in kept
    assert modelled(costs[:7]).tolist() == list(range(7))


def test_no_torch_is_loaded() -> None:
    """The driver stays small: only Optuna's own Gaussian process loads torch."""
    code = (
        "import sys\nimport sweeper.search.geometry_sampler\n"
        "print(*{'torch', 'transformers', 'mlflow'} & {m.split('.')[0] for m in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == ""


def test_other_samplers_load_no_scikit_learn() -> None:
    """A study with TPE does not wait for its import."""
    code = (
        "import sys\nimport sweeper.search.samplers\n"
        "print(*{'sklearn'} & {m.split('.')[0] for m in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    "ask",
    [
        lambda trial: trial.suggest_float("x", 1e-4, 1e-2, log=True),
        lambda trial: trial.suggest_float("x", 0.0, 0.9, step=0.1),
        lambda trial: trial.suggest_int("x", 1, 64, log=True),
        lambda trial: trial.suggest_int("x", 0, 64, step=8),
        lambda trial: trial.suggest_categorical("x", (None, "a", 2, True)),
    ],
)
def test_the_distributions_are_those_that_are_suggested(
    ask: Callable[[optuna.Trial], Any],
) -> None:
    """Optuna refuses a value that was drawn from another distribution than it is asked for."""
    domains: dict[str, Interval | Choice] = {
        "log": Interval(1e-4, 1e-2, log=True),
        "step": Interval(0.0, 0.9, step=0.1),
        "log int": Interval(1, 64, log=True, integer=True),
        "int step": Interval(0, 64, step=8, integer=True),
        "choice": Choice((None, "a", 2, True)),
    }
    trial = optuna.create_study(sampler=RandomSampler(seed=0)).ask()
    ask(trial)
    made: list[BaseDistribution] = [distribution_of(domain) for domain in domains.values()]
    assert made.count(trial.distributions["x"]) == 1
