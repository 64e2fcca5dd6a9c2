"""Policies replayed on a small bank made by hand: recorded values, costs, and what counts."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from benchmarks.curves import replayed_study
from benchmarks.curves.bank_points import RANK, RATE, RATES, RATIO, TARGETS, WARMUP, Point
from benchmarks.curves.bank_surface import fit_surface
from benchmarks.curves.curve_bank import write_bank
from benchmarks.curves.policy_tasks import BUDGET, PolicyTask, bank_task, space_of, tinker_tasks
from benchmarks.curves.replayed_study import (
    RESUME,
    CurveTable,
    EndedTrial,
    GapGuard,
    RecordedCurve,
    ReplayedStudy,
    run_halving,
    run_in_turn,
)
from benchmarks.policies import (
    COMMON,
    GRID,
    POLICIES,
    equivalents_to,
    figures_of,
    in_words,
    plan_of,
    regrets_of,
    replay,
    resampled,
    summarise,
)
from sweeper.search.samplers import make_sampler
from sweeper.search.study import sampler_context

LOOKS = (16, 32, 48, 64)
POINTS: list[Point] = [
    {RATE: rate, RANK: rank, RATIO: ratio, TARGETS: module, WARMUP: 0.03}
    for rate, rank, ratio, module in itertools.product(
        RATES, (2, 8), (1.0, 4.0), ("attention", "all-linear")
    )
]


def _loss(point: Point) -> float:
    """A smooth loss with its best at a rate of 3e-3 over the root of alpha."""
    rate, ratio = math.log10(float(point[RATE])), math.log10(float(point[RATIO]))
    best = -2.5 - ratio / 2
    return 3.5 + 0.1 * (rate - best) ** 2 - 0.01 * math.log2(float(point[RANK]))


def _curve(point: Point, value: float) -> RecordedCurve:
    looks = {step: value + 0.2 * (1 - step / 64) for step in LOOKS}
    costs = {"train_cost": 0.9, "look_cost": 0.025, "judge_cost": 0.1}
    return RecordedCurve(point, looks, looks, steps=64, first_loss=4.6, **costs)


@pytest.fixture(scope="module")
def task() -> PolicyTask:
    """The task of a smooth bank of 64 points."""
    table = CurveTable([_curve(point, _loss(point)) for point in POINTS], 64)
    worth = np.array([curve.value() for curve in table.curves])
    known = f"{{{RATE}: 5e-3, {RANK}: 8, {RATIO}: 1.0, {TARGETS}: all-linear}}"
    return PolicyTask(table, worth, space_of(table), known)


def _study(task: PolicyTask, *overrides: str, seed: int = 0) -> ReplayedStudy:
    plan = plan_of((*COMMON, *task.space, "hydra.sweeper.priors=[]", *overrides))
    return ReplayedStudy(plan, task.table, seed)


def test_the_sampler_sees_the_recorded_point_and_its_own_value(task: PolicyTask) -> None:
    """No value is interpolated: Optuna stores a rate of the bank and the loss that was trained there."""
    study = _study(task, "sampler=random", "pruner=none")
    run_in_turn(study, 12)
    told = study.optuna.get_trials(states=(TrialState.COMPLETE,))
    assert len(told) == len(study.ended) > 8
    for trial, ended in zip(told, study.ended, strict=True):
        point = task.table.curves[ended.index].point
        assert trial.params[RATE] == point[RATE]
        assert {**trial.user_attrs["point"], WARMUP: 0.03} == point
        assert trial.values == [pytest.approx(_loss(point))]
    assert len({ended.index for ended in study.ended}) == len(study.ended)


def test_the_nearest_rate_that_was_not_tried_is_taken(task: PolicyTask) -> None:
    """Rates are near by their ratio, and other settings are taken as they were asked."""
    asked: Point = {**POINTS[0], RATE: RATES[3] * 1.1}
    first = task.table.nearest(asked, set())
    assert task.table.curves[first].point == {**POINTS[0], RATE: RATES[3]}
    second = task.table.nearest(asked, {first})
    assert task.table.curves[second].point == {**POINTS[0], RATE: RATES[4]}


def test_a_bank_without_some_combination_is_refused(task: PolicyTask) -> None:
    """A replay would answer a combination that was never trained by another one."""
    part = [curve for curve in task.table.curves if curve.point[TARGETS] != "all-linear"]
    kept = [*part, next(c for c in task.table.curves if c.point[TARGETS] == "all-linear")]
    with pytest.raises(ValueError, match="5 of 8 combinations"):
        CurveTable(kept, 64)


def test_a_complete_trial_costs_its_training_looks_and_judgement(task: PolicyTask) -> None:
    """Training, four looks and one judgement of the whole split, in trial-equivalents."""
    study = _study(task, "sampler=random", "pruner=none")
    run_in_turn(study, 1.0)
    (ended,) = study.ended
    assert ended.spent == pytest.approx(0.9 + 4 * 0.025 + 0.1)


def test_the_products_pruner_stops_trials_behind_the_median(task: PolicyTask) -> None:
    """No trial is stopped among the first four, and some are later, at a quarter of the cost."""
    study = _study(task, "sampler=random", "pruner=median")
    run_in_turn(study, 16)
    causes = [ended.cause for ended in study.ended]
    assert causes[:4] == ["finished"] * 4
    assert "pruned" in causes[4:]
    first = causes.index("pruned")
    paid = study.ended[first].spent - study.ended[first - 1].spent
    assert paid == pytest.approx(0.9 / 4 + 0.025)
    told = study.optuna.get_trials(states=(TrialState.PRUNED,))
    assert len(told) == causes.count("pruned")


def test_a_gap_stops_what_is_behind_the_best_look(task: PolicyTask) -> None:
    """A trial is stopped at 25 % exactly if its look is more than the gap above the best before."""
    plan = _study(task, "sampler=random", "pruner=none").plan
    study = ReplayedStudy(plan, task.table, 3, lambda study, trial: GapGuard(study, trial, 0.03))
    run_in_turn(study, 12)
    best = math.inf
    for ended in study.ended:
        look = task.table.curves[ended.index].looks[16]
        assert (ended.cause == "pruned") == (look > best + 0.03)
        best = min(best, look)
    assert {ended.cause for ended in study.ended} == {"pruned", "finished"}


def test_halving_continues_the_better_half_of_each_rung(task: PolicyTask) -> None:
    """Of eight trials four pass a quarter and two the half, and pauses are paid for."""
    study = _study(task, "sampler=random", "pruner=none")
    run_halving(study, 0.1)
    causes = [ended.cause for ended in study.ended]
    assert causes == ["pruned"] * 6 + ["finished"] * 2
    looks = {ended.index: task.table.curves[ended.index].looks[16] for ended in study.ended}
    stopped_first = [looks[ended.index] for ended in study.ended[:4]]
    assert min(stopped_first) >= max(looks[ended.index] for ended in study.ended[4:])
    quarter = 0.9 / 4 + 0.025
    paid = 8 * quarter + 4 * (quarter + RESUME) + 2 * (2 * quarter + 0.1 + RESUME)
    assert study.spent == pytest.approx(paid)


def test_a_training_that_diverged_is_infeasible(task: PolicyTask) -> None:
    """Its sampler hears the base's value with a constraint, and pays for the steps until then."""
    ends = {"looks": {16: 4.0}, "whole": {16: 4.0}}
    broken = replace(task.table.curves[0], **ends, steps=20, diverged=True)
    curves = [replace(broken, point=curve.point) for curve in task.table.curves]
    study = _study(replace(task, table=CurveTable(curves, 64)), "sampler=random", "pruner=none")
    run_in_turn(study, 0.1)
    (ended,) = study.ended
    (told,) = study.optuna.get_trials()
    assert (ended.cause, told.values) == ("diverged", [4.6])
    assert list(told.constraints.values()) == [1.0]
    assert ended.spent == pytest.approx(0.9 * 20 / 64 + 0.025)


