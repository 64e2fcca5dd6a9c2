"""Write the README.md of an artifact: a model card in the hub's format, made of settings and metrics.

PEFT's own card consists of placeholders and names a local folder as base_model, which the hub refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import sweeper
from sweeper.builtin import stand_ins
from sweeper.config.settings import EMBEDDED, LoraAdapter, TrialSettings, sources
from sweeper.core.loading_code import BaseLines, loading_code, prompting_code
from sweeper.core.outcome import LOOK_ROWS
from sweeper.core.plain_text import in_markdown, visible
from sweeper.core.redaction import redact
from sweeper.core.trained_form import TrainedForm
from sweeper.data.sources import describe_source, is_hub_id
from sweeper.training.training_log import describe_method

README = "README.md"
METRICS = {
    "eval/loss": ("loss", "Loss, nats per target token"),
    "eval/perplexity": ("perplexity", "Perplexity per target token"),
    "eval/rougeL": ("rouge", "ROUGE-L"),
}
"""Our metric -> the hub's metric and its label on the card."""
SERVED = "## As it is served"
LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(
    settings: TrialSettings,
    figures: Mapping[str, float],
    base_folder: Path,
    form: TrainedForm,
    *,
    merged: bool = False,
) -> str:
    """Return the model card as text. No folder of this machine is named, because cards are published.

    Args:
        settings: the settings of the training.
        figures: metrics of the stored checkpoint: eval/…, parameters/…, data/….
        base_folder: folder of the base's files, whose model card names its licence.
        form: the form that the model was trained in.
        merged: True for an adapter that was merged into its base.
    """
    licence = base_licence(base_folder)
    card = ArtifactCard(settings, figures, form, merged, licence)
    fields: dict[str, Any] = licence or {"license": "unknown"}
    data = ModelCardData(**card.metadata(), **fields)
    return f"---\n{data.to_yaml()}\n---\n\n{card.body()}"


def with_served(card: str, sentences: Sequence[str]) -> str:
    """Return a card with the losses of the model as it is served, in place of earlier ones."""
    head, use, rest = card.partition("\n## Use\n")
    head = head.partition(f"\n{SERVED}\n")[0]
    return f"{head}\n{SERVED}\n\n{in_markdown(' '.join(sentences))}\n{use}{rest}"


def base_licence(base_folder: Path) -> dict[str, str]:
    """Return the licence fields of the base's own model card, or {} if it has none."""
    card = base_folder / README
    if not card.is_file():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return {key: str(value) for key in LICENCE_KEYS if (value := data.get(key))}


def public_data(settings: TrialSettings) -> list[str]:
    """Return the hub data sets among the sources of the training rows."""
    paths = [source.path for source in sources(settings.data.train)]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path)))


def describe_data(settings: TrialSettings, form: TrainedForm) -> str:
    """Return the origin of the training rows without the name of any local file."""
    parts = [
        redact(describe_source(source)) if is_public(source.path) else "local data"
        for source in sources(settings.data.train)
    ]
    return f"{' + '.join(dict.fromkeys(parts))} (sha256 of all rows {form.data_digest[:12]})"


def is_public(path: str) -> bool:
    """Return True if a source has a name that means the same on another machine."""
    own = path == EMBEDDED or path.startswith(stand_ins.PREFIX)
    return own or is_hub_id(path) or ("://" in path and not path.startswith("file:"))


