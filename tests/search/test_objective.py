"""A study goes by the objective that its trials are worth, whichever way is better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from sweeper.commands.run_study import run_study
from sweeper.commands.run_trial import run_single
from sweeper.core.errors import ConfigError, StudyError, StudyMismatch
from sweeper.core.outcome import ArmBaseline
from sweeper.core.paths import TrialFolder
from sweeper.reporting.results import StudyResults, load_results
from sweeper.search.study import settings_as_json
from sweeper.search.study_plan import studies
from sweeper.workers.fake_runner import FakeRunner
from tests.conftest import make_settings

LORA = ("+experiment=lr_rank_sweep", "~hydra.sweeper.arms.full", "hydra.sweeper.study_name=s")
FAKE = ("workers=fake", "workers.engine=inline", "workers.fake.step_seconds=0.0", "tracking=none")
ONE_KEY = (
    *("adapter.r=8", "adapter.alpha_over_r=2", "training.warmup_ratio=0.03", "sampler=grid"),
    "hydra.sweeper.n_trials=5",
)
MLP = "adapter.target_modules=mlp"
ROUGE = ("objective=rougeL", "evaluation.generation.num_examples=4")
GOOD_LOSSES = "5e-3, 4e-3, 6e-3, 7e-3"
"""The rates around the fake trainer's best loss; its best ROUGE lies at 1.67e-3."""
RATES = f"training.learning_rate=choice({GOOD_LOSSES}, 1.5e-3)"


def _run(tmp_path: Path, *overrides: str) -> StudyResults:
    (plan,) = studies([*LORA, *FAKE, *ONE_KEY, MLP, f"output_dir={tmp_path}", *overrides])
    return run_study(plan)


def _study(tmp_path: Path) -> optuna.Study:
    storage = f"sqlite:///{tmp_path / 's' / 'study.db'}"
    return optuna.load_study(study_name="s/lora", storage=storage)


def test_the_highest_rouge_wins_though_its_loss_is_the_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The maximum leads the leaderboard, is Optuna's best, and every word is of ROUGE-L."""
    (arm,) = _run(tmp_path, *ROUGE, RATES, "pruner=none").arms
    values = [trial.value or 0.0 for trial in arm.trials]
    losses = [trial.metric("best/eval_loss") or 0.0 for trial in arm.trials]
    assert values == sorted(values, reverse=True)
    assert arm.best is arm.trials[0]
    assert arm.best.params["training.learning_rate"] == 1.5e-3
    assert losses[0] == max(losses)
    study = _study(tmp_path)
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.best_trial.number == arm.best.number
    output = capsys.readouterr().out
    assert "Untuned base: eval rougeL 0.1000" in output
    assert f"lora/0004 finished, eval rougeL {values[0]:.4f}" in output
    assert f"raises the untuned base's eval rougeL by {values[0] - 0.1:.3f}." in output
    report = (tmp_path / "s" / "report.md").read_text()
    assert "eval rougeL" in report
    assert "eval loss" not in report.partition("## Terms")[0]
    assert f"+{values[0] - 0.1:.4f}" in report


def test_results_carry_the_objective(tmp_path: Path) -> None:
    """results.json says what the values are, and read back the maximum is still the best."""
    results = _run(tmp_path, *ROUGE, RATES, "pruner=none")
    document = json.loads((tmp_path / "s" / "results.json").read_text())
    assert document["objective"] == {
        "metric": "eval/rougeL",
        "direction": "maximize",
        "pruning_metric": "eval/loss",
    }
    assert document["arms"]["lora"]["best"] == 4
    assert load_results("s", tmp_path).arms[0].best == results.arms[0].best


@pytest.mark.slow
def test_a_trial_is_pruned_by_its_loss_whatever_its_rouge(tmp_path: Path) -> None:
    """The last rate has the best ROUGE and the worst loss: pruned. Optuna is told negated losses."""
    slow = ("pruner=median", "workers.fake.step_seconds=0.03")
    (arm,) = _run(tmp_path, *ROUGE, RATES, *slow).arms
    causes = {trial.number: trial.outcome.cause for trial in arm.trials}
    assert causes == {**dict.fromkeys(range(4), "finished"), 4: "pruned"}
    told = [
        value for trial in _study(tmp_path).trials for value in trial.intermediate_values.values()
    ]
    assert told
    assert all(-4.5 <= value < -3.5 for value in told)


