"""The user's own metrics: which may be imported, and what they may return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeper.config.settings import EvaluationSettings, validate
from sweeper.core.errors import ConfigError
from sweeper.evaluation.custom_metrics import custom_metrics, measure
from tests.conftest import make_settings

CODE = """
import math

NUMBER = 3

def words(prompts, predictions, references):
    assert len(prompts) == len(predictions) == len(references)
    return sum(len(text.split()) for text in predictions) / len(predictions)

def nothing(prompts, predictions, references):
    return math.nan

def broken(prompts, predictions, references):
    raise KeyError("label")

def text(prompts, predictions, references):
    return "good"
"""


@pytest.fixture(autouse=True)
def users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the user's, importable as it would be beside their data."""
    folder = tmp_path / "my_metrics"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "answers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


def evaluation(
    metrics: dict[str, str], modules: list[str], num_examples: int = 4
) -> EvaluationSettings:
    """Evaluation settings with the user's metrics."""
    document: dict[str, Any] = make_settings().evaluation.model_dump()
    document |= {"metrics": metrics, "metric_modules": modules}
    document["generation"]["num_examples"] = num_examples
    return validate(EvaluationSettings, document, "evaluation")


@pytest.mark.parametrize("allowed", ["my_metrics", "my_metrics.answers"])
def test_a_function_judges_the_answers(allowed: str) -> None:
    """It gets prompts, predictions and references, and its number is the metric."""
    (metric,) = custom_metrics(
        evaluation({"brevity": "my_metrics.answers:words"}, [allowed])
    ).values()
    assert metric(["p", "q"], ["one two", "three four five six"], ["r", "s"]) == 3.0


@pytest.mark.parametrize("allowed", [[], ["my_metric"], ["my_metrics.answers.words"], ["answers"]])
def test_a_module_outside_the_list_is_never_imported(allowed: list[str]) -> None:
    """The allow-list names modules and packages, not beginnings of their names."""
    with pytest.raises(
        ConfigError, match=r"module my_metrics\.answers is not among .*Add it there"
    ):
        evaluation({"brevity": "my_metrics.answers:words"}, allowed)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_metrics.absent:words", "No module named"),
        ("my_metrics.answers:absent", "no attribute 'absent'"),
        ("my_metrics.answers:NUMBER", "NUMBER is a int, not a function"),
    ],
)
def test_what_is_no_function_is_named(target: str, message: str) -> None:
    """All wrong targets are named at once, each with its key."""
    settings = evaluation({"one": target, "two": target}, ["my_metrics"])
    with pytest.raises(ConfigError, match=message) as caught:
        custom_metrics(settings)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "evaluation.metrics.one",
        "evaluation.metrics.two",
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "returned nan for 1 answers"),
        ("broken", "failed with KeyError: 'label'"),
        ("text", "failed with ValueError"),
    ],
)
def test_a_function_must_give_a_finite_number(function: str, message: str) -> None:
    """NaN, text and exceptions are errors that name the metric, never a value."""
    settings = evaluation({"mine": f"my_metrics.answers:{function}"}, ["my_metrics"])
    with pytest.raises(ConfigError, match=rf"evaluation\.metrics\.mine=.*{message}"):
        custom_metrics(settings)["mine"](["p"], ["a"], ["b"])


def test_a_metric_that_fails_leaves_the_others_their_values() -> None:
    """Each has its value, or the reason why it has none."""
    functions = {name: f"my_metrics.answers:{name}" for name in ("broken", "words", "nothing")}
    metrics = custom_metrics(evaluation(functions, ["my_metrics"]))
    values, failures = measure(metrics, ["p"], ["one two"], ["r"])
    assert values == {"eval/words": 2.0}
    assert list(failures) == ["eval/broken", "eval/nothing"]
    assert "KeyError" in failures["eval/broken"]


@pytest.mark.parametrize(
    ("metrics", "num_examples", "message"),
    [
        ({"rouge1": "my_metrics.answers:words"}, 4, "eval/rouge1 exists"),
        ({"mine": "my_metrics.answers:words"}, 0, "generates none"),
        ({"mine": "my_metrics.answers"}, 4, "mine"),
        ({"Not A Name": "my_metrics.answers:words"}, 4, "Not A Name"),
    ],
)
def test_metrics_that_cannot_work_are_refused_before_training(
    metrics: dict[str, str], num_examples: int, message: str
) -> None:
    """A taken name, nothing to judge, no function name, no metric name."""
    with pytest.raises(ConfigError, match=message):
        evaluation(metrics, ["my_metrics"], num_examples)