@dataclass(frozen=True)
class ArtifactCard:
    """The parts of one model card."""

    settings: TrialSettings
    figures: Mapping[str, float]
    form: TrainedForm
    merged: bool
    licence: Mapping[str, str]

    @property
    def is_adapter(self) -> bool:
        """True if the model needs its base."""
        return isinstance(self.settings.adapter, LoraAdapter) and not self.merged

    @property
    def title(self) -> str:
        """The method in words."""
        return f"{describe_method(self.settings)}{', merged into its base' if self.merged else ''}"

    def metadata(self) -> dict[str, Any]:
        """Return the fields that the hub reads."""
        data, rows = public_data(self.settings), describe_data(self.settings, self.form)
        whole = "merge" if self.merged else "finetune"
        adapted = ["qlora", "lora"] if self.settings.quantization.load_in_4bit else ["lora"]
        lora = isinstance(self.settings.adapter, LoraAdapter)
        return {
            "base_model": self.form.base,
            "base_model_relation": ("adapter" if self.is_adapter else whole)
            if self.form.base
            else None,
            "datasets": data or None,
            "library_name": "peft" if self.is_adapter else "transformers",
            "pipeline_tag": "text-generation",
            "tags": [*(adapted if lora else ()), "sweeper"],
            "model_name": f"{self.title} of {self.form.base or 'a local base model'}",
            "eval_results": [
                EvalResult(
                    task_type="text-generation",
                    dataset_type=data[0] if data else "custom",
                    dataset_name=f"{rows}, {_judged_rows(self.figures)}",
                    metric_type=metric,
                    metric_name=label,
                    metric_value=round(self.figures[name], 6),
                )
                for name, (metric, label) in METRICS.items()
                if name in self.figures
            ]
            or None,
        }

    def body(self) -> str:
        """Return the text below the fields."""
        rows = self.figures.get("data/train_rows")
        counted = "" if rows is None else f", {rows:,.0f} rows after cleaning"
        parts = [
            f"# {self.title}",
            f"Trained on {in_markdown(self.form.base_words)} by sweeper {sweeper.__version__}.",
            *self._figures(),
            "## Training",
            _table({name: value for name, value in self._trained().items() if value}),
            "## Data",
            f"{in_markdown(describe_data(self.settings, self.form))}{counted}.",
            "## Use",
            self._usage(),
            "## Licence",
            f"{self._terms()}. Check the terms of the training data as well.",
        ]
        return "\n\n".join(parts) + "\n"

    def _figures(self) -> list[str]:
        found = {
            label: self.figures[name]
            for name, (_, label) in METRICS.items()
            if name in self.figures
        }
        if not found:
            return []
        judged = (
            "The merged model, evaluated on the validation split."
            if self.merged
            else f"The stored checkpoint, evaluated on the {_judged_rows(self.figures)} that chose it."
        )
        return [
            "## Figures",
            f"{judged} Perplexity is exp(loss).",
            _table({label: f"{value:.4f}" for label, value in found.items()}),
        ]

    def _trained(self) -> dict[str, str]:
        training, form = self.settings.training, self.form
        variables = json.dumps(form.chat_template_kwargs) if form.chat_template_kwargs else ""
        return {
            "Method": describe_method(self.settings),
            "Trained parameters": _count(self.figures),
            "Quantized": _share(self.figures),
            "Learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
            "Effective batch": f"{training.effective_batch_size}",
            "Optimiser": training.optim,
            "Seed": f"{self.settings.seed}",
            "Base weights (sha256)": form.base_digest[:12],
            "Quantization of the base": form.quantization,
            "Compute dtype": form.dtype,
            "Longest row": f"{form.max_length} tokens",
            "Prompt template": self._template(),
            "Template variables": variables,
            "End tokens": " ".join(form.end_tokens),
        }

    def _template(self) -> str:
        """Return the name of the template, without the path of a user's file."""
        if self.form.template is None:
            return "none: plain text was trained"
        return "a Jinja file" if Path(self.form.template).suffix else self.form.template

    def _terms(self) -> str:
        if self.licence:
            return "The licence fields above are those of the base model"
        return "The base's files name no licence: set `license` above before you publish this model"

    def _usage(self) -> str:
        form, dtype = self.form, self.form.dtype
        quantized = self.settings.quantization.arguments(dtype)
        base = BaseLines(form.base or "FOLDER_OF_THE_BASE", form.revision, dtype, quantized)
        code = loading_code("THIS_FOLDER", base if self.is_adapter else None, stored_ends=True)
        if form.template is not None:
            limit = self.settings.evaluation.generation.max_new_tokens
            code += "\n\n" + prompting_code(limit, form.chat_template_kwargs)
        block = "```python\n" + visible(code).replace("```", "` ` `") + "\n```"
        if form.template_problem is None:
            return block
        return (
            "The stored chat template does not prompt the model as in training: "
            f"{in_markdown(form.template_problem)}.\n\n{block}"
        )


def _judged_rows(figures: Mapping[str, float]) -> str:
    """Return the words for the rows that the figures are of."""
    rows = figures.get(LOOK_ROWS)
    return "validation split" if rows is None else f"{rows:.0f} rows of the validation split"


def _share(figures: Mapping[str, float]) -> str:
    """Return how much of the base was quantized while training, or "" without quantization."""
    share = figures.get("parameters/quantized_share")
    return "" if share is None else f"{share:.1%} of the base's linear weights while training"


def _count(figures: Mapping[str, float]) -> str:
    if "parameters/trainable" not in figures:
        return ""
    share = figures["parameters/trainable_percent"]
    return f"{figures['parameters/trainable']:,.0f} ({share:.4g} % of all)"


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {in_markdown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
