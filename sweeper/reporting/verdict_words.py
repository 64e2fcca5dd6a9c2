"""The sentences of a verdict. They claim no more than the figures support."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sweeper.config.settings import Objective, metric_words
from sweeper.reporting.arm_comparison import FEWEST_SEEDS, ArmComparison, ArmSide, CostRatios
from sweeper.reporting.intervals import POWER, IntervalEstimate
from sweeper.reporting.recipe_gain import RecipeGain
from sweeper.reporting.text_table import capital, counted, perplexity_factor


def outcome_sentence(duel: ArmComparison) -> str:
    """Return the outcome of a comparison in one sentence."""
    side, reference = duel.side, duel.reference
    if duel.outcome == "ahead":
        return f"{capital(duel.better.label)} is ahead by {_lead(duel)}."
    difference = _signed_difference(duel)
    if duel.outcome == "equivalent":
        return (
            f"{capital(side.label)} and {reference.label} are equivalent within the margin of "
            f"{_margin(duel)}: the difference is {difference}."
        )
    return f"Undecided: {_why_undecided(duel, difference)}."


def headline(duel: ArmComparison) -> str:
    """Return the outcome in a sentence without figures that a person reads in a few seconds."""
    side, reference = duel.side.label, duel.reference.label
    return {
        "ahead": f"{capital(duel.better.label)} is ahead.",
        "equivalent": f"{capital(side)} and {reference} are equivalent.",
        "undecided": f"Undecided whether {side} or {reference} is better.",
    }[duel.outcome]


def forgetting_headline(duel: ArmComparison) -> str:
    """Return which side forgets more, or '' if their intervals overlap."""
    sides = [side for side in (duel.side, duel.reference) if side.forgetting is not None]
    found = [(side.label, side.forgetting) for side in sides if side.forgetting is not None]
    if len(found) < 2:
        return ""
    (less, low), (more, high) = sorted(found, key=lambda each: each[1].value)
    if low.high is None or high.low is None or low.high >= high.low:
        return ""
    return (
        f"{capital(more)} forgets more: {high.value:+.2f} against {low.value:+.2f} nats of {less} on "
        f"general text ({math.exp(high.value):.2f}× against {math.exp(low.value):.2f}× the perplexity)."
    )


def _why_undecided(duel: ArmComparison, difference: str) -> str:
    low, high = duel.difference.low, duel.difference.high
    names = f"the {duel.split} {_metric(duel)} of {duel.side.label} minus {duel.reference.label}'s"
    if low is None or high is None:
        return f"{names} is {difference}, and no confidence interval rules out chance"
    if duel.difference.has(0):
        return f"{names} is {difference}, which may be zero"
    found = duel.evidence
    reason = "one seed's chance is not ruled out"
    if not found.settled:
        reason = "the search of an arm was too small (see above)"
    elif min(found.seeds) >= FEWEST_SEEDS and not found.fresh:
        reason = "the seeds that chose the winner are among those that were judged"
    elif min(found.seeds) >= FEWEST_SEEDS:
        reason = f"this look at the test split allows a p value of {found.level:.2g} only"
    return f"{names} is {difference}, but {reason}"


def comparison_sentences(duel: ArmComparison) -> Iterator[str]:
    """Yield the outcome, what it rests on, and the costs."""
    side, reference = duel.side, duel.reference
    yield outcome_sentence(duel)
    values = f"{duel.split} {_metric(duel)} {duel.values[0]:.4f} against {duel.values[1]:.4f}"
    name = f"The best {side.label} ({side.point})"
    retained, (improves, reference_improves) = duel.retained, duel.improves
    if not improves:
        yield f"{name} is no better than the untuned base ({values})."
    # A share of what is undecided would be read as an answer.
    elif retained is not None and duel.outcome != "undecided":
        share = with_interval(retained, "{:.1f}", " %")
        yield (
            f"{name} retains {share} of {reference.label}'s improvement over the untuned base "
            f"({values})."
        )
    else:
        yield f"{name}: {values}."
    if not reference_improves:
        yield f"{capital(reference.label)} is no better than the untuned base."
    if costs := costs_words(duel.cost_ratios, duel.on_cpu):
        yield f"{capital(side.label)} {costs}."


def visible_sentence(duel: ArmComparison, of_each: str = "of each arm") -> str | None:
    """Return the smallest gap that an undecided comparison could show, and what would decide it."""
    gap, needed = duel.visible_gap, duel.needed
    if duel.outcome != "undecided" or gap is None:
        return None
    words = (
        f"A gap of {_with_factor(gap, duel.objective)} would have been found in "
        f"{100 * POWER:.0f} of 100 such studies, a smaller one less often"
    )
    if needed is None:
        return f"{words}."
    wants = f"{counted(needed.seeds, 'fresh seed')} {of_each}"
    if needed.rows > 1:
        wants += f" and {needed.rows:.1f}× the rows of the test split"
    return f"{words}. To decide a difference of the observed size takes about {wants}."


def recipe_headline(gain: RecipeGain) -> str:
    """Return what the search gained over the recipe in a sentence without figures, or ''.

    The sentence is left out while the answer is PROVISIONAL, because nothing was compared then.
    """
    if not gain.settled:
        return ""
    return {
        "gained": f"The search of {gain.label} gained on its recipe.",
        "enough": f"The recipe was enough for {gain.label}.",
        "undecided": f"Undecided whether the search of {gain.label} gained on its recipe.",
    }[gain.outcome]


def recipe_sentences(gain: RecipeGain) -> Iterator[str]:
    """Yield what the search of an arm gained over its recipe, with an interval if both were judged."""
    found = gain.comparison
    yield _unbeaten_recipe(gain) if found is None else _recipe_sentence(gain, found)
    if gain.failed_seeds:
        yield gain.failed_seeds
    if found is not None and (words := visible_sentence(found, "of both")) is not None:
        yield words
    yield f"Source of {gain.recipe}: {gain.source}."


def _unbeaten_recipe(gain: RecipeGain) -> str:
    """Return what it means that the recipe itself is the winner."""
    if not gain.settled:
        return f"So far the search of {gain.label} found no better point than the recipe {gain.recipe}."
    return f"The recipe was enough: the search of {gain.label} found no better point than {gain.recipe}."


def _recipe_sentence(gain: RecipeGain, found: ArmComparison) -> str:
    """Return the outcome of the comparison of an arm's winner with its recipe."""
    name, known = gain.label, found.reference.label
    values = f"{found.split} {_metric(found)} {found.values[0]:.4f} against {found.values[1]:.4f}"
    own, other = found.evidence.seeds
    values += f", {own} and {other} fresh seeds"
    if gain.outcome == "undecided":
        why = _why_undecided(found, _signed_difference(found))
        return f"Undecided whether the search of {name} gained on {known}: {why}."
    if gain.outcome == "gained":
        return f"The search of {name} gained {_lead(found)} on {known} ({values})."
    if found.outcome == "ahead":
        return (
            f"The recipe was enough: {known} is ahead of the winner of {name} by {_lead(found)} "
            f"({values})."
        )
    return (
        f"The recipe was enough: the winner of {name} and {known} are equivalent within the margin "
        f"of {_margin(found)}: the difference is {_signed_difference(found)} ({values})."
    )


