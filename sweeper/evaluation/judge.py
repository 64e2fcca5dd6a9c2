"""Evaluate base, LoRA, merged and full models on held-out rows and prompts, with the same metrics.

Does not know where a model comes from or what the metrics are used for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from sweeper.config.settings import LOSS_METRICS, EvaluationSettings
from sweeper.core.errors import ConfigError
from sweeper.core.outcome import ANSWER_RATE, ANSWERING_SECONDS, ExampleScores
from sweeper.core.stage_words import stage
from sweeper.data.padding_free import batch_collator
from sweeper.data.tokens import EncodedPrompt, Tokens
from sweeper.evaluation.answer_lengths import length_metrics
from sweeper.evaluation.custom_metrics import (
    CustomMetric,
    MetricFailed,
    custom_metrics,
    measure,
)
from sweeper.evaluation.generation import GeneratedAnswer, generate
from sweeper.evaluation.judgement_readers import JudgementReader
from sweeper.evaluation.token_loss import LossSum, evaluate_examples, target_bytes, total

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMPLAUSIBLE_PERPLEXITY = 1.5
"""Perplexity per token below which a leak between the splits is more likely than a good model.

For comparison: Llama 2 70B has 3.32 on WikiText-2 (Lin et al. 2023, AWQ, table 4).
"""


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts to answer and their references, as sequences of equal length and order."""

    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    references: Sequence[str]
    end_token_ids: frozenset[int] = frozenset()
    """Ids that end an answer in addition to the end tokens of model and tokenizer."""

    @classmethod
    def of(cls, encoded: Sequence[EncodedPrompt]) -> HeldOutPrompts | None:
        """Collect encoded prompts. Return None if there are none, as for plain text."""
        if not encoded:
            return None
        return cls(
            [prompt.text for prompt in encoded],
            [prompt.input_ids for prompt in encoded],
            [prompt.reference for prompt in encoded],
            frozenset(prompt.end_token_id for prompt in encoded),
        )

    def sample(self, count: int, seed: int) -> HeldOutPrompts | None:
        """Draw at most `count` prompts with a seed. Return None if no prompt is drawn."""
        kept = _sample(len(self.prompts), count, seed)
        if not kept:
            return None
        return HeldOutPrompts(
            [self.prompts[index] for index in kept],
            [self.prompt_ids[index] for index in kept],
            [self.references[index] for index in kept],
            self.end_token_ids,
        )


@dataclass(frozen=True)
class Judgement:
    """Metrics of one model on one set of examples."""

    metrics: Mapping[str, float]
    """Metrics by name: eval/loss, eval/rougeL, eval/<name of a user-defined metric>, …"""
    examples: Sequence[LossSum]
    """Loss of each row, for paired comparisons of two models."""
    reader: JudgementReader
    """Part of the study that the judgement was made for."""
    answers: Sequence[GeneratedAnswer] = ()
    warnings: Sequence[str] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reasons why user-defined metrics have no value, by the metrics' names."""
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Score of each answer, by the metrics that are means of such scores: eval/rouge1, …"""

    def scores_of(self, metric: str) -> ExampleScores | None:
        """Return a metric on each example, or None if it is the loss or not made of examples."""
        if metric in self.scores:
            values = tuple(self.scores[metric])
            return ExampleScores(metric=metric, values=values, weights=(1.0,) * len(values))
        if metric != "eval/bits_per_byte":
            return None
        # A target of special tokens only has no bytes, and no share in the bits per byte.
        known = [loss for loss in self.examples if loss.bytes]
        return ExampleScores(
            metric=metric,
            values=tuple(loss.nll / math.log(2) for loss in known),
            weights=tuple(float(loss.bytes or 0) for loss in known),
        )

    def value(self, metric: str) -> float:
        """Return the value of the objective's metric.

        Raises:
            MetricFailed: The user's function raised an exception, or returned no finite number.
            ConfigError: The metric was not measured.
        """
        # No other metric is substituted: a study would silently optimise something else.
        if metric in self.failures:
            raise MetricFailed([self.failures[metric]])
        if metric not in self.metrics:
            known = ", ".join(sorted(self.metrics))
            raise ConfigError(
                [f"objective.metric={metric}: not measured. The measured metrics are {known}."]
            )
        return self.metrics[metric]


@dataclass(frozen=True)
class ModelJudge:
    """Evaluate models of one tokenizer on fixed rows and, if there are any, fixed prompts."""

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Tokens]
    row_bytes: Sequence[int]
    held_out: HeldOutPrompts | None
    settings: EvaluationSettings
    custom: Mapping[str, CustomMetric]
    seed: int
    compute_dtype: torch.dtype = torch.float32
    chunk_size: int | None = None
    groups: Sequence[int] = ()
    """Number of the group that each row belongs to (data.group_by). Empty if rows are not grouped."""

    def __call__(self, model: PreTrainedModel | PeftModel, reader: JudgementReader) -> Judgement:
        """Evaluate a model without changing its mode or configs.

        Args:
            model: Model to evaluate.
            reader: Part of the study that reads the judgement.

        Raises:
            ConfigError: The prompts do not fit the model's positions.
        """
        with stage(f"judging {reader.subject}"):
            examples = evaluate_examples(
                model,
                self.rows,
                batch_collator(model, self.tokenizer.pad_token_id),
                self.settings.per_device_eval_batch_size,
                self.compute_dtype,
                self.chunk_size,
                self.row_bytes,
            )
        judgement = Judgement(loss_metrics(total(examples)), examples, reader)
        return self.with_answers(model, judgement)

    def with_answers(self, model: PreTrainedModel | PeftModel, judgement: Judgement) -> Judgement:
        """Return a judgement of the model's losses with its answers, if there are prompts to answer."""
        if self.held_out is None:
            return judgement
        # Imports nltk, which only generated answers need
        from sweeper.evaluation.rouge import (
            rouge,
        )

        held_out, settings = self.held_out, self.settings
        generation = settings.generation
        with stage(f"judging {judgement.reader.subject}"):
            written = generate(
                model,
                self.tokenizer,
                held_out.prompt_ids,
                generation.max_new_tokens,
                generation.batch_size,
                self.compute_dtype,
                held_out.end_token_ids,
            )
        scores = rouge(written.texts, held_out.references, settings.rouge_tokenizer)
        own, failures = measure(self.custom, held_out.prompts, written.texts, held_out.references)
        return replace(
            judgement,
            metrics={
                **judgement.metrics,
                **{f"eval/{kind}": mean for kind, mean in scores.means.items()},
                **length_metrics(written.answers, held_out.references),
                ANSWER_RATE: written.tokens_per_second,
                ANSWERING_SECONDS: written.seconds,
                **own,
            },
            answers=written.answers,
            scores={f"eval/{kind}": values for kind, values in scores.examples.items()},
            warnings=[*([scores.warning] if scores.warning else []), *failures.values()],
            failures=failures,
        )

    def within_trial(self, metrics: Collection[str]) -> ModelJudge:
        """Return the judge for evaluations during training, which must be cheap.

        They look at a sample of evaluation.look_rows rows, the same for every trial, and answers are
        generated only if one of the metrics needs them.

        Args:
            metrics: Metrics that pruning, early stopping and the choice of the checkpoint use.
        """
        held_out = None if set(metrics) <= set(LOSS_METRICS) else self.held_out
        kept = draw_rows(len(self.rows), self.groups, self.settings.look_rows, self.seed)
        if len(kept) == len(self.rows):
            return replace(self, held_out=held_out)
        return replace(
            self,
            rows=[self.rows[index] for index in kept],
            row_bytes=[self.row_bytes[index] for index in kept],
            held_out=held_out,
            groups=[self.groups[index] for index in kept] if self.groups else (),
        )

    def judges_same_rows(self, other: ModelJudge) -> bool:
        """Return True if both judges have the same rows. Prompts and batch sizes may differ."""
        return self.rows is other.rows

    def halved(self) -> ModelJudge | None:
        """Return this judge with half the batch size, or None if the batch is one example already."""
        # A smaller batch changes no metric, so evaluation can shrink the batch when memory runs out.
        smaller = self.settings.halved()
        return None if smaller is None else replace(self, settings=smaller)