def test_infeasible_trials_are_worth_the_bases_rouge(tmp_path: Path) -> None:
    """Out of memory: the base's 0.1, a constraint, and never the best."""
    (arm,) = _run(tmp_path, *ROUGE, RATES, "pruner=none", "++workers.fake.plan={4:oom}").arms
    failed = _study(tmp_path).trials[4]
    assert (failed.state, failed.value) == (TrialState.COMPLETE, pytest.approx(0.1))
    assert failed.constraints == {"infeasible": 1.0}
    assert arm.best is not None
    assert arm.best.params["training.learning_rate"] == 4e-3


@pytest.mark.slow
def test_audits_count_in_the_objectives_direction(tmp_path: Path) -> None:
    """The trial that its loss would have stopped ends with the best ROUGE: a costly wrong kill."""
    (arm,) = _run(
        tmp_path,
        *(*ROUGE, RATES, "pruner=median", "workers.fake.step_seconds=0.03"),
        "hydra.sweeper.pruner.audit_fraction=1",
    ).arms
    assert arm.audit is not None
    assert (arm.audit.audited, arm.audit.wrong, arm.audit.costly) == (1, 1, 1)


@pytest.mark.slow
def test_a_plateau_is_of_the_objective(tmp_path: Path) -> None:
    """ROUGE that goes on rising is no plateau though the loss rises with it; one that falls is."""
    rule = ("pruner=none", "++hydra.sweeper.budget.plateau={trials: 2, min_improvement: 0.0001}")
    rising = "training.learning_rate=choice(7e-3, 6e-3, 5e-3, 4e-3, 3e-3)"
    assert len(_run(tmp_path / "up", *ROUGE, *rule, rising).arms[0].trials) == 5
    falling = "training.learning_rate=choice(3e-3, 4e-3, 5e-3, 6e-3, 7e-3)"
    assert len(_run(tmp_path / "down", *ROUGE, *rule, falling).arms[0].trials) == 3


def test_bits_per_byte_are_minimised_under_their_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another loss than nats per token: no unit is claimed for it."""
    (arm,) = _run(tmp_path, "objective.metric=eval/bits_per_byte", RATES, "pruner=none").arms
    assert arm.best is not None
    assert arm.best.params["training.learning_rate"] == 5e-3
    words = capsys.readouterr().out
    assert "lowers the untuned base's eval bits_per_byte by" in words
    assert "nats" not in words.replace("nats. There is no other arm", "")  # forgetting's own unit


def test_a_base_that_the_objective_does_not_measure_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its zero line nothing can be said: the error names what the base was measured by."""
    probed = FakeRunner.probe

    def without_rouge(runner: FakeRunner, *arguments: object) -> ArmBaseline:
        facts = probed(runner, *arguments)  # type: ignore[arg-type]
        return facts.model_copy(update={"base_metrics": {"eval/loss": 4.5, "cost/x": 1.0}})

    monkeypatch.setattr(FakeRunner, "probe", without_rouge)
    with pytest.raises(StudyError, match=r"objective.metric=eval/rougeL: .* It has eval/loss\.$"):
        _run(tmp_path, *ROUGE, RATES)


def test_a_single_trial_names_what_it_is_judged_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base by the objective, the evaluations by the metric that pruning goes by."""
    run_single(make_settings(*ROUGE, *FAKE), TrialFolder(tmp_path / "one"), "")
    output = capsys.readouterr().out
    assert "Untuned base: eval rougeL 0.1000" in output
    assert "step 20 of 20: eval loss 3." in output


def test_another_objective_is_another_question(tmp_path: Path) -> None:
    """Under the same name it is refused, and a fork takes no values of another metric either."""
    few = ("hydra.sweeper.n_trials=1", "evaluation.generation.num_examples=4", RATES)
    _run(tmp_path, *few)
    with pytest.raises(StudyMismatch, match=r'objective.metric: "eval/loss" then, "eval/rougeL"'):
        _run(tmp_path, *few, "objective=rougeL")
    with pytest.raises(StudyMismatch, match=r"cannot be forked: .*\n +objective.metric: "):
        _run(
            tmp_path,
            *(*few, "objective=rougeL", "hydra.sweeper.fork_of=s"),
            "hydra.sweeper.study_name=t",
        )


@pytest.mark.parametrize(
    "change",
    [
        *("artifacts.zip=true", "artifacts.merged=true", "training.logging_steps=3"),
        *("training.save_steps=7", "training.save_total_limit=3", "training.micro_batch=largest"),
        *("training.loss_chunk_size=7", "evaluation.generation.batch_size=7"),
        *("evaluation.per_device_eval_batch_size=7",),
    ],
)
def test_settings_that_change_no_value_are_no_other_question(change: str) -> None:
    """The same study goes on with another batch of evaluation or another thing stored."""
    (plain,), (changed,) = studies(LORA), studies([*LORA, change])
    assert plain.arms[0].settings != changed.arms[0].settings
    assert settings_as_json(plain.arms[0]) == settings_as_json(changed.arms[0])


@pytest.mark.parametrize("change", ["training.weight_decay=0.5", "evaluation.look_rows=7"])
def test_settings_that_change_a_value_are_another_question(change: str) -> None:
    """What decides a trial's value, or by what sample it is judged, is part of the question."""
    (plain,), (changed,) = studies(LORA), studies([*LORA, change])
    assert settings_as_json(plain.arms[0]) != settings_as_json(changed.arms[0])