def test_the_known_point_comes_first(task: PolicyTask) -> None:
    """A policy with the known point begins with the recorded training nearest to it."""
    prior = f"hydra.sweeper.priors=[{task.known}]"
    plan = plan_of((*COMMON, *task.space, prior, "sampler=random", "pruner=none"))
    study = ReplayedStudy(plan, task.table, 0)
    asked = study.ask()
    nearest = min(RATES, key=lambda rate: abs(math.log(rate / 5e-3)))
    assert asked.curve.point == {**POINTS[0], RATE: nearest, RANK: 8, TARGETS: "all-linear"}


def test_seeds_of_the_sampler_give_different_studies_and_the_same_seed_the_same(
    task: PolicyTask,
) -> None:
    """A simulated study follows from its policy and its seed."""
    first, again, other = (replay(task, "TPE", seed) for seed in (1, 1, 2))
    assert first.regrets.tolist() == again.regrets.tolist()
    assert first.regrets.tolist() != other.regrets.tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs(task: PolicyTask, name: str) -> None:
    """Each policy ends trials within its budget, the best of them better than the median point."""
    figures = replay(replace(task, budget=8.0), name, 0)
    assert figures.finished > 0
    assert figures.regrets[-1] < figures.regrets[0]


def test_what_ends_beyond_the_budget_does_not_count(task: PolicyTask) -> None:
    """Neither a kill nor a trial after the budget changes the figures of a study."""
    order = np.argsort(task.worth)
    best, middle, worst = (int(order[place]) for place in (0, 32, 63))
    values = {index: float(task.worth[index]) for index in (best, middle, worst)}
    within = [
        EndedTrial(1.0, middle, "finished", values[middle]),
        EndedTrial(2.0, worst, "finished", values[worst]),
        EndedTrial(3.0, best, "pruned", values[best]),
        EndedTrial(4.0, worst, "pruned", values[worst]),
    ]
    beyond = [
        EndedTrial(BUDGET + 1, best, "pruned", values[best]),
        EndedTrial(BUDGET + 2, best, "finished", values[best]),
    ]
    figures = figures_of([*within, *beyond], task)
    assert (figures.finished, figures.kills, figures.wrong, figures.costly) == (2, 2, 1, 1)
    assert figures.regrets[-1] == pytest.approx(values[middle] - values[best])


