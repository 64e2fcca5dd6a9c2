"""What a search does beyond asking and telling: branches, audits, fronts, limits, earlier studies."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.core.errors import StudyMismatch
from sweeper.reporting.results import ArmResult, StudyResults, load_results
from sweeper.search.pruning_audit import PruningAudit, audit
from sweeper.search.study import AUDITED, ask_again
from sweeper.search.study_plan import studies
from tests.conftest import make_settings

FAKE = (
    *("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none"),
    "pruner=none",
)
LR_RANK = ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full")
RATE = "training.learning_rate=tag(log,interval(3e-4,3e-2))"
FEW = ("adapter.alpha_over_r=2", "adapter.target_modules=mlp", "training.warmup_ratio=0.03")


def _run(tmp_path: Path, name: str, *overrides: str) -> StudyResults:
    fixed = (f"output_dir={tmp_path}", f"hydra.sweeper.study_name={name}")
    own_space = any("hydra.sweeper.params=" in text for text in overrides)
    (plan,) = studies([*FAKE, *([] if own_space else LR_RANK), *fixed, *overrides])
    return run_study(plan)


def _lora(tmp_path: Path, name: str, *overrides: str) -> ArmResult:
    return _run(tmp_path, name, *overrides).arms[0]


def _study(tmp_path: Path, name: str) -> optuna.Study:
    storage = f"sqlite:///{tmp_path / name / 'study.db'}"
    return optuna.load_study(study_name=f"{name}/lora", storage=storage)


DORA = (
    "++hydra.sweeper.params={training.learning_rate: 'tag(log, interval(3e-4, 3e-2))', "
    "adapter.use_dora: {true: {adapter.r: 'choice(4, 8)'}, false: {adapter.r: 'choice(16, 32)'}}}"
)


def test_a_branch_reaches_the_trial_and_no_other_branch_does(tmp_path: Path) -> None:
    """Ten trials: every DoRA trial has a rank of its branch, every plain one of its own."""
    arm = _lora(tmp_path, "dora", DORA, "workers.fake.steps=4", "hydra.sweeper.n_trials=10")
    settings = [
        json.loads(
            (tmp_path / "dora" / "lora" / f"trial_{t.number:04d}" / "config.yaml").read_text()
        )
        for t in arm.trials
    ]
    pairs = {(each["adapter"]["use_dora"], each["adapter"]["r"]) for each in settings}
    assert pairs <= {(True, 4), (True, 8), (False, 16), (False, 32)}
    assert {dora for dora, _ in pairs} == {True, False}
    assert all(trial.params["adapter.r"] in (4, 8, 16, 32) for trial in arm.trials)


HOPELESS = (
    *("pruner=median", "adapter.r=8", *FEW, "hydra.sweeper.n_trials=5"),
    "workers.fake.step_seconds=0.03",
    "training.learning_rate=choice(5e-3, 4e-3, 6e-3, 7e-3, 3e-4)",
)
"""The fifth rate of a grid is far worse than the median of the four before it."""


@pytest.mark.slow
def test_an_audited_trial_ends_by_itself_and_is_judged(tmp_path: Path) -> None:
    """audit_fraction=1: nothing is pruned, and the report says how often the pruner was wrong."""
    arm = _lora(tmp_path, "x", *HOPELESS, "sampler=grid", "hydra.sweeper.pruner.audit_fraction=1")
    assert {trial.outcome.cause for trial in arm.trials} == {"finished"}
    assert [trial.number for trial in arm.trials if trial.audited] == [4]
    assert arm.audit == PruningAudit(audited=1, wrong=0, costly=0)
    assert "pruner audit" in (tmp_path / "x" / "report.md").read_text()
    assert load_results("x", tmp_path).arms[0].audit == arm.audit


def test_an_interrupted_audit_is_queued_as_an_audit() -> None:
    """Only one that was spared: the point of any other is drawn when the pruner would stop it."""
    study = optuna.create_study()
    for spared in (True, False):
        trial = study.ask()
        if spared:
            trial.set_user_attr(AUDITED, True)
        ask_again(study, trial, {})
        continued = study.ask()
        assert continued.user_attrs["continues"] == trial.number
        assert continued.user_attrs.get(AUDITED, False) is spared


@pytest.mark.slow
def test_a_continued_audit_is_not_drawn_again(tmp_path: Path) -> None:
    """Though no further trial would be audited, it runs to its end and is judged as an audit."""
    grid = (*HOPELESS, "sampler=grid")
    _lora(tmp_path, "x", *grid, "hydra.sweeper.pruner.audit_fraction=1")
    with closing(sqlite3.connect(tmp_path / "x" / "study.db")) as database, database:
        database.execute("update trials set state = 'FAIL' where number = 4")
        cancelled = "select trial_id from trials where number = 4"
        database.execute(
            "update trial_user_attributes set value_json = 'false' "
            f"where key = 'counts' and trial_id = ({cancelled})"
        )
    (audited,) = (trial for trial in _study(tmp_path, "x").trials if AUDITED in trial.user_attrs)
    queued = {"continues": audited.number, AUDITED: True}
    _study(tmp_path, "x").enqueue_trial(audited.params, user_attrs=queued)
    arm = _lora(tmp_path, "x", *grid, "hydra.sweeper.pruner.audit_fraction=0")
    assert (arm.trials[-1].number, arm.trials[-1].outcome.cause) == (5, "finished")
    assert arm.trials[-1].audited


@pytest.mark.slow
def test_a_hopeless_trial_is_pruned_and_its_twin_is_not_trained(tmp_path: Path) -> None:
    """Without an audit it is stopped; asked again, the point is answered from that trial."""
    arm = _lora(tmp_path, "x", *HOPELESS, "sampler=grid")
    pruned = arm.trials[-1]
    assert (pruned.number, pruned.outcome.cause) == (4, "pruned")
    assert pruned.outcome.steps < 20
    _study(tmp_path, "x").enqueue_trial(dict(pruned.params))
    arm = _lora(tmp_path, "x", *HOPELESS, "sampler=random", "hydra.sweeper.n_trials=6")
    again = [t for t in arm.trials if t.params == pruned.params and t.number != pruned.number]
    assert again
    assert {trial.outcome.cause for trial in again} == {"duplicate"}


def test_wrong_kills_are_counted_against_the_trials_that_were_not_audited() -> None:
    """Of three audited: one better than the median of the others, one better than the best."""
    loss = make_settings().objective
    assert audit(loss, [1.0, 2.0, 3.0], [2.5, 1.5, 0.5]) == PruningAudit(
        audited=3, wrong=2, costly=1
    )
    assert audit(loss, [1.0], []) is None
    assert audit(loss, [], [1.0]) is None


def test_wrong_kills_of_a_maximised_objective_are_the_high_ones() -> None:
    """The same values where more is better: one above the median, none above the best."""
    rouge = make_settings("objective=rougeL", "evaluation.generation.num_examples=1").objective
    assert audit(rouge, [1.0, 2.0, 3.0], [2.5, 1.5, 0.5]) == PruningAudit(
        audited=3, wrong=1, costly=0
    )


def test_costs_give_a_front_and_no_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against trainable parameters: no trial of the front is beaten in both by any other."""
    arm = _lora(
        tmp_path,
        "front",
        *("hydra.sweeper.costs=[parameters/trainable]", "pruner=median", "sampler=tpe"),
        "hydra.sweeper.n_trials=10",
    )
    assert "nothing is pruned" in capsys.readouterr().out
    values = {
        trial.number: (trial.value or 0.0, trial.metric("parameters/trainable") or 0.0)
        for trial in arm.trials
    }
    beaten = {
        number
        for number, (loss, cost) in values.items()
        if any(a <= loss and b <= cost and (a, b) != (loss, cost) for a, b in values.values())
    }
    assert set(arm.front) == set(values) - beaten
    assert load_results("front", tmp_path).arms[0].front == arm.front
    assert "Pareto front" in (tmp_path / "front" / "report.md").read_text()


