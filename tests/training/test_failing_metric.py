"""A user's metric that fails costs its own value. Only the objective's failure ends a trial."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sweeper.core.errors import ConfigError
from sweeper.core.outcome import Outcome
from sweeper.training.trial_runner import TransformersRunner
from tests.conftest import make_settings
from tests.training.conftest import RunTiny

CODE = """
import math

CALLS = []

def broken(prompts, predictions, references):
    raise KeyError("label")

def nothing(prompts, predictions, references):
    return math.nan

def late(prompts, predictions, references):
    CALLS.append(1)
    if len(CALLS) > FINE:
        raise ValueError("no number in this answer")
    return 1.0 / len(CALLS)
"""
ANSWERS = ("evaluation.generation.num_examples=2", "evaluation.generation.max_new_tokens=2")


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """Overrides that add a function of the user's package as the metric `mine`."""
    monkeypatch.syspath_prepend(tmp_path)
    module = f"metrics_of_{abs(hash(request.node.name))}"

    def overrides(function: str, fine: int = 0) -> list[str]:
        (tmp_path / f"{module}.py").write_text(f"FINE = {fine}\n{CODE}")
        return [
            *ANSWERS,
            f"evaluation.metric_modules=[{module}]",
            f"++evaluation.metrics.mine={module}:{function}",
        ]

    return overrides


@pytest.mark.slow
@pytest.mark.parametrize("function", ["broken", "nothing"])
def test_a_failing_metric_costs_its_own_value_and_a_warning(  # type: ignore[no-untyped-def]
    run_tiny: RunTiny, metric, function: str
) -> None:
    """The trial finishes with every other value; the log says why this one is missing."""
    outcome, losses, folder = run_tiny("t", *metric(function))
    assert outcome.cause == "finished", outcome.message
    assert len(losses) == 3
    assert math.isfinite(outcome.best_value or math.nan)
    assert "best/eval_mine" not in outcome.metrics
    assert "best/eval_rougeL" in outcome.metrics
    assert folder.adapter.is_dir()
    assert folder.log_text.read_text().count("eval/mine has no value") == 1


OBJECTIVE = ("objective.metric=eval/mine", "objective.direction=minimize", "pruner=none")


@pytest.mark.slow
@pytest.mark.parametrize("fine", [0, 1, 2])
def test_an_objective_that_fails_after_a_step_makes_the_point_infeasible(  # type: ignore[no-untyped-def]
    run_tiny: RunTiny, metric, fine: int
) -> None:
    """A trial that has trained is not refused, whichever evaluation fails."""
    outcome, _, _ = run_tiny("t", *metric("late", fine), *OBJECTIVE)
    assert outcome.cause == "diverged"
    assert outcome.steps > 0
    assert "no number in this answer" in str(outcome.message)


@pytest.mark.slow
def test_the_artifact_is_stored_before_the_last_evaluation_can_fail(  # type: ignore[no-untyped-def]
    run_tiny: RunTiny, metric
) -> None:
    """The whole split is judged once more at the end, after a sample was judged while training."""
    outcome, _, folder = run_tiny("t", *metric("late", 3), *OBJECTIVE, "evaluation.look_rows=1")
    assert outcome.cause == "diverged"
    assert (folder.adapter / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_an_error_after_a_step_is_not_a_refusal(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that have trained a step were possible."""

    def refuse(*_: object) -> Outcome:
        raise ConfigError(["too late"])

    monkeypatch.setattr("sweeper.training.train_trial._outcome", refuse)
    outcome, _, _ = run_tiny("t")
    assert outcome.cause == "error"
    assert "too late" in str(outcome.message)


@pytest.mark.slow
def test_an_objective_that_fails_on_the_untuned_base_is_refused_before_training(  # type: ignore[no-untyped-def]
    tiny_base: Path, rows_file: Path, metric
) -> None:
    """Every trial would fail, so no trial begins."""
    settings = make_settings(
        *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
        *metric("broken"),
        *OBJECTIVE,
    )
    with pytest.raises(ConfigError, match="failed with KeyError"):
        TransformersRunner(threads=1).probe(settings.trial)