def seed_sentences(duel: ArmComparison) -> Iterator[str]:
    """Yield what the interval covers, and which seeds failed."""
    yield from (side.failed_seeds for side in (duel.side, duel.reference) if side.failed_seeds)
    seeds = (duel.side.seeds, duel.reference.seeds)
    if duel.difference.low is None:
        yield (
            f"Seeds: {seeds[0]} against {seeds[1]}, on the split that selected them. Small differences "
            "may be chance."
        )
        return
    if min(seeds) < FEWEST_SEEDS:
        yield (
            "With one seed in an arm, the interval covers other test examples but not other seeds, and "
            "nothing is decided."
        )
        return
    noise = ", ".join(
        f"{sd:.4f} ({side.label})"
        for sd, side in zip(duel.noise, (duel.side, duel.reference), strict=True)
        if sd is not None
    )
    floor = f"Noise floor (standard deviation over seeds): {noise} {duel.objective.unit}".rstrip()
    kind = "fresh seeds" if duel.evidence.fresh else "seeds, with those that chose the winner"
    yield f"Judged on {seeds[0]} against {seeds[1]} {kind}. {floor}."
    fixed = duel.evidence.fixed_seeds
    if not fixed:
        yield "A seed sets the initialisation, the order of the rows and dropout together."
    else:
        yield f"The seeds vary all but {' and '.join(fixed)}, which is the same in every training."


def adoption_sentences(sides: Sequence[ArmSide]) -> Iterator[str]:
    """Yield where a model comes from that this study did not train."""
    for side in sides:
        if side.run_id is not None:
            yield (
                f"{capital(side.label)} was not trained in this study: it is MLflow run "
                f"{side.run_id}, evaluated on this study's rows. "
                f"Its search has {counted(side.trials, 'finished trial')}."
            )


def forgetting_sentences(sides: Sequence[ArmSide]) -> Iterator[str]:
    """Yield the change of the loss on general text, which is not about the task."""
    found = [(side.label, side.forgetting) for side in sides if side.forgetting is not None]
    if found:
        each = [
            f"{name} {with_interval(forgot, '{:+.4f}', '', perplexity_factor(forgot.value))}"
            for name, forgot in found
        ]
        yield f"Forgetting (loss on general text minus the untuned base's): {', '.join(each)} nats."


