"""The guard around Optuna's pruner."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import Trial

from sweeper.config.settings import PrunerSettings
from sweeper.search.pruning import (
    PruningGuard,
    RungGuard,
    as_told,
    audited,
    make_pruner,
    make_watch,
    may_prune,
    permille,
    report_again,
    value_at,
)
from tests.conftest import make_settings

MEDIAN = PrunerSettings(
    name="median",
    rungs=[350, 500, 650, 800],
    n_startup_trials=2,
    percentile=None,
    reduction_factor=None,
    class_name=None,
    kwargs={},
    audit_fraction=0.0,
)
OPEN = MEDIAN.model_copy(update={"rungs": []})
HALVING = MEDIAN.model_copy(
    update={"name": "successive_halving", "rungs": [340, 680], "reduction_factor": 2}
)


def _watch(
    study: optuna.Study, settings: PrunerSettings, *overrides: str
) -> tuple[Trial, PruningGuard]:
    trial = study.ask()
    return trial, make_watch(settings, make_settings(*overrides).training, trial)


def _run(
    study: optuna.Study, settings: PrunerSettings, losses: list[float], total: int, *overrides: str
) -> int | None:
    """Evaluate at equal distances; the step at which the trial is stopped, None if it ends."""
    trial, watch = _watch(study, settings, *overrides)
    for index, loss in enumerate(losses, start=1):
        step = total * index // len(losses)
        if watch.evaluated(step, total, loss):
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return step
    study.tell(trial, min(losses))
    return None


GOOD = [2.0, 1.5, 1.2, 1.0]
BAD = [3.0, 2.9, 2.8, 2.7]


@pytest.mark.parametrize(
    ("overrides", "rung", "allowed"),
    [
        (["training.warmup_ratio=0.1"], 350, True),
        (["training.warmup_ratio=0.5"], 500, False),
        (["training.warmup_ratio=0.5"], 510, True),
        (["training.warmup_steps=60"], 600, False),
        (["training.warmup_steps=60"], 610, True),
    ],
)
def test_no_decision_before_warmup_ends(overrides: list[str], rung: int, allowed: bool) -> None:
    """A rung within the warm-up decides nothing, however warm-up is given."""
    training = make_settings(*overrides).training
    assert may_prune(training, rung, step=rung // 10, total_steps=100) is allowed


def test_no_decision_at_the_end() -> None:
    """A trial that has nothing left to train is not stopped."""
    assert not may_prune(make_settings().training, 800, step=100, total_steps=100)


def test_trials_are_compared_at_the_same_fraction_of_the_schedule() -> None:
    """Half of 50 steps and half of 100 steps are the same step to Optuna."""
    assert permille(25, 50) == permille(50, 100) == 500


@pytest.mark.parametrize(
    ("rung", "before", "value"),
    [
        (500, (250.0, 4.0), 3.0),  # exactly here
        (350, (250.0, 4.0), 3.6),  # 4.0 - 0.4 * (4.0 - 3.0)
        (350, None, None),  # nobody knows what it was there
        (250, (250.0, 4.0), None),  # told before
        (650, (250.0, 4.0), None),  # not there yet
    ],
)
def test_value_at_a_rung_is_interpolated(
    rung: int, before: tuple[float, float] | None, value: float | None
) -> None:
    """Between two evaluations the value lies on the straight line; it is never extrapolated."""
    found = value_at(rung, before, (500.0, 3.0))
    assert found == (None if value is None else pytest.approx(value))


def test_schedules_of_different_lengths_meet_at_the_same_rungs() -> None:
    """40 and 64 steps, evaluated 4 and 5 times: Optuna sees the same steps of both."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    _run(study, MEDIAN, GOOD, 40)
    _run(study, MEDIAN, [*GOOD, 0.9], 64)
    first, second = study.trials
    assert list(first.intermediate_values) == MEDIAN.rungs
    assert list(second.intermediate_values) == MEDIAN.rungs


