"""Results made by hand, for the tests of what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sweeper.config.settings import FairnessRules, Objective
from sweeper.core.outcome import ArmBaseline, Outcome
from sweeper.reporting.results import ArmResult, SearchedRange, StudyResults, TrialResult, rank

RATE = "training.learning_rate"
FACTS = ArmBaseline(
    base_digest="b",
    base_commit=None,
    base_metrics={"eval/loss": 4.5, "eval/perplexity": 90.0},
    base_parameters=1000,
    data_digest="d" * 64,
    data_source="rows.jsonl",
    data_format="alpaca",
    rows={"train": 10, "validation": 2, "test": 1},
    dropped={"over_max_length": 3},
    target_tokens=20,
    device="cpu",
    dtype="float32",
)
LOSS = Objective(metric="eval/loss", direction="minimize", pruning_metric=None)
ROUGE = Objective(metric="eval/rougeL", direction="maximize", pruning_metric="eval/loss")
FAIRNESS = FairnessRules(equal="trials", tolerance=0.1, min_finished=1)
SETTINGS = {
    "adapter.method": "lora",
    "training.optim": "adamw_torch",
    "training.per_device_train_batch_size": 4,
    "training.gradient_accumulation_steps": 2,
    RATE: 1e-3,
}
LORA_COSTS = {
    "parameters/trainable": 50.0,
    "parameters/trainable_percent": 100 * 50 / 1050,
    "parameters/trainable_percent_of_base": 5.0,
    "cost/seconds": 10.0,
    "cost/peak_memory_mib": 300.0,
    "cost/artifact_mib": 1.0,
}
ROUGE_FACTS = FACTS.model_copy(update={"base_metrics": {**FACTS.base_metrics, "eval/rougeL": 0.1}})
FULL_COSTS = {
    "parameters/trainable": 1000.0,
    "parameters/trainable_percent": 100.0,
    "parameters/trainable_percent_of_base": 100.0,
    "cost/seconds": 20.0,
    "cost/peak_memory_mib": 600.0,
    "cost/artifact_mib": 20.0,
}


def make_trial(
    arm: str,
    number: int,
    cause: str,
    value: float | None,
    costs: Mapping[str, float] | None = None,
    **point: Any,
) -> TrialResult:
    """One trial; `point` by the last part of its keys."""
    keys = {"learning_rate": RATE, "r": "adapter.r"}
    named = {keys[name]: value for name, value in point.items()}
    outcome = Outcome(cause=cause, best_value=value, metrics=dict(costs or {}))  # type: ignore[arg-type]
    return TrialResult(arm=arm, number=number, params=named or {RATE: 1e-3}, outcome=outcome)


def make_arm(
    name: str,
    trials: Sequence[TrialResult],
    method: str = "QLoRA",
    base: str = "nf4",
    rates: tuple[float, ...] | None = None,
    **fields: Any,
) -> ArmResult:
    """An arm that was searched over the given rates."""
    facts = fields.pop("facts", FACTS)
    objective = fields.pop("objective", LOSS)
    adapter = "none" if method == "full fine-tuning" else "lora"
    continuous = fields.pop("continuous", True)
    ranges = {} if rates is None else {RATE: SearchedRange(values=rates, continuous=continuous)}
    return ArmResult(
        name=name,
        n_trials=fields.pop("n_trials", len(trials)),
        method=method,
        base=base,
        objective=objective,
        facts=facts,
        trials=rank(list(trials), objective),
        settings={**SETTINGS, "adapter.method": adapter},
        ranges=ranges,
        exhaustive=fields.pop("exhaustive", False),
    )


def make_results(
    *arms: ArmResult, fairness: FairnessRules = FAIRNESS, **fields: Any
) -> StudyResults:
    """A study of these arms."""
    return StudyResults(
        study_name="mine",
        command="+experiment=mine -m",
        provenance={"git.commit": "abc"},
        arms=tuple(arms),
        fairness=fairness,
        **fields,
    )


def two_arms(lora: float | None, full: float | None, **fields: Any) -> StudyResults:
    """One trial an arm; an arm without a value is left out (full) or failed (lora)."""
    fields = {"rates": (1e-4, 1e-2), **fields}
    cause = "finished" if lora is not None else "oom"
    arms = [make_arm("lora", [make_trial("lora", 0, cause, lora, LORA_COSTS)], **fields)]
    if full is not None:
        trials = [make_trial("full", 0, "finished", full, FULL_COSTS)]
        arms.append(make_arm("full", trials, "full fine-tuning", "float32", **fields))
    return make_results(*arms)
