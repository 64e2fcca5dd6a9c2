"""protocol=paper: arms that are compared as in a paper, by one word.

No arm has priors or an earlier study's winners, no trial is stopped before the end of its schedule, and
the arms have equal device seconds. Trials of one method may cost more than those of another, so the
number of trials follows from the time. A grid cannot be longer or shorter, so its learning rates become
a range.
"""

from __future__ import annotations

from collections.abc import Sequence

from sweeper.config import grammar
from sweeper.config.settings import ArmSettings, PrunerSettings, StudySettings
from sweeper.config.space import Choice

RATE = "training.learning_rate"
UNSTOPPED = "training.early_stopping_patience=null"
MOST_FACTOR = 2
"""Trials of another arm per trial of the first one. More of them are left to the user."""
NO_PRUNER = PrunerSettings(
    name="none",
    rungs=[],
    n_startup_trials=0,
    percentile=None,
    reduction_factor=None,
    class_name=None,
    kwargs={},
    audit_fraction=0.0,
)


def under_protocol(study: StudySettings) -> StudySettings:
    """Return the study with what its protocol asks for."""
    if study.protocol != "paper":
        return study
    arms = {name: _searched_freely(arm, study.n_trials) for name, arm in study.arms.items()}
    return study.model_copy(
        update={
            "priors": [],
            "warm_start": [],
            "pruner": NO_PRUNER,
            "fairness": study.fairness.model_copy(update={"equal": "device_seconds"}),
            "arms": arms,
        }
    )


def with_protocol(study: StudySettings, fixed: Sequence[str]) -> list[str]:
    """Return the overrides of all arms with those of the protocol."""
    # of two overrides of one key Hydra takes the last
    return [*fixed, UNSTOPPED] if study.protocol == "paper" else list(fixed)


def _searched_freely(arm: ArmSettings, first: int) -> ArmSettings:
    """Return an arm without priors and without a grid, with room for as many trials as time allows."""
    params = {key: _as_range(key, text) for key, text in arm.params.items()}
    sampler = None if arm.sampler == "grid" else arm.sampler
    return arm.model_copy(
        update={
            "priors": [],
            "refine": False,
            "sampler": sampler,
            "params": params if arm.sampler == "grid" else arm.params,
            "n_trials": max(arm.n_trials, MOST_FACTOR * first),
        }
    )


def _as_range(key: str, text: object) -> object:
    """Return a choice of learning rates as the range between its ends."""
    domain = grammar.parse_domain(key, text) if key == RATE and isinstance(text, str) else None
    if not isinstance(domain, Choice):
        return text
    rates = sorted(float(rate) for rate in domain.values if isinstance(rate, int | float))
    return f"tag(log, interval({rates[0]:g}, {rates[-1]:g}))" if len(rates) > 1 else text