def test_a_hopeless_trial_is_stopped_at_the_first_rung_that_may_decide() -> None:
    """Worse than the median of two finished trials: stopped half-way, not at a quarter."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        assert _run(study, MEDIAN, GOOD, 100) is None
    assert _run(study, MEDIAN, BAD, 100) == 50


def test_who_has_caught_up_is_not_stopped_for_an_older_rung() -> None:
    """The evaluation at half passes the rungs 350, far behind, and 500, ahead of the median."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, GOOD, 100)
    assert _run(study, MEDIAN, [4.0, 1.45, 1.1, 1.0], 100) is None
    assert study.trials[-1].intermediate_values[350] > 1.8  # the median there


def test_warm_up_moves_the_decision() -> None:
    """With warm-up until 60 % of the schedule the same trial is stopped at 75 %."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, GOOD, 100)
    assert _run(study, MEDIAN, BAD, 100, "training.warmup_steps=60") == 75


def test_nobody_is_stopped_before_there_are_enough_to_compare_with() -> None:
    """n_startup_trials=2: the second trial runs to its end, however bad."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    _run(study, MEDIAN, GOOD, 100)
    assert _run(study, MEDIAN, BAD, 100) is None


def test_the_best_so_far_is_compared() -> None:
    """A trial whose loss rises after a good start keeps its good value at later rungs."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, GOOD, 100)
    assert _run(study, MEDIAN, [2.0, 0.9, 3.0, 3.0], 100) is None


def test_the_rung_of_a_maximised_value_is_its_highest() -> None:
    """With direction=maximize the low trial is stopped and the high one is not."""
    study = optuna.create_study(direction="maximize", pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, [0.1, 0.2, 0.3, 0.4], 100)
    assert _run(study, MEDIAN, [0.2, 0.3, 0.4, 0.5], 100) is None
    assert _run(study, MEDIAN, [0.1, 0.1, 0.1, 0.1], 100) == 50


def test_a_loss_prunes_where_the_objective_is_maximised() -> None:
    """Told with its sign turned, it decides at the same steps and rungs as where it is minimised."""
    rouge = make_settings("objective=rougeL", "evaluation.generation.num_examples=1").objective
    down = optuna.create_study(pruner=make_pruner(MEDIAN))
    up = optuna.create_study(direction="maximize", pruner=make_pruner(MEDIAN))
    curves = [GOOD, [2.0, 0.9, 3.0, 3.0], [1.9, 1.8, 1.1, 1.0], BAD]
    stopped = [_run(down, MEDIAN, losses, 100) for losses in curves]
    told = [[as_told(rouge, loss) for loss in losses] for losses in curves]
    assert [_run(up, MEDIAN, values, 100) for values in told] == stopped
    assert stopped[-1] == 50
    for minimised, maximised in zip(down.trials, up.trials, strict=True):
        seen = {step: -value for step, value in maximised.intermediate_values.items()}
        assert seen == minimised.intermediate_values


def test_values_of_the_objectives_own_direction_are_told_as_they_are() -> None:
    """A loss under a loss, and ROUGE under ROUGE, keep their sign."""
    generate = ("objective=rougeL", "evaluation.generation.num_examples=1")
    own = make_settings(*generate, "objective.pruning_metric=eval/rougeL").objective
    assert as_told(make_settings().objective, 3.0) == 3.0
    assert as_told(own, 0.3) == 0.3


def test_halving_compares_with_running_trials_but_not_with_nobody() -> None:
    """The library stops the second trial at a rung; here it needs two before it, running or not."""
    study = optuna.create_study(pruner=make_pruner(HALVING))
    watches = [_watch(study, HALVING)[1] for _ in range(3)]
    for watch in watches:
        watch.evaluated(25, 100, 2.0)
    assert [
        watch.evaluated(50, 100, loss) for watch, loss in zip(watches, (1.0, 1.5, 1.9), strict=True)
    ] == [*(False, False, True)]


def test_a_percentile_keeps_only_the_best() -> None:
    """percentile=25 stops a trial that the median would let pass."""
    losses = ([2.0, 1.5, 1.2, 1.0], [2.1, 1.6, 1.3, 1.1], [2.2, 1.7, 1.4, 1.2])
    strict = MEDIAN.model_copy(update={"name": "percentile", "percentile": 25.0})
    for settings, stopped in ((MEDIAN, None), (strict, 50)):
        study = optuna.create_study(pruner=make_pruner(settings))
        for index in (0, 1, 2):
            trial, watch = _watch(study, settings)
            for place, loss in enumerate(losses[index], start=1):
                watch.evaluated(25 * place, 100, loss)
            study.tell(trial, losses[index][-1])
        assert _run(study, settings, [2.05, 1.58, 1.3, 1.1], 100) == stopped


def test_a_second_attempt_tells_no_rung_twice() -> None:
    """What an earlier attempt told Optuna is not told again, and only its newest rung decides again."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, GOOD, 100)
    trial = study.ask()
    trial.report(2.9, 350)
    trial.report(2.9, 500)
    trial.report(2.9, 650)
    told = dict(study.trials[-1].intermediate_values)
    watch = RungGuard(MEDIAN, make_settings().training, trial, reported=(350, 500, 650))
    watch.evaluated(25, 100, 3.0)
    assert not watch.evaluated(50, 100, 2.9)
    assert watch.evaluated(75, 100, 2.8)
    assert study.trials[-1].intermediate_values == told
    assert watch.evaluated(80, 100, 2.8)