def test_a_path_and_a_source_of_the_same_rows_are_the_same_question(
    tmp_path: Path, rows_file: Path
) -> None:
    """data.train as a mapping with another path: the data's digest decides, which the fake makes up."""
    copy = tmp_path / "copy.jsonl"
    shutil.copy(rows_file, copy)
    (path,) = studies([*LORA, f"data.train={rows_file}"])
    (source,) = studies([*LORA, f"++data.train={{path: {copy}, format: alpaca}}"])
    assert settings_as_json(path.arms[0]) == settings_as_json(source.arms[0])
    assert "data.template" in settings_as_json(path.arms[0])


def test_arms_share_the_objective() -> None:
    """Arms of two objectives could not be held against each other."""
    other = "objective.metric=eval/bits_per_byte"
    with pytest.raises(ConfigError, match=r"arm full: its objective \(eval/bits_per_byte\)"):
        studies(
            [
                "+experiment=lr_rank_sweep",
                f"hydra.sweeper.arms.full.overrides=['adapter=none','quantization=none','{other}']",
            ]
        )


def test_the_direction_is_the_objectives_own() -> None:
    """hydra.sweeper.direction is no key any more: objective.direction is."""
    with pytest.raises(ConfigError, match="the direction belongs to the objective"):
        studies([*LORA, "+hydra.sweeper.direction=minimize"])


def test_quantization_and_layers_are_searched() -> None:
    """Every way to hold the base and every way to name layers reaches a trial's settings."""
    (plan,) = studies(
        [
            *LORA,
            "quantization=choice(nf4,int8,none)",
            "adapter.layers_to_transform=null,last-1,0-1",
        ]
    )
    arm = plan.arms[0]
    for kind in ("nf4", "int8", "none"):
        for layers in (None, "last-1", "0-1"):
            point = {"quantization": kind, "adapter.layers_to_transform": layers}
            settings = arm.settings_at({**point, "training.learning_rate": 1e-3})
            assert settings.quantization.kind == kind
            assert settings.adapter.layers_to_transform == layers  # type: ignore[union-attr]


def test_models_are_searched_by_answers_but_not_pruned_by_a_loss_per_token() -> None:
    """ROUGE compares models of any tokenizer; eval/loss, by which it would be pruned, does not."""
    search = (*LORA, *ROUGE, "model.base_model=embedded,gpt2")
    with pytest.raises(ConfigError, match=r"objective.pruning_metric=eval/bits_per_byte"):
        studies(search)
    (plan,) = studies([*search, "objective.pruning_metric=eval/bits_per_byte"])
    assert "model.base_model" in plan.arms[0].space


def test_a_module_that_the_model_lacks_is_infeasible(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Found by the real runner when it attaches the adapter: refused, not failed; the rest trains."""
    (plan,) = studies(
        [
            *(*LORA, *ONE_KEY, "workers=inline", "tracking=none", f"output_dir={tmp_path}"),
            *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
            *("training.max_steps=2", "training.eval_steps=2", "training.learning_rate=1e-3"),
            *("space=tiny", "training=tiny", "evaluation=tiny", "data.max_length=128"),
            "adapter.target_modules=choice(attention,no_such_module)",
        ]
    )
    (arm,) = run_study(plan).arms
    outcomes = {trial.params["adapter.target_modules"]: trial.outcome for trial in arm.trials}
    assert outcomes["attention"].cause == "finished"
    assert outcomes["no_such_module"].cause == "refused"
    assert "no_such_module" in (outcomes["no_such_module"].message or "")
    refused = next(t for t in _study(tmp_path).trials if t.user_attrs["cause"] == "refused")
    assert refused.constraints == {"infeasible": 1.0}
    assert refused.value == pytest.approx(arm.base_value)
    assert arm.best is not None
    assert arm.best.outcome == outcomes["attention"]