def make_judge(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
    held_out: HeldOutPrompts | None,
    settings: EvaluationSettings,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> ModelJudge:
    """Return a judge on the whole split, with `generation.num_examples` of the held-out prompts.

    Args:
        tokenizer: Tokenizer of the base model.
        rows: Tokenized rows of the split.
        held_out: Prompts of the split, or None if there are none.
        settings: Evaluation settings.
        seed: Seed for drawing examples: data.split_seed, not the trial's seed, so that all trials and
            their repeats over seeds are evaluated on the same examples.
        compute_dtype: Data type of autocast. torch.float32 disables autocast.
        chunk_size: Number of tokens whose logits are computed at a time, or None for all at once.

    Raises:
        ConfigError: A user-defined metric cannot be imported.
    """
    return ModelJudge(
        tokenizer,
        rows,
        target_bytes(rows, tokenizer),
        held_out.sample(settings.generation.num_examples, seed) if held_out else None,
        settings,
        custom_metrics(settings),
        seed,
        compute_dtype,
        chunk_size,
    )


def loss_metrics(loss: LossSum) -> dict[str, float]:
    """Return the loss metrics of a split by name. Bits per byte need targets with text."""
    # bits_per_byte would divide by zero if all targets were special tokens.
    metrics = {"eval/loss": loss.mean, "eval/perplexity": loss.perplexity}
    return {**metrics, "eval/bits_per_byte": loss.bits_per_byte} if loss.bytes else metrics


def plausibility_warning(perplexity: float) -> str | None:
    """Return a warning if a perplexity is too low for text that the model has not seen, else None."""
    if perplexity >= IMPLAUSIBLE_PERPLEXITY:
        return None
    return (
        f"a validation perplexity of {perplexity:.4f} is implausibly low for running text. The "
        "validation split probably overlaps the training split (overlapping windows of one book, "
        "duplicates). Check the data before you trust this figure."
    )


def draw_rows(count: int, groups: Sequence[int], limit: int | None, seed: int) -> list[int]:
    """Return the sorted indices of a sample of rows, in which every group has its share.

    Args:
        count: Number of rows.
        groups: Group of each row, or empty if rows are not grouped.
        limit: Size of the sample, or None for all rows.
        seed: Seed of the draw.
    """
    if limit is None or limit >= count or not groups:
        return _sample(count, limit, seed)
    # Rows of one group are alike, so a plain draw could miss groups or take one too often. Every
    # so-many-th row in the order of the groups takes each group as often as its size asks for
    draw = random.Random(seed)
    place = {group: draw.random() for group in dict.fromkeys(groups)}
    order = sorted(range(count), key=lambda index: (place[groups[index]], draw.random()))
    start = draw.random()
    return sorted(order[int((start + index) * count / limit)] for index in range(limit))


def _sample(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    # Sorted, so that the sample keeps the order of the split.
    return sorted(random.Random(seed).sample(range(count), limit))