def test_a_continued_trial_is_compared_by_what_it_had_reached() -> None:
    """Its best came before the interruption: the new trial has those rungs, and is not stopped."""
    study = optuna.create_study(pruner=make_pruner(MEDIAN))
    for _ in range(2):
        _run(study, MEDIAN, GOOD, 100)
    trial = study.ask()
    measured = [(25, 2.0), (50, 0.9), (75, 0.95)]  # killed after 75, its checkpoint is of 50
    watch = make_watch(MEDIAN, make_settings().training, trial, measured=measured)
    assert not watch.evaluated(75, 100, 3.0)
    assert study.trials[-1].intermediate_values == pytest.approx({350: 1.56, 500: 0.9, 650: 0.9})
    assert not watch.evaluated(100, 100, 3.0)


def test_what_an_earlier_attempt_measured_decides_nothing() -> None:
    """Hopeless before the interruption and far ahead after it: it goes on; still hopeless, it ends."""
    for value, stopped in ((0.8, False), (2.7, True)):
        study = optuna.create_study(pruner=make_pruner(MEDIAN))
        for _ in range(2):
            _run(study, MEDIAN, GOOD, 100)
        measured = [(25, 3.0), (50, 2.9)]
        watch = make_watch(MEDIAN, make_settings().training, study.ask(), measured=measured)
        assert bool(watch.evaluated(85, 100, value)) is stopped


def test_successive_halving_takes_note_of_a_continued_trials_rungs() -> None:
    """The library compares later trials with what it was asked about, also silently."""
    study = optuna.create_study(pruner=make_pruner(HALVING))
    trial = study.ask()
    training = make_settings().training
    watch = make_watch(HALVING, training, trial, measured=[(20, 2.0), (50, 1.0)])
    watch.evaluated(60, 100, 1.5)
    assert study.trials[-1].system_attrs["completed_rung_0"] == pytest.approx(1.533, abs=1e-3)


def _killed(trial: Trial) -> bool:
    raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [MEDIAN, OPEN, HALVING], ids=["median", "open", "halving"])