def single_arm_sentence(side: ArmSide, objective: Objective) -> str:
    """Return what the best trial of an arm without a rival improves on."""
    gain = objective.gain(side.value, over=side.base_value)
    if gain <= 0:
        return f"The best {side.label} ({side.point}) is no better than the untuned base."
    verb = "lowers" if objective.direction == "minimize" else "raises"
    gained = (
        f"The best {side.label} ({side.point}) {verb} the untuned base's "
        f"{metric_words(objective.metric)} by {_amount(gain, '{:.3f}', objective)}"
    )
    if factor := perplexity_words(-gain, objective):
        gained += f" ({factor})"
    judged = side.test_loss is not None and side.untuned_test_loss is not None
    # Of other metrics no value on the test split is stored for an arm alone.
    if not judged or objective.metric != "eval/loss":
        return f"{gained}."
    seeds = f"mean of {side.seeds} seeds" if side.seeds > 1 else "one seed"
    return (
        f"{gained}, and has a test loss of {side.test_loss:.4f} against the untuned base's "
        f"{side.untuned_test_loss:.4f} ({seeds})."
    )


def look_sentence(look: int | None, others: int) -> str | None:
    """Return how often the test split was looked at, or None if an older version looked."""
    if look is None:
        return None
    count = "the first look" if look == 1 else f"look number {look}"
    words = f"This was {count} of this question at this test split"
    if others:
        times = counted(others, "time")
        words += f". Other studies in this folder looked at it {times}, which is not accounted for"
    return f"{words}."


def with_interval(found: IntervalEstimate, form: str, unit: str, note: str = "") -> str:
    """Return a figure with its interval, if it has one, and with a note in the same brackets."""
    value = form.format(found.value) + unit
    ends = ""
    if found.low is not None and found.high is not None:
        ends = f"95 % interval {form.format(found.low)} to {form.format(found.high)}"
    notes = "; ".join(filter(None, (ends, note)))
    return f"{value} ({notes})" if notes else value


def perplexity_words(difference: float, objective: Objective) -> str:
    """Return a difference of losses as a factor in perplexity, or '' for another metric."""
    # Of other metrics a difference is no logarithm of a ratio.
    return perplexity_factor(difference) if objective.unit == "nats" else ""


def costs_words(ratios: CostRatios, on_cpu: bool) -> str:
    """Return the arm's known costs as text, as shares of its reference's, or '' if none is known."""
    taken = []
    if ratios.time is not None:
        time = with_interval(ratios.time, "{:.3g}", "×")
        taken.append(f"{time} the {'CPU time' if on_cpu else 'time'} of a training")
    if ratios.memory is not None:
        taken.append(f"{ratios.memory:.2g}× the peak memory")
    if ratios.artifact is not None:
        taken.append(f"{ratios.artifact:.2g}× the disk space")
    last = " and ".join(filter(None, (", ".join(taken[:-1]), "".join(taken[-1:]))))
    trained = (
        "" if ratios.trainable is None else f"{100 * ratios.trainable:.3g} % of the parameters"
    )
    parts = (f"trains {trained}" if trained else "", f"takes {last}" if last else "")
    return " and ".join(filter(None, parts))


def _lead(duel: ArmComparison) -> str:
    low, high = duel.difference.low, duel.difference.high
    assert low is not None
    assert high is not None
    near, far = sorted((abs(low), abs(high)))  # both ends have the same sign here
    size = IntervalEstimate(value=abs(duel.difference.value), low=near, high=far)
    return _difference(size, "{:.4f}", duel.objective)


def _signed_difference(duel: ArmComparison) -> str:
    return _difference(duel.difference, "{:+.4f}", duel.objective)


def _difference(found: IntervalEstimate, form: str, objective: Objective) -> str:
    unit = f" {objective.unit}".rstrip()
    return with_interval(found, form, unit, perplexity_words(found.value, objective))


def _margin(duel: ArmComparison) -> str:
    margin, size = duel.evidence.margin, duel.evidence.margin_size
    if margin is None or size is None or margin.share is None:
        return "" if size is None else _with_factor(size, duel.objective)
    return f"{100 * margin.share:g} % of {duel.reference.label}'s improvement"


def _metric(duel: ArmComparison) -> str:
    return duel.objective.metric.removeprefix("eval/")


def _with_factor(value: float, objective: Objective) -> str:
    """Return a difference of the metric with its unit and its factor in perplexity, if it has them."""
    factor = perplexity_words(value, objective)
    return _amount(value, "{:.4f}", objective) + (f" ({factor})" if factor else "")


def _amount(value: float, form: str, objective: Objective) -> str:
    """Return a difference of the metric with its unit, if the metric has one."""
    return f"{form.format(value)} {objective.unit}".rstrip()