def test_infeasible_trials_are_never_on_the_front(tmp_path: Path) -> None:
    """An out-of-memory trial is told with its constraint and takes no place on the front."""
    arm = _lora(
        tmp_path,
        "front",
        *("hydra.sweeper.costs=[parameters/trainable]", "++workers.fake.plan={0:oom,2:diverge}"),
        "hydra.sweeper.n_trials=5",
    )
    assert not set(arm.front) & {0, 2}
    assert _study(tmp_path, "front").trials[0].constraints == {"infeasible": 1.0}


def test_a_cost_that_nobody_measures_ends_the_study_with_the_names_there_are(
    tmp_path: Path,
) -> None:
    """A misspelt metric is an error, not an empty column."""
    from sweeper.core.errors import StudyError

    with pytest.raises(StudyError, match=r"no metric cost/memory .* parameters/trainable"):
        _run(tmp_path, "front", "hydra.sweeper.costs=[cost/memory]")


def test_a_used_up_budget_ends_the_arm_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plateau rule that any trial breaks: the arm ends early and says why; without it it goes on."""
    rule = "++hydra.sweeper.budget.plateau={trials: 2, min_improvement: 9}"
    early = _lora(tmp_path, "budget", rule, "hydra.sweeper.n_trials=6")
    assert len(early.trials) == 3
    output = capsys.readouterr().out
    assert "ends at 3 of 6 trials: the last 2 trials improved the best by no more than 9" in output
    late = _lora(tmp_path, "budget", "hydra.sweeper.n_trials=6")
    assert len(late.trials) == 6


def test_device_hours_are_counted_over_all_runs(tmp_path: Path) -> None:
    """What earlier runs spent is spent: the same command starts nothing more."""
    limit = "hydra.sweeper.budget.device_hours=1e-7"
    first = _lora(tmp_path, "budget", limit, "hydra.sweeper.n_trials=6")
    assert 1 <= len(first.trials) < 6
    second = _lora(tmp_path, "budget", limit, "hydra.sweeper.n_trials=6")
    assert len(second.trials) == len(first.trials)


def test_winners_of_an_earlier_study_are_tried_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best point comes first, without the key that is not searched here; strangers are ignored."""
    old = _lora(tmp_path, "old", "hydra.sweeper.n_trials=4").best
    assert old is not None
    arm = _lora(
        tmp_path,
        "new",
        *("hydra.sweeper.warm_start=[old,nope]", "hydra.sweeper.n_trials=2"),
        "adapter.alpha_over_r=2",
    )
    first = next(trial for trial in arm.trials if trial.number == 0)
    shared = {key: value for key, value in old.params.items() if key != "adapter.alpha_over_r"}
    assert first.params == shared
    output = capsys.readouterr().out
    assert "warm start from old: its best point" in output
    assert "not searched here: adapter.alpha_over_r=" in output
    assert "warm start from nope: it has no arm lora, ignored" in output


