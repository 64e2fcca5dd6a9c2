"""Write the README.md of an artifact: a model card in the hub's format, made of settings and metrics.

PEFT's own card consists of placeholders and names a local folder as base_model, which the hub refuses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import sweeper
from sweeper.builtin import stand_ins
from sweeper.config.settings import EMBEDDED, LoraAdapter, TrialSettings, sources
from sweeper.core.outcome import LOOK_ROWS
from sweeper.core.plain_text import in_code, in_markdown, visible
from sweeper.data.sources import describe_sources
from sweeper.training.training_log import describe_method

README = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
METRICS = {
    "eval/loss": ("loss", "Loss, nats per target token"),
    "eval/perplexity": ("perplexity", "Perplexity per target token"),
    "eval/rougeL": ("rouge", "ROUGE-L"),
}
"""Our metric -> the hub's metric and its label on the card."""
LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(settings: TrialSettings, figures: Mapping[str, float], base_folder: Path) -> str:
    """Return the model card as text.

    Args:
        settings: the settings of the training.
        figures: metrics of the stored checkpoint: eval/…, parameters/…, data/….
        base_folder: folder of the base's files, whose model card names its licence.
    """
    licence = base_licence(base_folder)
    fields: dict[str, Any] = licence or {"license": "unknown"}
    data = ModelCardData(**_metadata(settings, figures), **fields)
    return f"---\n{data.to_yaml()}\n---\n\n{_body(settings, figures, licence)}"


def base_licence(base_folder: Path) -> dict[str, str]:
    """Return the licence fields of the base's own model card, or {} if it has none."""
    card = base_folder / README
    if not card.is_file():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data
    return {key: str(value) for key in LICENCE_KEYS if (value := data.get(key))}


def hub_id(name: str) -> str | None:
    """Return `name` if it can be a hub id, or None for a local path or a built-in name."""
    own = name == EMBEDDED or name.startswith(stand_ins.PREFIX)
    return None if own or not HUB_ID.fullmatch(name) or Path(name).exists() else name


def _metadata(settings: TrialSettings, figures: Mapping[str, float]) -> dict[str, Any]:
    adapter = isinstance(settings.adapter, LoraAdapter)
    base = hub_id(settings.model.base_model)
    paths = [source.path for source in sources(settings.data.train)]
    datasets = [found for path in paths if "/" in path and (found := hub_id(path))]
    kind = ["qlora", "lora"] if settings.quantization.load_in_4bit else ["lora"]
    return {
        "base_model": base,
        "base_model_relation": ("adapter" if adapter else "finetune") if base else None,
        "datasets": datasets or None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(kind if adapter else ()), "sweeper"],
        "model_name": f"{describe_method(settings)} of {settings.model.base_model}",
        "eval_results": [
            EvalResult(
                task_type="text-generation",
                dataset_type=datasets[0] if datasets else "custom",
                dataset_name=f"{describe_sources(settings.data)}, {_judged_rows(figures)}",
                metric_type=metric,
                metric_name=label,
                metric_value=round(figures[name], 6),
            )
            for name, (metric, label) in METRICS.items()
            if name in figures
        ]
        or None,
    }


def _body(settings: TrialSettings, figures: Mapping[str, float], licence: object) -> str:
    base, training = settings.model.base_model, settings.training
    revision = (
        f" (revision {in_markdown(settings.model.revision)})" if settings.model.revision else ""
    )
    rows = figures.get("data/train_rows")
    counted = "" if rows is None else f", {rows:,.0f} rows after cleaning"
    metrics = {label: figures[name] for name, (_, label) in METRICS.items() if name in figures}
    trained = {
        "Method": describe_method(settings),
        "Trained parameters": _count(figures),
        "Learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
        "Effective batch": f"{training.effective_batch_size}",
        "Optimiser": training.optim,
        "Seed": f"{settings.seed}",
    }
    terms = (
        "The licence fields above are those of the base model"
        if licence
        else "The base model's files name no licence: set `license` above before you publish this model"
    )
    return (
        "\n\n".join(
            [
                f"# {describe_method(settings)}",
                f"Trained on {in_code(base)}{revision} by sweeper {sweeper.__version__}.",
                "## Figures",
                f"The stored checkpoint, evaluated on the {_judged_rows(figures)} that chose it. "
                "Perplexity is exp(loss).",
                _table({label: f"{value:.4f}" for label, value in metrics.items()}),
                "## Training",
                _table({label: value for label, value in trained.items() if value}),
                "## Data",
                f"{in_markdown(describe_sources(settings.data))}{counted}.",
                "## Use",
                _usage(settings),
                "## Licence",
                f"{terms}. Check the terms of the training data as well.",
            ]
        )
        + "\n"
    )


def _judged_rows(figures: Mapping[str, float]) -> str:
    """Return the words for the rows that the figures are of."""
    rows = figures.get(LOOK_ROWS)
    return "validation split" if rows is None else f"{rows:.0f} rows of the validation split"


def _count(figures: Mapping[str, float]) -> str:
    if "parameters/trainable" not in figures:
        return ""
    share = figures["parameters/trainable_percent"]
    return f"{figures['parameters/trainable']:,.0f} ({share:.4g} % of all)"


def _usage(settings: TrialSettings) -> str:
    base = settings.model.base_model
    if not isinstance(settings.adapter, LoraAdapter):
        lines = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        ]
    else:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base!r})",
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        ]
    return "```python\n" + visible("\n".join(lines)).replace("```", "` ` `") + "\n```"


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {in_markdown(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
