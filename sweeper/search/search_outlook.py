"""Guess the gain of further trials when a search has ended, and store the guess with its study.

The guess is made once, when a search has ended. It follows from the record alone, whatever sampler has
chosen the trials. A study whose trials have become more shows no guess until its search has ended again.
"""

from __future__ import annotations

import numpy as np
import optuna
from optuna.study import StudyDirection

from sweeper.config.space import Branches
from sweeper.core.value import FrozenValue
from sweeper.search.adapter_geometry import AdapterGeometry
from sweeper.search.observed_trials import observe
from sweeper.search.samplers import outside_geometry
from sweeper.search.study import counted, sampler_context
from sweeper.search.study_plan import ArmPlan, StudyPlan

OUTLOOK = "outlook"
"""User attribute of an arm's study: the guess that was made when its search ended."""
LEAST = 8
"""Trials with a cost below which nothing is guessed: after 6 a guess is a third of what follows."""
MOST = 24
"""Most further trials that are simulated."""
RANGE = (10, 90)
"""Percentiles of the gain between which the range lies."""


class SearchOutlook(FrozenValue):
    """The improvement of an arm's best value that further trials are expected to bring."""

    after: int
    """Number of trials that had used up n_trials when the guess was made."""
    trials: int
    """Number of further trials that were simulated."""
    gain: float
    """Mean improvement in the objective's unit, 0 or more whatever its direction."""
    low: float
    high: float
    """The ends of the range that holds 8 of 10 improvements."""


def store_outlook(study: optuna.Study, plan: StudyPlan, arm: ArmPlan) -> None:
    """Store a guess for an arm whose search has ended, unless one for these trials is stored."""
    if stored_outlook(study) is None:
        found = guess_outlook(study, plan, arm)
        study.set_user_attr(OUTLOOK, None if found is None else found.model_dump())


def stored_outlook(study: optuna.Study) -> SearchOutlook | None:
    """Return the guess for the trials that a study has, or None if there is none."""
    stored = study.user_attrs.get(OUTLOOK)
    if stored is None:
        return None
    found = SearchOutlook.model_validate(stored)
    return found if found.after == counted(study) else None


def guess_outlook(study: optuna.Study, plan: StudyPlan, arm: ArmPlan) -> SearchOutlook | None:
    """Return what as many further trials as were tried would bring, or None if no model says so.

    A grid is tried in its own order, so its further trials are not simulated.
    """
    context = sampler_context(plan, arm)
    after = counted(study)
    if arm.sampler.name == "grid" or outside_geometry(arm.space, context.objectives):
        return None
    domains = {key: domain for key, domain in arm.space.items() if not isinstance(domain, Branches)}
    geometry = AdapterGeometry(domains, context.adapter)
    sign = 1.0 if study.direction is StudyDirection.MINIMIZE else -1.0
    seen = observe(study.get_trials(deepcopy=False), geometry, sign, context.looks_are_values)
    if not domains or len(seen.costs) < LEAST:
        return None
    # scikit-learn would slow the start of every study
    from sweeper.search.simulated_search import simulated_gains

    gains, trials = simulated_gains(geometry, seen, min(after, MOST))
    if not trials:  # every point of the space was tried
        return None
    low, high = np.percentile(gains, RANGE)
    return SearchOutlook(
        after=after, trials=trials, gain=float(gains.mean()), low=float(low), high=float(high)
    )