def test_winners_outside_the_space_are_ignored_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A winner of other ranks than are searched now."""
    _run(tmp_path, "old", "adapter.r=4,8", "hydra.sweeper.n_trials=2")
    _run(
        tmp_path,
        "new",
        *("adapter.r=16,32", "hydra.sweeper.warm_start=[old]", "hydra.sweeper.n_trials=1"),
    )
    assert "lies outside this space, ignored" in capsys.readouterr().out


def test_a_fork_adopts_what_fits_and_trains_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From ranks 4, 8 to 8, 16: the trials with rank 8 are kept with value and folder, and counted."""
    plan = ("sampler=random", RATE, *FEW)
    old = _lora(tmp_path, "old", *plan, "adapter.r=4,8", "hydra.sweeper.n_trials=6")
    kept = {t.params["training.learning_rate"]: t for t in old.trials if t.params["adapter.r"] == 8}
    assert 0 < len(kept) < 6
    fork = (*plan, "adapter.r=8,16", "hydra.sweeper.fork_of=old", "hydra.sweeper.n_trials=8")
    new = _lora(tmp_path, "new", *fork)
    assert f"fork of old: {len(kept)} of its 6 trials fit this study" in capsys.readouterr().out
    marked = [t for t in _study(tmp_path, "new").trials if "forked_from" in t.user_attrs]
    assert len(marked) == len(kept)
    assert len([trial for trial in new.trials if trial.complete]) == 8
    for trial in marked:
        origin = kept[trial.params["training.learning_rate"]]
        assert trial.values == [origin.value]
        assert trial.user_attrs["forked_from"] == f"old/lora/{origin.number:04d}"
        folder = tmp_path / "new" / "lora" / f"trial_{trial.number:04d}"
        assert folder.resolve().name == f"trial_{origin.number:04d}"
        assert (folder / "outcome.json").exists()
    again = _lora(tmp_path, "new", *fork)
    assert len(again.trials) == len(new.trials)