def test_the_regret_is_of_what_looks_best_by_what_it_is_worth() -> None:
    """A trial that looks best by a lucky seed counts with its worth, not with its value."""
    worth = np.array([3.5, 3.6, 3.7])
    trials = [EndedTrial(2.0, 1, "finished", 3.6), EndedTrial(4.0, 2, "finished", 3.4)]
    regrets = regrets_of(trials, worth)
    assert regrets[GRID < 2] == pytest.approx(0.1)  # the median point's
    assert regrets[(GRID >= 2) & (GRID < 4)] == pytest.approx(0.1)
    assert regrets[GRID >= 4] == pytest.approx(0.2)


def test_equivalents_to_a_regret_are_where_the_mean_reaches_it() -> None:
    """The first budget at which the mean regret is small enough, or infinity."""
    regrets = np.where(GRID < 5, 0.02, 0.005)
    assert equivalents_to(regrets, 0.01) == 5
    assert equivalents_to(regrets, 0.001) == math.inf


def test_intervals_contain_the_mean_and_shrink_with_the_studies(task: PolicyTask) -> None:
    """A bootstrap over four times as many studies has about half the width."""
    random = np.random.default_rng(1)
    noise = random.normal(0.02, 0.01, (400, len(GRID)))
    parts = [resampled(part)[:, 0] for part in (noise[:100], noise)]
    widths = [float(np.ptp(np.quantile(means, [0.025, 0.975]))) for means in parts]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.3)
    row = summarise([replay(task, "random", seed) for seed in range(4)], BUDGET)
    low, high = row["regret at 12, interval"]
    assert low <= row["regret at 12"] <= high


def test_nothing_is_reported_beyond_the_budget(task: PolicyTask) -> None:
    """Studies of 12 equivalents have no regret at 24."""
    row = summarise([replay(replace(task, budget=12.0), "random", 0)], 12.0)
    assert "regret at 12" in row
    assert "regret at 24" not in row
    assert "at 2 " in in_words("random", row)


