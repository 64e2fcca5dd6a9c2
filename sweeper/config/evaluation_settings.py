"""Settings of `evaluation` and `objective`, and the better direction of each metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sweeper.config.data_settings import OneSource, sources
from sweeper.config.section import Positive, SettingsSection
from sweeper.core.outcome import ServeForm

LOSS_METRICS = {
    "eval/loss": "minimize",
    "eval/perplexity": "minimize",
    "eval/bits_per_byte": "minimize",
}
ROUGE_METRICS = {
    "eval/rouge1": "maximize",
    "eval/rouge2": "maximize",
    "eval/rougeL": "maximize",
}
SCORED_METRICS = ("eval/bits_per_byte", *ROUGE_METRICS)
"""Metrics other than the loss that are made of a score of each example."""
DIRECTIONS: dict[str, str] = {**LOSS_METRICS, **ROUGE_METRICS}
"""Metrics that a trial can be judged by, with the better direction. A user adds `eval/<name>`."""


def metric_words(metric: str) -> str:
    """Return a metric's name for running text and column heads: eval loss, eval rougeL."""
    return metric.replace("/", " ")


class GenerationSettings(SettingsSection):
    """Greedy answers to held-out prompts, for ROUGE, lengths and the user's metrics."""

    num_examples: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive
    batch_size: Positive


class QualitativePrompt(SettingsSection):
    """A qualitative prompt that the base and the tuned model answer."""

    category: str = Field(min_length=1)
    prompt: str = Field(min_length=1)


class GeneralTextSettings(SettingsSection):
    """Text unrelated to the task. The change of its loss measures what a fine-tune forgot."""

    source: OneSource | None
    """`embedded`, a file, a folder, a URL or a hub data set of plain text. null: not measured."""
    tokens: Positive
    window: Annotated[int, Field(ge=8)]
    """Tokens of each window that is judged independently."""

    @model_validator(mode="after")
    def _plain_text_of_one_source(self) -> GeneralTextSettings:
        for source in sources(self.source):
            if source.weight is not None or source.format is not None:
                raise ValueError(
                    f"source={source.path}: general text is plain text of one source. Leave its "
                    "weight and format out"
                )
        return self


class EvaluationSettings(SettingsSection):
    """Settings that decide how every model is judged, tuned or not."""

    per_device_eval_batch_size: Positive
    look_rows: Positive | None
    """Rows of the sample that evaluations during a trial look at, or null for the whole split."""
    over_length: Literal["drop", "truncate", "refuse"]
    """What happens to judged rows that are longer than the model's positions."""
    serve_as: ServeForm
    """The form of a LoRA winner that the verdict is about. The other forms are judged beside it."""
    generation: GenerationSettings
    general_text: GeneralTextSettings
    rouge_tokenizer: Literal["ascii", "unicode"]
    prompts: list[QualitativePrompt]
    metrics: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")],
        Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")],
    ]
    # modules that `metrics` may import, which a file of somebody else must not name
    metric_modules: list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")]]

    def halved(self) -> Self | None:
        """Return the settings with half the batch sizes, which change no figure, or None below one
        example.
        """
        size, generation = self.per_device_eval_batch_size, self.generation
        if size == 1 and generation.batch_size == 1:
            return None
        smaller = generation.model_copy(update={"batch_size": max(1, generation.batch_size // 2)})
        changes = {"per_device_eval_batch_size": max(1, size // 2), "generation": smaller}
        return self.model_copy(update=changes)

    @model_validator(mode="before")
    @classmethod
    def _from_earlier_versions(cls, section: object) -> object:
        """Read the keys that trials of earlier versions have in their config.yaml."""
        if not isinstance(section, Mapping):
            return section
        found = dict(section)
        if found.get("rouge_path", ...) is None:  # null was its default
            del found["rouge_path"]
        if "max_samples" in found:
            found.setdefault("look_rows", found.pop("max_samples"))
        return found

    @model_validator(mode="after")
    def _metrics_are_allowed(self) -> EvaluationSettings:
        for name, target in self.metrics.items():
            module = target.partition(":")[0]
            if f"eval/{name}" in DIRECTIONS:
                raise ValueError(f"metrics.{name}={target}: eval/{name} exists. Take another name")
            if not any(f"{module}.".startswith(f"{allowed}.") for allowed in self.metric_modules):
                raise ValueError(
                    f"metrics.{name}={target}: module {module} is not among those that may be "
                    f"imported, evaluation.metric_modules={self.metric_modules}. Add it there if you "
                    "trust its code"
                )
        if self.metrics and self.generation.num_examples == 0:
            raise ValueError(
                f"metrics={sorted(self.metrics)} judge generated answers, and "
                "evaluation.generation.num_examples=0 generates none. Set it to 1 or more"
            )
        return self


class Objective(SettingsSection):
    """The objective of a study: the metric that chooses checkpoint, best trial and verdict."""

    metric: str
    direction: Literal["minimize", "maximize"]
    pruning_metric: str | None

    @model_validator(mode="after")
    def _better_is_better(self) -> Objective:
        better = DIRECTIONS.get(self.metric, self.direction)
        if better != self.direction:
            raise ValueError(
                f"direction={self.direction}: for {self.metric} better means {better}. Write that"
            )
        return self

    @property
    def is_costly(self) -> bool:
        """True if every evaluation inside a trial would have to generate answers."""
        return self.metric not in LOSS_METRICS

    @property
    def judged_while_training(self) -> str:
        """The metric that pruning and early stopping use."""
        return self.pruning_metric or ("eval/loss" if self.is_costly else self.metric)

    @property
    def pruning_direction(self) -> str:
        """The better direction of `judged_while_training`."""
        return DIRECTIONS.get(self.judged_while_training, self.direction)

    @property
    def unit(self) -> str:
        """The metric's unit: nats for eval/loss, otherwise none."""
        return "nats" if self.metric == "eval/loss" else ""

    def gain(self, value: float, over: float) -> float:
        """Return by how much one value is better than another. Negative means worse."""
        return over - value if self.direction == "minimize" else value - over

    def order(self, value: float) -> float:
        """Return a key that sorts values of the metric, the best first."""
        return value if self.direction == "minimize" else -value