def test_a_driver_that_is_killed_between_report_and_decision_decides_again(
    settings: PrunerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial waited for the answer, so its newest look is measured again and answered as before."""
    study = optuna.create_study(pruner=make_pruner(settings))
    for _ in range(5):
        _run(study, settings, GOOD, 100)
    trial, watch = _watch(study, settings)
    assert not watch.evaluated(25, 100, 1.9)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "should_prune", _killed)
        with pytest.raises(KeyboardInterrupt):
            watch.evaluated(50, 100, 9.0)
    reported = study.trials[-1].intermediate_values
    training = make_settings().training
    again = make_watch(settings, training, trial, reported, [(25, 1.9), (50, 9.0)])
    assert again.evaluated(50, 100, 9.0)
    assert study.trials[-1].intermediate_values.items() >= reported.items()


@pytest.mark.parametrize("settings", [MEDIAN, OPEN], ids=["median", "open"])
def test_an_older_look_stays_decided(settings: PrunerSettings) -> None:
    """A trial that took further looks is not stopped at an earlier one that is measured again."""
    study = optuna.create_study(pruner=make_pruner(settings))
    for _ in range(5):
        _run(study, settings, GOOD, 100)
    trial, watch = _watch(study, settings)
    assert not watch.evaluated(50, 100, 1.4)
    assert watch.evaluated(75, 100, 9.0)
    reported = study.trials[-1].intermediate_values
    again = make_watch(settings, make_settings().training, trial, reported)
    assert not again.evaluated(50, 100, 9.0)
    assert study.trials[-1].intermediate_values == reported


def test_a_continued_trial_competes_at_the_rungs_of_the_cancelled_one() -> None:
    """Its values at these rungs are those of then, for Optuna's halving as well, and are asked once."""
    study = optuna.create_study(pruner=make_pruner(HALVING))
    trial, watch = _watch(study, HALVING)
    watch.evaluated(34, 100, 2.0)
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    before = study.trials[0]
    assert before.system_attrs["completed_rung_0"] == 2.0
    continued = study.ask()
    assert report_again(continued, before, ()) == {340}
    now = study.trials[1]
    assert now.intermediate_values == before.intermediate_values == {340: 2.0}
    assert now.system_attrs["completed_rung_0"] == 2.0
    training = make_settings().training
    guard = make_watch(HALVING, training, continued, reported={340}, measured=[(34, 2.0)])
    guard.evaluated(68, 100, 1.0)
    assert study.trials[1].system_attrs["completed_rung_0"] == 2.0
    assert study.trials[1].system_attrs["completed_rung_1"] == 1.0


def test_several_objectives_are_not_pruned() -> None:
    """Optuna refuses intermediate values there, so nothing is told and nobody stopped."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    trial, watch = _watch(study, MEDIAN)
    assert not watch.evaluated(50, 100, 9.0)
    assert trial.study.trials[0].intermediate_values == {}


def test_none_never_prunes_but_tells_the_curve() -> None:
    """pruner=none lets every trial end by itself; Optuna still sees every evaluation."""
    none = MEDIAN.model_copy(update={"name": "none", "rungs": []})
    study = optuna.create_study(pruner=make_pruner(none))
    for _ in range(3):
        assert _run(study, none, GOOD, 100) is None
    assert _run(study, none, BAD, 100) is None
    assert list(study.trials[0].intermediate_values) == [250, 500, 750, 1000]


def test_audited_share_is_the_fraction_and_repeats() -> None:
    """A tenth of many trials is drawn; the same trial is always decided alike."""
    settings = MEDIAN.model_copy(update={"audit_fraction": 0.1})
    drawn = [audited(settings, 0, f"lora/{number:04d}") for number in range(2000)]
    assert drawn == [audited(settings, 0, f"lora/{number:04d}") for number in range(2000)]
    assert 160 < sum(drawn) < 240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rungs": []}, "needs increasing per-mille"),
        ({"rungs": [500, 350]}, "needs increasing per-mille"),
        ({"rungs": [240]}, "greater than or equal to 250"),
        ({"percentile": 25.0}, "belongs to pruner=percentile"),
        ({"class_name": "NopPruner"}, "with no other pruner"),
        ({"name": "successive_halving", "reduction_factor": 3, "rungs": [340, 680]}, "× 3"),
    ],
)
def test_pruner_settings_that_contradict_each_other_are_refused(
    change: dict[str, object], message: str
) -> None:
    """Each refusal says which value belongs to what."""
    with pytest.raises(ValueError, match=message):
        PrunerSettings.model_validate({**MEDIAN.model_dump(), **change})
