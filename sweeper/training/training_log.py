"""Write a trial's log with all its metrics: training_log.txt for people, training_log.json for tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from sweeper.config.settings import LoraAdapter, TrialSettings
from sweeper.core.outcome import Outcome
from sweeper.core.paths import TrialFolder
from sweeper.core.spool import read_spool
from sweeper.data.sources import describe_sources
from sweeper.training.trial_costs import Stage, TrialCosts

Figures = Mapping[str, float]


def training_log(
    settings: TrialSettings,
    outcome: Outcome,
    folder: TrialFolder,
    started: float,
    costs: TrialCosts,
) -> tuple[str, dict[str, Any]]:
    """Return the log as text and as a JSON document.

    Args:
        settings: the trial, with its rank decided.
        outcome: the trial's outcome.
        folder: the trial's folder, with its spool and artifact.
        started: start of this attempt in Unix seconds.
        costs: facts and advice to print.
    """
    document = {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "settings": settings.model_dump(mode="json"),
        "facts": costs.facts,
        "advice": costs.advice,
        "outcome": outcome.model_dump(mode="json"),
        "artifact": _files(folder),
        "history": read_spool(folder.metrics),
    }
    return "\n".join(_lines(settings, outcome, document)) + "\n", document


def _lines(settings: TrialSettings, outcome: Outcome, document: Mapping[str, Any]) -> list[str]:
    figures = outcome.metrics
    return [
        f"Training log, started {document['started']}",
        "",
        *_settings_lines(settings, document["facts"]),
        *(f"Advice         {sentence}" for sentence in document["advice"]),
        "",
        *_batches(figures),
        *_parameters(figures),
        "",
        *_ending(outcome),
        *_losses(outcome, settings.objective.metric),
        *_costs(figures),
        *_artifact(document["artifact"]),
        "",
        *(f"{name:<40} {value:,.6g}" for name, value in sorted(figures.items())),
        "",
        "step      eval/loss  moving average   (mean negative log-likelihood in nats per target token)",
        *_curve(document["history"]),
    ]


def _settings_lines(settings: TrialSettings, facts: Mapping[str, str]) -> list[str]:
    training = settings.training
    base = settings.model.base_model
    revision = f", revision {settings.model.revision}" if settings.model.revision else ""
    return [
        f"Base model     {base}{revision}",
        f"Training data  {describe_sources(settings.data)}",
        f"Method         {describe_method(settings)}",
        f"Learning rate  {training.learning_rate:g}, {training.lr_scheduler_type}",
        f"Optimiser      {training.optim}, weight decay {training.weight_decay:g}, "
        f"gradients clipped at {training.max_grad_norm:g}",
        f"Seed           {settings.seed}",
        *(f"{name:<14} {fact}" for name, fact in facts.items()),
    ]


def _batches(figures: Figures) -> list[str]:
    # A trial that was refused has no schedule
    if "training/total_steps" not in figures:
        return []
    get = {name.removeprefix("training/"): round(value) for name, value in figures.items()}
    retries = round(figures["cost/oom_retries"])
    return [
        f"Effective batch {get['micro_batch']} × {get['gradient_accumulation_steps']} accumulation"
        f" = {get['effective_batch']} examples per step"
        + (f" (after running out of memory {retries} times)" if retries else ""),
        f"Schedule       {get['total_steps']} steps, {get['warmup_steps']} of them warm-up, "
        f"{get['steps_per_epoch']} per epoch, the last with {get['last_batch']} examples",
    ]


def _parameters(figures: Figures) -> list[str]:
    if "parameters/total" not in figures:
        return []
    total, trainable = figures["parameters/total"], figures["parameters/trainable"]
    return [
        f"Parameters     {trainable:,.0f} trained of {total:,.0f}: "
        f"{figures['parameters/trainable_percent']:.4f} % of the total, "
        f"{figures['parameters/trainable_percent_of_base']:.4f} % of the base"
    ]


def _ending(outcome: Outcome) -> list[str]:
    reason = f": {outcome.message}" if outcome.message else ""
    seconds = outcome.metrics["cost/seconds"]
    return [f"Ended          {outcome.cause} after {outcome.steps} steps, {seconds:.2f} s{reason}"]


def _losses(outcome: Outcome, objective: str) -> list[str]:
    figures, lines = outcome.metrics, []
    if "train/mean_loss" in figures:
        lines.append(
            f"Train loss     {figures['train/mean_loss']:.4f} mean over the run, "
            f"{figures['train/final_loss']:.4f} at the end"
        )
    if outcome.best_value is not None:
        rows = "" if outcome.look_rows is None else f", of a look at {outcome.look_rows} rows"
        lines.append(
            f"Best {objective} {outcome.best_value:.4f} (perplexity "
            f"{figures['best/eval_perplexity']:.4f}) at step {outcome.best_step}, the stored checkpoint"
            f"{rows}"
        )
    if "best/eval_minus_train_loss" in figures:
        lines.append(
            f"Gap there      {figures['best/eval_minus_train_loss']:+.4f}, eval loss minus train loss"
        )
    return lines


def _costs(figures: Figures) -> list[str]:
    stages = ", ".join(f"{name} {figures[f'cost/{name}_seconds']:.2f}" for name in get_args(Stage))
    return [
        f"Seconds        {stages}, {figures['cost/cpu_seconds']:.2f} of CPU time in total",
        f"Throughput     {figures['cost/tokens_per_second']:,.0f} tokens/s, "
        f"{figures['cost/target_tokens_per_second']:,.0f} target tokens/s, "
        f"{figures['cost/samples_per_second']:,.2f} samples/s",
    ]


def _artifact(files: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"Stored         {file['path']}, {file['bytes']:,} bytes" for file in files]


def _curve(history: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{row['step']:<9} {row['eval/loss']:<10.4f} {row['eval/loss_moving_average']:.4f}"
        for row in history
        if "eval/loss" in row
    ]


def _files(folder: TrialFolder) -> list[dict[str, Any]]:
    """Return path (in the trial's folder) and size of every stored file of the artifact."""
    artifact = folder.artifact
    if artifact is None:
        return []
    files: list[Path] = sorted(path for path in artifact.rglob("*") if path.is_file())
    files += [folder.archive] if folder.archive.exists() else []
    return [
        {"path": path.relative_to(folder.path).as_posix(), "bytes": path.stat().st_size}
        for path in files
    ]


def describe_method(settings: TrialSettings) -> str:
    """Return the training method as text: QLoRA (nf4) r=8 alpha=16 dropout=0 on all-linear."""
    adapter = settings.adapter
    if not isinstance(adapter, LoraAdapter):
        return "full fine-tuning"
    kind = settings.quantization.kind
    base = "LoRA" if kind == "none" else f"QLoRA ({kind})"
    targets = adapter.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(targets)
    if adapter.r is None:  # the trial was refused before its rank was decided
        return f"{base} of {adapter.trainable_parameters:,} parameters on {shown}"
    return (
        f"{base} r={adapter.r} alpha={adapter.alpha:g} dropout={adapter.lora_dropout:g} on {shown}"
    )
