"""Suggested next steps, each derived from the study's figures and given with its command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sweeper.reporting.rank_effects import RANK
from sweeper.reporting.rank_ladder import rank_ladders
from sweeper.reporting.report_evidence import Curve, ReportEvidence
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.text_table import capital, perplexity_factor
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import FULL, label, range_edges, searched_otherwise

LARGE_GAP = 0.25
"""Gap of eval loss over training loss, as a share of the improvement, that indicates overfitting."""
STILL_FALLING = 0.05
"""Share of the improvement between the last two evaluations that calls for longer training."""
FLAT = 0.02
"""Distance from the lowest loss, as a share of the improvement, within which a curve has converged."""
EARLY = 0.6
"""Share of the steps within which convergence is early."""
OFTEN = 0.25
"""Share of an arm's trials out of memory from which activation checkpointing is suggested."""


@dataclass(frozen=True)
class NextStep:
    """A suggestion: its reason and its command."""

    reason: str
    command: str


def next_steps(results: StudyResults, evidence: ReportEvidence) -> list[NextStep]:
    """Return the steps that the figures suggest, the most pressing first. The list may be empty."""
    doubts = [
        NextStep(f"{capital(doubt.reason)}.", f"python -m sweeper {doubt.command}")
        for doubt in judge(results).doubts
    ]
    edges = [
        NextStep(f"{capital(edge.reason)}.", f"python -m sweeper {edge.command}")
        for edge in range_edges(results)
    ]
    arms = [step for arm in results.arms for step in _of_arm(results, arm, evidence.curves)]
    # Two reasons may lead to the same command. The first one is kept.
    steps = {step.command: step for step in reversed([*doubts, *_ranks(results), *edges, *arms])}
    return list(reversed(steps.values())) or list(_repeat(results))


def _of_arm(
    results: StudyResults, arm: ArmResult, curves: Mapping[tuple[str, int], Curve]
) -> Iterator[NextStep]:
    yield from _memory(results, arm)
    best = arm.best
    if best is None or best.value is None:
        return
    gain = arm.objective.gain(best.value, over=arm.base_value)
    # Thresholds are shares of the improvement, which must be positive.
    if gain <= 0:
        return
    yield from _overfitting(results, arm, best, gain)
    curve = curves.get((arm.name, best.number), ())
    # Two points do not tell whether a curve flattens.
    if len(curve) > 2:
        yield from _length(results, arm, curve, gain)


def _ranks(results: StudyResults) -> Iterator[NextStep]:
    """Suggest larger ranks if the largest is better than the one below it by more than chance."""
    arms = {arm.name: arm for arm in results.arms}
    for ladder in rank_ladders(results):
        arm, below, largest = arms[ladder.arm], ladder.rungs[-2].r, ladder.rungs[-1].r
        for lead in ladder.effects.leads:
            if (lead.better, lead.worse) == (largest, below):
                more = ", ".join(str(r) for r in (below, largest, 2 * largest, 4 * largest))
                yield NextStep(
                    f"{label(arm)}: r={largest} is the largest rank that was tried, and better than "
                    f"r={below} by {lead.words(arm.objective)}: try larger ones.",
                    _anew(results, arm, "ranks", RANK, f"choice({more})"),
                )


def _overfitting(
    results: StudyResults, arm: ArmResult, best: TrialResult, gain: float
) -> Iterator[NextStep]:
    """Suggest dropout or fewer epochs if the eval loss is far above the training loss."""
    gap = best.metric("best/eval_minus_train_loss")
    if gap is None or gap <= LARGE_GAP * gain:
        return
    reason = (
        f"{label(arm)}: the best trial's eval loss is {gap:.4f} nats ({perplexity_factor(gap)}) above "
        "its training loss, "
        f"{gap / gain:.0%} of its improvement over the untuned base. Training rows may be memorised"
    )
    # Full fine-tuning has no adapter whose dropout could be raised.
    if arm.method == FULL:
        epochs = float(arm.setting("training.num_train_epochs") or 1.0)
        command = _anew(results, arm, "shorter", "training.num_train_epochs", f"{epochs / 2:g}")
        yield NextStep(f"{reason}: train for fewer epochs.", command)
    else:
        command = _anew(results, arm, "dropout", "adapter.lora_dropout", "choice(0.05, 0.1)")
        yield NextStep(f"{reason}: try dropout, or fewer epochs.", command)


def _length(results: StudyResults, arm: ArmResult, curve: Curve, gain: float) -> Iterator[NextStep]:
    """Suggest longer training for a curve that still falls, or shorter for one that converged early."""
    last_step, last_loss = curve[-1]
    lowest = min(loss for _, loss in curve)
    arrived = next(step for step, loss in curve if loss <= lowest + FLAT * gain)
    limit = "training.max_steps"
    fell = curve[-2][1] - last_loss
    if last_loss == lowest and fell > STILL_FALLING * gain:
        yield NextStep(
            f"{label(arm)}: the best trial's loss still fell by {fell:.4f} nats "
            f"({perplexity_factor(fell)}) between its last two evaluations (steps {curve[-2][0]} "
            f"and {last_step}): try training longer.",
            _anew(results, arm, "longer", limit, str(2 * last_step)),
        )
    elif arrived <= EARLY * last_step:
        yield NextStep(
            f"{label(arm)}: the best trial had made all but {FLAT:.0%} of its improvement by step "
            f"{arrived} of {last_step}: try shorter trials, which leave time for more of them.",
            _anew(results, arm, "shorter", limit, str(arrived)),
        )


def _memory(results: StudyResults, arm: ArmResult) -> Iterator[NextStep]:
    """Suggest activation checkpointing if many trials ran out of memory."""
    count = sum(trial.outcome.cause == "oom" for trial in arm.trials)
    # A single trial out of memory is what a search is expected to find.
    if count and count >= OFTEN * len(arm.trials):
        yield NextStep(
            f"{label(arm)}: {count} of {len(arm.trials)} trials ran out of memory: recompute "
            "activations instead of keeping them (activation checkpointing).",
            _anew(results, arm, "memory", "training.activation_checkpointing", "true"),
        )


def _repeat(results: StudyResults) -> Iterator[NextStep]:
    """Suggest a second seed if no other step applies and the best configuration has one seed."""
    arm = next((arm for arm in results.arms if arm.best is not None), None)
    if arm is not None and results.seeds(arm.name) == 1:
        yield NextStep(
            f"The results suggest no other search. {label(arm)} was trained with one seed: train the "
            "best configuration with another one to see how much of the difference is chance.",
            f"python -m sweeper best {results.study_name} --yaml > conf/experiment/best.yaml && "
            "python -m sweeper +experiment=best seed=1",
        )


def _anew(results: StudyResults, arm: ArmResult, suffix: str, key: str, words: str) -> str:
    return f"python -m sweeper {searched_otherwise(results, arm, suffix, key, words)}"