def test_a_fork_keeps_what_successive_halving_compares_by(tmp_path: Path) -> None:
    """Adopted trials compete at the rungs they reached; at other rungs nobody knows their values."""
    plan = ("sampler=random", RATE, *FEW, "adapter.r=8", "hydra.sweeper.n_trials=2")
    halving = (*plan, "pruner=successive_halving")
    _run(tmp_path, "old", *halving)
    fork = (*halving, "hydra.sweeper.fork_of=old")
    _run(tmp_path, "new", *fork)
    _run(tmp_path, "elsewhere", *fork, "hydra.sweeper.pruner.rungs=[400,800]")
    reached = [_reached(trial) for trial in _study(tmp_path, "old").trials]
    assert [list(rungs) for rungs in reached] == [["completed_rung_0", "completed_rung_1"]] * 2
    assert [_reached(trial) for trial in _study(tmp_path, "new").trials] == reached
    assert [_reached(trial) for trial in _study(tmp_path, "elsewhere").trials] == [{}, {}]


def _reached(trial: optuna.trial.FrozenTrial) -> dict[str, float]:
    noted = trial.system_attrs.items()
    return {key: value for key, value in noted if key.startswith("completed_rung_")}


def test_a_fork_takes_no_trial_with_other_fixed_settings(tmp_path: Path) -> None:
    """Trials with another seed answer another question: none fits."""
    _run(tmp_path, "old", "seed=1", "hydra.sweeper.n_trials=2")
    _run(tmp_path, "new", "seed=2", "hydra.sweeper.fork_of=old", "hydra.sweeper.n_trials=1")
    assert not [t for t in _study(tmp_path, "new").trials if "forked_from" in t.user_attrs]


def test_a_fork_into_branches_takes_the_trials_of_each(tmp_path: Path) -> None:
    """Plain ranks 16 fit the branch without DoRA; what a branch leaves open is compared as well."""
    plain = (
        "++hydra.sweeper.params={training.learning_rate: 'tag(log, interval(3e-4, 3e-2))', "
        "adapter.r: 'choice(8, 16)'}"
    )
    _run(tmp_path, "old", plain, "sampler=random", "hydra.sweeper.n_trials=4")
    old = _study(tmp_path, "old").trials
    _run(tmp_path, "new", DORA, "hydra.sweeper.fork_of=old", "hydra.sweeper.n_trials=1")
    marked = [t for t in _study(tmp_path, "new").trials if "forked_from" in t.user_attrs]
    assert len(marked) == sum(trial.params["adapter.r"] == 16 for trial in old) > 0
    assert all(trial.params["adapter.use_dora"] is False for trial in marked)


def test_a_fork_of_other_data_or_of_nothing_is_refused(tmp_path: Path) -> None:
    """Losses on other data do not compare; a study that is not there cannot be forked."""
    _run(tmp_path, "old", "hydra.sweeper.n_trials=1")
    with pytest.raises(StudyMismatch, match=r"cannot be forked: .*\n    data digest"):
        _run(tmp_path, "new", "data.train=other.jsonl", "hydra.sweeper.fork_of=old")
    with pytest.raises(StudyMismatch, match="fork_of=nope: there is no such study"):
        _run(tmp_path, "other", "hydra.sweeper.fork_of=nope")


def test_changed_costs_are_another_question(tmp_path: Path) -> None:
    """Adding an objective under the same name is refused, and the message offers the fork."""
    _run(tmp_path, "one", "hydra.sweeper.n_trials=1")
    with pytest.raises(StudyMismatch) as caught:
        _run(tmp_path, "one", "hydra.sweeper.costs=[parameters/trainable]")
    assert "costs: none then, parameters/trainable now" in str(caught.value)
    assert "hydra.sweeper.study_name=one_2 hydra.sweeper.fork_of=one" in str(caught.value)


def test_an_arm_that_searches_its_quantization_is_not_called_by_one_of_them(
    tmp_path: Path,
) -> None:
    """quantization=nf4,none: the method is LoRA or QLoRA, whichever the best is."""
    arm = _lora(tmp_path, "both", "quantization=nf4,none", "hydra.sweeper.n_trials=1")
    assert arm.method == "LoRA or QLoRA"


def test_steps_are_drawn_without_rounding_errors(tmp_path: Path) -> None:
    """range(0.0, 0.35, 0.05): the trial gets 0.15, not 0.15000000000000002."""
    arm = _lora(
        tmp_path,
        "steps",
        *("sampler=grid", RATE.replace("tag(log,interval(3e-4,3e-2))", "1e-3"), *FEW[:2]),
        *("adapter.r=8", "training.warmup_ratio=range(0.0, 0.35, 0.05)", "workers.fake.steps=2"),
    )
    ratios = sorted(float(str(trial.params["training.warmup_ratio"])) for trial in arm.trials)
    assert ratios == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    assert {trial.state for trial in _study(tmp_path, "steps").trials} == {TrialState.COMPLETE}
