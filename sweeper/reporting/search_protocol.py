"""Describe the search of each arm in sentences: its trials, priors and stops, and what more would bring.

What a search was given decides what it finds, so a comparison without these facts is not one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from sweeper.config.settings import metric_words
from sweeper.reporting.best_of_n import expected_best, trial_values
from sweeper.reporting.finalist_results import FinalistRanking
from sweeper.reporting.results import ArmResult, StudyResults
from sweeper.reporting.text_table import counted
from sweeper.reporting.verdict_doubts import label, reference_arm
from sweeper.reporting.verdict_words import perplexity_words


def protocol_sentences(results: StudyResults) -> Iterator[str]:
    """Yield how each arm was searched, the pruner, and the expected best of equal numbers of trials."""
    searched = [arm for arm in results.arms if arm.adopted is None and arm.tried]
    # An older version stored no priors, and without a rival nothing is compared.
    if len(searched) < 2 or any(arm.priors is None for arm in searched):
        return
    if results.protocol == "paper":
        yield "Protocol paper: no priors, no stops, equal device-seconds."
    yield f"Search: {'; '.join(map(_arm, searched))}."
    if results.pruner is not None:
        yield f"Pruner: {results.pruner}."
    yield from _equal_trials(results, searched)


def outlook_sentences(results: StudyResults) -> Iterator[str]:
    """Yield for each arm what further trials would be expected to bring, where a model guesses that."""
    verb = "lower" if results.objective.direction == "minimize" else "raise"
    metric = metric_words(results.objective.metric)
    for arm in results.arms:
        found = arm.outlook
        if found is None:
            continue
        factor = perplexity_words(found.gain, results.objective)
        notes = "; ".join(filter(None, (f"{found.low:.4f} to {found.high:.4f}", factor)))
        yield (
            f"{counted(found.trials, 'more trial')} would be expected to {verb} the {metric} of "
            f"{label(arm)} by about {found.gain:.4f} {results.objective.unit}".rstrip()
            + f" ({notes}), a guess of a model of its trials."
        )
        spread = None if arm.final is None else _seed_spread(arm.final)
        if spread is not None and found.gain < spread:
            yield f"That is less than its seeds differ by (standard deviation {spread:.4f})."


def _seed_spread(final: FinalistRanking) -> float | None:
    """Return the standard deviation of the objective over seeds, or None without two of one point."""
    fresh = [repeat.value for repeat in final.judged if repeat.value is not None]
    groups = [*(each.values for each in final.finalists), fresh]
    several = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum((len(values) - 1) * statistics.variance(values) for values in several)
    return math.sqrt(squares / freedom) if freedom else None


def _arm(arm: ArmResult) -> str:
    facts = [_known_points(arm)]
    if arm.refined:
        facts.append(f"{arm.refined} beside the best of its grid")
    causes = [trial.outcome.cause for trial in arm.trials]
    facts += [
        f"{causes.count(cause)} {words}"
        for cause, words in (("pruned", "pruned"), ("early_stopped", "stopped early"))
        if cause in causes
    ]
    return f"{label(arm)} {counted(arm.tried, 'trial')} ({', '.join(facts)})"


def _known_points(arm: ArmResult) -> str:
    """Return the number of known points that came first, with the names of the recipes among them."""
    if not arm.priors:
        return "no prior"
    count = counted(arm.priors, "prior")
    if not arm.recipes:
        return count
    among = "" if len(arm.recipes) == arm.priors else "among them "
    recipes = "recipe" if len(arm.recipes) == 1 else "recipes"
    return f"{count}: {among}the {recipes} {' and '.join(arm.recipes)}"


def _equal_trials(results: StudyResults, searched: list[ArmResult]) -> Iterator[str]:
    """Yield the expected best of a larger search, had it been as large as its reference's."""
    reference = reference_arm(results)
    if reference is None or reference not in searched:
        return
    few = trial_values(reference)
    metric = metric_words(results.objective.metric)
    for arm in searched:
        many = trial_values(arm)
        if arm is not reference and few and len(many) > len(few):
            found = expected_best(many, len(few), results.objective)
            best = expected_best(few, len(few), results.objective)
            yield (
                f"The expected best {metric} of {len(few)} of the {len(many)} trials of {label(arm)} "
                f"is {found:.4f}, against {best:.4f} of {label(reference)}."
            )
