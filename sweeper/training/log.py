"""training_log.txt for people and training_log.json for machines: one trial, all its figures."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sweeper.folders import TrialFolder
from sweeper.outcome import Outcome
from sweeper.settings import LoraAdapter, TrialSettings


def training_log(
    settings: TrialSettings, outcome: Outcome, folder: TrialFolder, started: float
) -> tuple[str, dict[str, Any]]:
    """The log as text and as a JSON document; `started` is in Unix seconds."""
    history = _history(folder)
    document = {
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "settings": settings.model_dump(mode="json"),
        "outcome": outcome.model_dump(mode="json"),
        "history": history,
    }
    lines = [
        f"Training log, started {document['started']}",
        "",
        f"Base model     {settings.model.base_model}",
        f"Training data  {settings.data.train}",
        f"Method         {_method(settings)}",
        f"Learning rate  {settings.training.learning_rate:g}, {settings.training.lr_scheduler_type}",
        f"Batch          {settings.training.per_device_train_batch_size} x "
        f"{settings.training.gradient_accumulation_steps} accumulation = "
        f"{settings.training.effective_batch_size}",
        f"Optimiser      {settings.training.optim}",
        f"Seed           {settings.seed}",
        "",
        f"Ended          {outcome.cause} after {outcome.steps} steps"
        + (f": {outcome.message}" if outcome.message else ""),
        *_best(outcome),
        "",
        *(f"{name:<36} {value:,.6g}" for name, value in sorted(outcome.metrics.items())),
        "",
        "step      eval/loss   (nats per target token)",
        *(f"{row['step']:<9} {row['eval/loss']:.4f}" for row in history if "eval/loss" in row),
    ]
    return "\n".join(lines) + "\n", document


def _best(outcome: Outcome) -> list[str]:
    if outcome.best_value is None:
        return []
    return [f"Best eval/loss {outcome.best_value:.4f} at step {outcome.best_step} (what is stored)"]


def _history(folder: TrialFolder) -> list[dict[str, Any]]:
    if not folder.metrics.exists():
        return []
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def _method(settings: TrialSettings) -> str:
    adapter = settings.adapter
    if not isinstance(adapter, LoraAdapter):
        return "full fine-tuning"
    base = "QLoRA" if settings.quantization.load_in_4bit else "LoRA"
    targets = adapter.target_modules
    shown = targets if isinstance(targets, str) else ", ".join(targets)
    return (
        f"{base} r={adapter.r} alpha={adapter.alpha:g} dropout={adapter.lora_dropout:g} on {shown}"
    )
