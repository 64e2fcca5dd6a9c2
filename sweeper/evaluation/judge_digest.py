"""The digest of what a model is judged on, and how: two losses compare only if it is equal."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.config.decisive_settings import digested_settings
from sweeper.config.settings import EvaluationSettings, TrialSettings
from sweeper.evaluation.generation import greedy_config
from sweeper.evaluation.judge import HeldOutPrompts, ModelJudge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECTION = "evaluation."
NOT_JUDGED = f"{SECTION}prompts."
"""Qualitative prompts, whose answers have no metric."""


def judge_digest(
    judge: ModelJudge, rows: str, settings: TrialSettings, model: PreTrainedModel
) -> str:
    """Return the sha256 over everything that decides a judge's figures, apart from the model's weights.

    Args:
        judge: the judge of the whole validation split.
        rows: the digest of its rows.
        settings: the trial's settings.
        model: the base model, whose generation configuration names tokens that end an answer.
    """
    parts = {
        "rows": rows,
        "bytes": list(judge.row_bytes),
        "seed": judge.seed,
        "settings": {
            key: text
            for key, text in digested_settings(settings).items()
            if key.startswith(SECTION) and not f"{key}.".startswith(NOT_JUDGED)
        },
        "answers": None if judge.held_out is None else _answers(judge, judge.held_out, model),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _answers(judge: ModelJudge, held_out: HeldOutPrompts, model: PreTrainedModel) -> list[object]:
    generation = judge.settings.generation
    config = greedy_config(
        model, judge.tokenizer, generation.max_new_tokens, held_out.end_token_ids
    )
    return [
        [list(ids) for ids in held_out.prompt_ids],
        list(held_out.references),
        config.eos_token_id,
        config.pad_token_id,
        metric_sources(judge.settings),
    ]


def metric_sources(settings: EvaluationSettings) -> dict[str, str]:
    """Return the sha256 of each module that contains a function of `evaluation.metrics`.

    What these modules import themselves is not covered.
    """
    modules = {target.partition(":")[0] for target in settings.metrics.values()}
    return {name: _source(name) for name in sorted(modules)}


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    origin = None if spec is None or not spec.has_location else spec.origin
    if origin is None:
        return "built in"
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest()
