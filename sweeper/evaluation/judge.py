"""The one evaluator: the same figures, computed the same way, for base, LoRA, merged and full models.

Knows how a model is judged; knows neither where it comes from nor what is done with the figures.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from sweeper.config.settings import LOSS_METRICS, EvaluationSettings
from sweeper.core.errors import ConfigError
from sweeper.data.tokens import EncodedPrompt, PaddingCollator, Tokens
from sweeper.evaluation.answer_lengths import length_metrics
from sweeper.evaluation.custom_metrics import CustomMetric, custom_metrics
from sweeper.evaluation.generation import GeneratedAnswer, generate
from sweeper.evaluation.token_loss import LossSum, evaluate_examples, target_bytes, total

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IMPLAUSIBLE_PERPLEXITY = 1.5
"""Llama 2 70B has 3.32 a token on WikiText-2 (Lin et al. 2023, AWQ, table 4); well below, look again."""


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts to be answered and what was expected, of one length and order."""

    prompts: Sequence[str]
    prompt_ids: Sequence[Sequence[int]]
    references: Sequence[str]
    end_token_ids: frozenset[int] = frozenset()
    """What ends an answer besides the model's and the tokenizer's own end tokens."""

    @classmethod
    def of(cls, encoded: Sequence[EncodedPrompt]) -> HeldOutPrompts | None:
        """From what the data stages encoded; None if there is nothing to answer (plain texts)."""
        if not encoded:
            return None
        return cls(
            [prompt.text for prompt in encoded],
            [prompt.input_ids for prompt in encoded],
            [prompt.reference for prompt in encoded],
            frozenset(prompt.end_token_id for prompt in encoded),
        )

    def sample(self, count: int, seed: int) -> HeldOutPrompts | None:
        """At most `count` of them, drawn by the seed; None if that is none at all."""
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
    """What one model is worth on one set of examples."""

    metrics: Mapping[str, float]
    """Flat, by name: eval/loss, eval/rougeL, eval/<the user's>, …"""
    examples: Sequence[LossSum]
    """The loss of each judged row, for paired comparisons of two models."""
    answers: Sequence[GeneratedAnswer] = ()
    warnings: Sequence[str] = ()

    def value(self, metric: str) -> float:
        """The objective's value.

        Raises:
            ConfigError: the metric was not measured; no other stands in for it.
        """
        if metric not in self.metrics:
            known = ", ".join(sorted(self.metrics))
            raise ConfigError([f"objective.metric={metric}: not measured; measured were {known}"])
        return self.metrics[metric]


@dataclass(frozen=True)
class ModelJudge:
    """Judges any model of one tokenizer on fixed rows and, if there are any, fixed prompts."""

    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Tokens]
    row_bytes: Sequence[int]
    held_out: HeldOutPrompts | None
    settings: EvaluationSettings
    custom: Mapping[str, CustomMetric]
    seed: int
    compute_dtype: torch.dtype = torch.float32
    chunk_size: int | None = None

    def __call__(self, model: PreTrainedModel | PeftModel) -> Judgement:
        """Judge a model as it stands; its mode and configs are left as they were.

        Raises:
            ConfigError: prompts do not fit the model, or a metric of the user's fails.
        """
        examples = evaluate_examples(
            model,
            self.rows,
            PaddingCollator(self.tokenizer.pad_token_id),
            self.settings.per_device_eval_batch_size,
            self.compute_dtype,
            self.chunk_size,
            self.row_bytes,
        )
        judgement = Judgement(loss_metrics(total(examples)), examples)
        return judgement if self.held_out is None else self._with_answers(model, judgement)

    def _with_answers(self, model: PreTrainedModel | PeftModel, judgement: Judgement) -> Judgement:
        from sweeper.evaluation.rouge import rouge

        held_out, settings = self.held_out, self.settings
        assert held_out is not None
        generation = settings.generation
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
        own = {
            f"eval/{name}": metric(held_out.prompts, written.texts, held_out.references)
            for name, metric in self.custom.items()
        }
        return replace(
            judgement,
            metrics={
                **judgement.metrics,
                **{f"eval/{kind}": mean for kind, mean in scores.means.items()},
                **length_metrics(written.answers, held_out.references),
                "cost/generated_tokens_per_second": written.tokens_per_second,
                **own,
            },
            answers=written.answers,
            warnings=[scores.warning] if scores.warning else [],
        )

    def within_trial(self, metrics: Collection[str]) -> ModelJudge:
        """The judge of the looks inside a trial: capped rows, and answers only if a metric needs them.

        Itself, if that is the whole of it.

        Args:
            metrics: what those looks are asked for: what pruning, early stopping and the choice of
                the checkpoint go by.
        """
        held_out = None if set(metrics) <= set(LOSS_METRICS) else self.held_out
        kept = _sample(len(self.rows), self.settings.max_samples, self.seed)
        if len(kept) == len(self.rows) and held_out is self.held_out:
            return self
        return replace(
            self,
            rows=[self.rows[index] for index in kept],
            row_bytes=[self.row_bytes[index] for index in kept],
            held_out=held_out,
        )

    def sees_all_of(self, other: ModelJudge) -> bool:
        """Whether it judges another one's very rows and prompts, in batches of whatever size."""
        return self.rows is other.rows and self.held_out is other.held_out

    def halved(self) -> ModelJudge | None:
        """The same judge in batches half the size, which change no figure; None below one example."""
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
    """A judge on the whole split, with `generation.num_examples` of the held-out prompts.

    Args:
        seed: of the draws of examples, not of a trial (data.split_seed): every trial of a study, and
            every repeat of it, is judged on the same ones.

    Raises:
        ConfigError: a metric of the user's cannot be imported.
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
    """A split's loss under the names it is recorded by; targets without text have no bits per byte."""
    metrics = {"eval/loss": loss.mean, "eval/perplexity": loss.perplexity}
    return {**metrics, "eval/bits_per_byte": loss.bits_per_byte} if loss.bytes else metrics


def plausibility_warning(perplexity: float) -> str | None:
    """Words for the user if a perplexity is too good for text the model has not seen."""
    if perplexity >= IMPLAUSIBLE_PERPLEXITY:
        return None
    return (
        f"a validation perplexity of {perplexity:.4f} is implausibly low for running text: the "
        "validation split probably overlaps the training split (overlapping windows of one book, "
        "duplicates); check the data before trusting this figure"
    )


def _sample(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))
