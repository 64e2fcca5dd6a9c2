"""User-defined metrics: named functions of (prompts, predictions, references) that return a number."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sweeper.config.settings import EvaluationSettings
from sweeper.core.errors import ConfigError

Function = Callable[[list[str], list[str], list[str]], float]


class MetricFailed(ConfigError):
    """A user-defined metric has no value for the answers of this model."""


@dataclass(frozen=True)
class CustomMetric:
    """One function named in `evaluation.metrics`. Its value is recorded as the metric `eval/<name>`."""

    name: str
    target: str
    function: Function

    def __call__(
        self, prompts: Sequence[str], predictions: Sequence[str], references: Sequence[str]
    ) -> float:
        """Return the metric's value for the answers.

        Raises:
            MetricFailed: The function raises an exception, or returns anything but a finite number.
        """
        try:
            # Fresh lists, so that a function that changes its arguments affects no other metric.
            value = float(self.function(list(prompts), list(predictions), list(references)))
        except Exception as error:  # a user's function may raise anything
            raise self._problem(f"failed with {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise self._problem(
                f"returned {value} for {len(predictions)} answers, which is not a finite number"
            )
        return value

    def _problem(self, text: str) -> MetricFailed:
        return MetricFailed([f"evaluation.metrics.{self.name}={self.target}: {text}"])


def custom_metrics(settings: EvaluationSettings) -> dict[str, CustomMetric]:
    """Import the functions named in `evaluation.metrics`.

    Raises:
        ConfigError: Modules cannot be imported or names are not functions. The error lists all of them.
    """
    # The settings have already checked the modules against the allowed ones.
    problems: list[str] = []
    found: dict[str, CustomMetric] = {}
    for name, target in settings.metrics.items():
        try:
            found[name] = CustomMetric(name, target, _imported(target))
        except (ImportError, AttributeError, TypeError) as error:
            problems.append(f"evaluation.metrics.{name}={target}: {error}")
    if problems:
        raise ConfigError(problems)
    return found


def measure(
    metrics: Mapping[str, CustomMetric],
    prompts: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[str],
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the values of metrics, and why others have none, by their names `eval/<name>`."""
    values: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            values[f"eval/{name}"] = metric(prompts, predictions, references)
        except MetricFailed as failure:
            failures[f"eval/{name}"] = failure.problems[0]
    return values, failures


def _imported(target: str) -> Function:
    module, _, name = target.partition(":")
    function: object = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function
