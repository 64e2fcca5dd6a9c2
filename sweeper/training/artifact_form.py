"""Store with a model what other programs need to use it as it was trained and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.config.settings import TrialSettings
from sweeper.core.paths import write_atomic
from sweeper.core.trained_form import TRAINED_FORM, TrainedForm
from sweeper.evaluation.generation import greedy_config
from sweeper.modeling.hardware import dtype_name
from sweeper.modeling.model_source import hub_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from sweeper.data.served_prompt import ServedPrompt
    from sweeper.modeling.base_model import LoadedBase
    from sweeper.training.prepared_data import PreparedData


@dataclass(frozen=True)
class ArtifactForm:
    """The form of a model, its prompts, and the config by which it generates."""

    form: TrainedForm
    prompt: ServedPrompt
    generation: GenerationConfig
    folder: Path
    """Folder of the base's files on this machine."""

    def save(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write tokenizer, generation config and form into a stored model's folder."""
        self.prompt.tokenizer(tokenizer).save_pretrained(str(folder))
        self.generation.save_pretrained(str(folder))
        write_atomic(folder / TRAINED_FORM, self.form.model_dump_json(indent=2) + "\n")


def artifact_form(
    settings: TrialSettings, base: LoadedBase, prepared: PreparedData
) -> ArtifactForm:
    """Return the form of the models that are trained with these settings."""
    prompt, tokenizer = prepared.served, base.tokenizer
    folder = Path(base.model.config.name_or_path)
    generation = greedy_config(base.model, tokenizer, 1, prompt.end_token_ids)
    # vLLM would cut every answer of the server at a stored limit
    generation.max_new_tokens = None
    generation.bos_token_id = tokenizer.bos_token_id
    name = hub_name(settings.model, folder)
    form = TrainedForm(
        base=name,
        revision=None if name is None else base.commit or settings.model.revision,
        base_digest=base.digest,
        architecture=type(base.model).__name__,
        quantization=settings.quantization.kind,
        dtype=dtype_name(base.compute_dtype),
        max_length=prepared.train.max_length,
        template=prompt.name,
        template_problem=prompt.problem,
        chat_template_kwargs=settings.data.chat_template_kwargs,
        end_tokens=_names(tokenizer, generation.eos_token_id),
        tools=prompt.tools,
        data_digest=prepared.data_digest,
    )
    return ArtifactForm(form, prompt, generation, folder)


def _names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    # A base's generation config may name ids that its tokenizer does not have
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return tuple(name for name in names if name is not None)
