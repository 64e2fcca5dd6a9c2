"""Plain explanations of the terms that reports use, for readers who meet them there first."""

from __future__ import annotations

import re
from collections.abc import Mapping

TERMS: Mapping[str, str] = {
    "PROVISIONAL": "another run could still change the answer. The report names the command.",
    "arm": "one training method of the study, such as QLoRA, LoRA or full fine-tuning, with a search "
    "that is separate from the other arms'.",
    "trial": "one training run with one choice of settings.",
    "recipe": "a known point with a name and an origin, which a search tries first. Its winner is "
    "compared with it.",
    "untuned": "the base model before any training.",
    "eval loss": "mean negative log-likelihood of the target tokens of the validation split, in nats. "
    "Lower is better.",
    "nats": "unit of a loss with the natural logarithm. One nat per token is 1.44 bits per token.",
    "change": "a trial's value minus that of the untuned base. A loss that fell is negative.",
    "perplexity": "exponential of the eval loss.",
    "test loss": "loss on the test split, which neither training nor the search reads.",
    "trainable": "parameters that training changes, as a number, as shares of the base model (of base) "
    "and of the model with its adapter (of total), and as a reduction from full fine-tuning (fewer).",
    "retains": "the arm's improvement over the untuned base divided by the reference arm's.",
    "95 % interval": "range in which the true value is expected: it is missed in 5 % of studies.",
    "ahead": "better beyond chance on the test split, over fresh seeds.",
    "equivalent": "the difference lies within a margin that was fixed before the first trial.",
    "undecided": "neither side is shown to be ahead, nor both to be equivalent.",
    "Noise floor": "how much results differ between seeds of one configuration. Smaller differences "
    "mean little.",
    "forgetting": "loss on general text after training minus before. Above zero the model got worse at "
    "text that is not about the task.",
    "artifact": "the stored adapter, or all weights after full fine-tuning.",
    "batch": "examples per optimiser step, over all micro-batches.",
    "sd": "standard deviation over seeds.",
    "Pareto front": "trials that no other trial beats in every respect.",
    "champion": "the model in use: the version that the alias `champion` in MLflow's registry names.",
    "gate": "examples of no other split, on which a night's best trial is compared with the champion.",
    "regression": "the night's best value is worse than the previous one by more than the tolerance.",
    "device-hours": "hours that trials took, times the devices that each of them used.",
    "early_stopped": "ended because the eval loss no longer improved. The best checkpoint counts.",
    "pruned": "stopped early because the trial was behind earlier trials at the same point. Its value "
    "is that of its best look. If the number of rows follows, the look was at a sample of the "
    "validation split, so the value does not compare with values of the whole split.",
    "oom": "ran out of memory, even with the smallest micro-batch. The settings are infeasible.",
    "diverged": "the loss became infinite or rose far above its start. The settings are infeasible.",
    "refused": "never trained: the settings are impossible (infeasible) on this model or device.",
    "duplicate": "the same settings as an earlier trial, whose result was taken.",
    "cancelled": "interrupted. A later trial continues from its checkpoint.",
    "timeout": "exceeded the time limit of a trial or stopped responding.",
    "crash": "the worker process died.",
    "error": "failed with an exception. The message is in results.json.",
}
"""Meanings by term, in the order of the glossary."""
_PATTERNS = {
    term: re.compile(rf"(?<![\w-]){re.escape(term)}s?(?!\w)", re.IGNORECASE) for term in TERMS
}

FOOTNOTE = (
    "Terms: an arm is one training method with a separate search. change = value minus the untuned "
    "base's. A nat is the natural-log unit of loss (1.44 bits). report.md explains all terms."
)
"""The terms that readers of a terminal ask for most, in one line."""


def terms_in(text: str) -> list[tuple[str, str]]:
    """Return the terms that occur in a text as whole words, with their meanings, in glossary order."""
    return [(term, meaning) for term, meaning in TERMS.items() if _PATTERNS[term].search(text)]