def test_a_lucky_value_of_the_choosing_seed_is_not_worth_its_luck() -> None:
    """Further seeds say what a point is worth. Without them its neighbours take part of its luck."""
    values = [_loss(point) for point in POINTS]
    best = int(np.argmin(values))
    lucky = [value - (0.03 if index == best else 0.0) for index, value in enumerate(values)]
    none: list[float | None] = [None] * len(values)
    alone = fit_surface(POINTS, lucky, none).values[best]
    assert lucky[best] + 0.003 < alone <= values[best]
    fresh = [values[best] if index == best else None for index in range(len(values))]
    repeated = fit_surface(POINTS, lucky, fresh).values[best]
    assert repeated == pytest.approx(values[best], abs=0.006)


def test_the_surface_of_a_smooth_bank_is_right_between_its_points() -> None:
    """The error at points that were not fitted is far below the spread of a seed (0.006)."""
    surface = fit_surface(POINTS, [_loss(point) for point in POINTS], [None] * len(POINTS))
    between: list[Point] = [{**point, RATE: float(point[RATE]) * 1.3} for point in POINTS[8:40]]
    errors = surface.at_points(between) - np.array([_loss(point) for point in between])
    assert float(np.sqrt(np.mean(errors**2))) < 0.004
    assert surface.error_of_best_half < 0.004


def test_a_stored_bank_becomes_a_task(tmp_path: Path) -> None:
    """Losses, costs and worths come from the file: a look costs its share of a judgement's rows."""
    header = {
        "total_steps": 64,
        "tokens": [1] * 10,
        "look_rows": [0, 1],
        "provenance": {},
        "config": {"model": {"base_model": "embedded"}, "data": {"train": "embedded"}},
    }
    trials = [
        {
            "role": "factorial",
            "point": point,
            "cause": "finished",
            "steps": 64,
            "value": _loss(point),
            "train_loss": [4.6],
            "cpu_train": 9.0,
            "looks": [
                {"step": step, "loss": _loss(point), "sample_loss": _loss(point) + 0.1, "cpu": 1.0}
                for step in LOOKS
            ],
        }
        for point in POINTS
    ]
    write_bank("embedded", header, trials, tmp_path)
    task, figures = bank_task("embedded", tmp_path)
    curve = task.table.curves[0]
    assert (curve.train_cost, curve.judge_cost) == (pytest.approx(0.9), pytest.approx(0.1))
    assert curve.look_cost == pytest.approx(0.02)
    assert curve.looks[16] == pytest.approx(curve.value() + 0.1)
    assert (figures["curves"], figures["diverged"]) == (64, 0)
    assert figures["points with further seeds"] == 0
    best = min(range(64), key=lambda index: _loss(POINTS[index]))
    assert task.worth[best] == pytest.approx(min(map(_loss, POINTS)), abs=0.01)


def test_the_table_of_final_values_is_searched_by_rate_and_rank() -> None:
    """A trial of any of 482 cells costs one equivalent. The known point is 3e-4 at the top rank."""
    tasks = tinker_tasks()
    assert (len(tasks), sum(len(task.table.curves) for task in tasks.values())) == (35, 482)
    task = tasks["meta-llama/Llama-3.1-8B"]
    prior = f"hydra.sweeper.priors=[{task.known}]"
    plan = plan_of((*COMMON, *task.space, prior, "sampler=tpe", "pruner=none"))
    study = ReplayedStudy(plan, task.table, 0)
    run_in_turn(study, 5)
    first = task.table.curves[study.ended[0].index].point
    assert (first[RATE], first[RANK]) == (3e-4, max(task.table.levels()[RANK]))
    assert [ended.spent for ended in study.ended] == [1, 2, 3, 4, 5]


def test_a_replay_gives_the_sampler_all_that_a_study_gives_it(
    task: PolicyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay makes the sampler as open_study does. A new argument of make_sampler fails this test."""
    given: list[tuple[Any, ...]] = []

    def make(*arguments: Any) -> BaseSampler:
        given.append(arguments)
        return make_sampler(*arguments)

    monkeypatch.setattr(replayed_study, "make_sampler", make)
    study = _study(task, "sampler=lora", "pruner=none", seed=7)
    plan, arm = study.plan, study.arm
    settings = arm.sampler.model_copy(update={"seed": 7})
    assert given == [(settings, arm.space, arm.n_trials, sampler_context(plan, arm))]
    assert len(inspect.signature(make_sampler).parameters) == len(given[0])
