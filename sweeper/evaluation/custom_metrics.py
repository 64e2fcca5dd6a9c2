"""The user's own metrics: named functions of (prompts, predictions, references) that return a number."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sweeper.config.settings import EvaluationSettings
from sweeper.core.errors import ConfigError

Function = Callable[[list[str], list[str], list[str]], float]


@dataclass(frozen=True)
class CustomMetric:
    """One function, as `evaluation.metrics` names it; its value is the metric `eval/<name>`."""

    name: str
    target: str
    function: Function

    def __call__(
        self, prompts: Sequence[str], predictions: Sequence[str], references: Sequence[str]
    ) -> float:
        """Judge the answers.

        Raises:
            ConfigError: the function fails, or gives something other than a finite number.
        """
        try:
            value = float(self.function(list(prompts), list(predictions), list(references)))
        except Exception as error:  # whatever a user's function raises is the user's to read
            raise self._problem(f"failed with {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise self._problem(f"gave {value} for {len(predictions)} answers, no finite number")
        return value

    def _problem(self, text: str) -> ConfigError:
        return ConfigError([f"evaluation.metrics.{self.name}={self.target}: {text}"])


def custom_metrics(settings: EvaluationSettings) -> dict[str, CustomMetric]:
    """Import what `evaluation.metrics` names; the settings have checked the list of allowed modules.

    Raises:
        ConfigError: modules that cannot be imported and names that are no functions, all at once.
    """
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


def _imported(target: str) -> Function:
    module, _, name = target.partition(":")
    function: object = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function")
    return function
