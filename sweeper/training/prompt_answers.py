"""Answer a trial's qualitative prompts before and after training, and store both side by side."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from sweeper.config.settings import TrialSettings
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.evaluation.generation import generate
from sweeper.evaluation.sample_answers import as_json, as_markdown, pair_answers
from sweeper.training.micro_batch import halving
from sweeper.training.prepared_data import PreparedData
from sweeper.training.trial_costs import TrialCosts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sweeper.modeling.base_model import LoadedBase


class UntunedAnswers:
    """Answers of untuned bases to qualitative prompts, kept for all trials of a worker."""

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}
        """Answers by the digest of everything that decides them."""

    def of(self, prompts: PromptAnswers, model: PreTrainedModel) -> list[str]:
        """Return the answers of a base that no trial has changed, generated at the first call."""
        if prompts.digest not in self._known:
            self._known[prompts.digest] = prompts.answers(model)
        return self._known[prompts.digest]


class PromptAnswers:
    """The prompts of `evaluation.prompts`, tokenized for one base. Without prompts it does nothing."""

    def __init__(
        self, settings: TrialSettings, prepared: PreparedData, base: LoadedBase, costs: TrialCosts
    ) -> None:
        self._evaluation = settings.evaluation
        self._batch_size = settings.evaluation.generation.batch_size
        self._costs = costs
        self._base = base
        self._prompts = prepared.prompts(settings)
        # A quantized base answers otherwise than the same weights in full precision
        self._form = [settings.model.model_dump_json(), settings.quantization.model_dump_json()]

    @property
    def digest(self) -> str:
        """The sha256 over the base as it is loaded, the prompts and the rules of the generation."""
        base, generation = self._base, self._evaluation.generation
        parts = [
            [base.digest, base.config_digest, base.tokenizer_digest, str(base.compute_dtype)],
            self._form,
            [[list(prompt.input_ids), prompt.end_token_id] for prompt in self._prompts],
            # In bfloat16 the padding of a batch can decide between two tokens that are as likely
            [generation.max_new_tokens, generation.batch_size],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def answers(self, model: PreTrainedModel | PeftModel) -> list[str]:
        """Return the model's greedy answers in the order of the prompts.

        Answer half as many prompts at a time after each out of memory. The answers do not depend on it.
        """
        if not self._prompts:
            return []
        texts, self._batch_size = halving(
            lambda size: self._generate(model, size),
            self._batch_size,
            lambda size: size // 2 or None,
            self._costs.count_retry,
        )
        return texts

    def _generate(self, model: PreTrainedModel | PeftModel, batch_size: int) -> list[str]:
        generation = self._evaluation.generation
        return generate(
            model,
            self._base.tokenizer,
            [prompt.input_ids for prompt in self._prompts],
            generation.max_new_tokens,
            batch_size,
            self._base.compute_dtype,
            # Templates can end an answer with a token of their own, such as <|im_end|>
            {prompt.end_token_id for prompt in self._prompts},
        ).texts

    def write(self, untuned: list[str], tuned: list[str], folder: TrialFolder) -> None:
        """Write both models' answers to the trial's folder, as Markdown and as JSON."""
        if not self._prompts:
            return
        samples = pair_answers(self._evaluation.prompts, untuned, tuned)
        write_atomic(folder.samples, as_markdown(samples))
        text = json.dumps(as_json(samples), indent=2, ensure_ascii=False)
        write_atomic(folder.samples.with_suffix(".json"), text + "\n")
