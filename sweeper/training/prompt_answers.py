"""Answer a trial's qualitative prompts before and after training, and store both side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sweeper.config.settings import TrialSettings
from sweeper.core.paths import TrialFolder, write_atomic
from sweeper.evaluation.generation import generate
from sweeper.evaluation.sample_answers import as_json, as_markdown, pair_answers
from sweeper.training.prepared_data import PreparedData

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sweeper.modeling.base_model import LoadedBase


class PromptAnswers:
    """The prompts of `evaluation.prompts`, tokenized for one base. Without prompts it does nothing."""

    def __init__(self, settings: TrialSettings, prepared: PreparedData, base: LoadedBase) -> None:
        self._evaluation = settings.evaluation
        self._base = base
        self._prompts = prepared.prompts(settings)

    def answers(self, model: PreTrainedModel | PeftModel) -> list[str]:
        """Return the model's greedy answers in the order of the prompts."""
        if not self._prompts:
            return []
        generation = self._evaluation.generation
        return generate(
            model,
            self._base.tokenizer,
            [prompt.input_ids for prompt in self._prompts],
            generation.max_new_tokens,
            generation.batch_size,
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
