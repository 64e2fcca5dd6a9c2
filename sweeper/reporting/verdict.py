"""The verdict of a study: a value computed from its results, and the sentences that state it.

Each arm is compared with a reference: full fine-tuning if an arm does it, else the second arm. The
outcome is one of three (sweeper.reporting.arm_comparison), and nothing is decided while a search was too
small (sweeper.reporting.verdict_doubts).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import BaseModel

from sweeper.config.settings import Objective
from sweeper.core.outcome import ServeForm
from sweeper.core.value import MemoryShortfall
from sweeper.reporting.arm_comparison import (
    MOST_SEEDS,
    ArmComparison,
    ArmSide,
    ComparisonEvidence,
)
from sweeper.reporting.finalist_results import (
    FinalistRanking,
    RecipeResult,
    SeedRepeat,
    impossible,
)
from sweeper.reporting.intervals import ArmContrast, IntervalEstimate
from sweeper.reporting.recipe_gain import RecipeGain
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult
from sweeper.reporting.search_protocol import outlook_sentences, protocol_sentences
from sweeper.reporting.served_forms import ServedContrast, served_sentences, served_warning
from sweeper.reporting.split_looks import holm, look_alpha
from sweeper.reporting.text_table import capital, point_words
from sweeper.reporting.time_ratio import on_cpu, time_ratio
from sweeper.reporting.verdict_doubts import (
    RangeEdge,
    VerdictDoubt,
    doubts,
    label,
    range_edges,
    reference_arm,
    renamed,
    with_override,
)
from sweeper.reporting.verdict_words import (
    adoption_sentences,
    comparison_sentences,
    forgetting_headline,
    forgetting_sentences,
    headline,
    look_sentence,
    recipe_headline,
    recipe_sentences,
    seed_sentences,
    single_arm_sentence,
    visible_sentence,
)

LARGEST_TEST_RATIO = 0.4
"""Share of the rows in a test split beyond which more of them are no advice."""


FIXED_SEEDS = {"seed_init": "the initialisation", "seed_data": "the order of the rows"}
"""What a seed of its own fixes, by setting."""


@dataclass(frozen=True)
class Verdict:
    """The answer of a study to how its arms compare."""

    objective: Objective
    sides: tuple[ArmSide, ...]
    """One side per arm with a finished trial."""
    duels: tuple[ArmComparison, ...]
    """Each arm compared with the reference arm."""
    failed: tuple[tuple[str, str], ...]
    """Label of each arm without a finished trial, and the number of its trials by outcome."""
    doubts: tuple[VerdictDoubt, ...]
    untested: str | None = None
    """Reason why the arms are not compared on the test split."""
    misfits: tuple[tuple[str, MemoryShortfall], ...] = ()
    """Arms that were not run because their training needs more memory than the device has."""
    edges: tuple[RangeEdge, ...] = ()
    """Settings of the winners that lie at an end of what was offered."""
    settling: tuple[str, ...] = ()
    """Commands that would decide what is undecided."""
    look: int | None = None
    """Number of this look at the test split in the study's family. None: an older version looked."""
    other_looks: int = 0
    """Looks of other studies at the same test split."""
    served: tuple[ServedContrast, ...] = ()
    """Winners in the forms in which they are served."""
    served_as: tuple[tuple[str, ServeForm], ...] = ()
    """Arms whose winner was compared in another form than the trained one, and that form."""
    protocol: tuple[str, ...] = ()
    """How the arms were searched, and what more trials would be expected to bring, in sentences."""
    recipes: tuple[RecipeGain, ...] = ()
    """What the search of each arm with a recipe gained over the recipe."""

    @property
    def provisional(self) -> bool:
        """True if another run could still change the answer."""
        return bool(self.doubts)

    @property
    def headline(self) -> str:
        """The answer in one or two sentences."""
        lines = (self.outcome_line, self.recipe_line, self.forgetting_line, self.served_line)
        return " ".join(filter(None, lines))

    @property
    def recipe_line(self) -> str:
        """The gain of each search over its recipe without figures, or '' without recipes."""
        return " ".join(filter(None, map(recipe_headline, self.recipes)))

    @property
    def labels(self) -> dict[str, str]:
        """Label of each arm with a finished trial."""
        return {side.arm: side.label for side in self.sides}

    @property
    def served_line(self) -> str:
        """The warning that a winner as it is served differs from the judged model, or ''."""
        return served_warning(self.served, self.labels)

    @property
    def forgetting_line(self) -> str:
        """The arms that forget more than their reference beyond doubt, or ''."""
        return " ".join(filter(None, (forgetting_headline(duel) for duel in self.duels)))

    @property
    def outcome_line(self) -> str:
        """The outcome of the comparisons, without figures."""
        found = [headline(duel) for duel in self.duels]
        if not found:
            found = [single_arm_sentence(side, self.objective) for side in self.sides]
        words = " ".join(found) or "No trial has finished."
        return f"Provisional: {words}" if self.provisional else words

    @property
    def commands(self) -> tuple[str, ...]:
        """Commands that settle what is provisional or undecided."""
        named = [*(doubt.command for doubt in self.doubts), *self.settling]
        return tuple(dict.fromkeys(f"python -m sweeper {command}" for command in named))

    @property
    def settling_words(self) -> str:
        """The smallest gap that an undecided study could have seen, and what would decide it."""
        return " ".join(filter(None, (visible_sentence(duel) for duel in self.duels)))

    def recipe_words(self, arm: str) -> str:
        """Return what the search of an arm gained over its recipe, or ''."""
        found = (gain for gain in self.recipes if gain.arm == arm)
        return " ".join(words for gain in found for words in recipe_sentences(gain))

    @property
    def words(self) -> str:
        """The answer in a few sentences."""
        return " ".join(_sentences(self))

    @property
    def text(self) -> str:
        """The sentences, followed by the commands that settle what is provisional or undecided."""
        if not self.commands:
            return self.words
        commands = (f"    {command}" for command in self.commands)
        return "\n".join([f"{self.words}\n\nTo settle it, run:\n", *commands])

    def document(self) -> dict[str, Any]:
        """Return figures, reasons and sentences as JSON values."""

        def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v.model_dump() if isinstance(v, BaseModel) else v for k, v in items}

        return {
            "provisional": self.provisional,
            **asdict(self, dict_factory=plain),
            "misfits": {name: misfit.model_dump() for name, misfit in self.misfits},
            "served": [each.model_dump() for each in self.served],
            "words": self.words,
        }


def judge(results: StudyResults) -> Verdict:
    """Return the verdict on a study, finished or not.

    The verdict is PROVISIONAL if an arm's best learning rate is in the outer tenth of its range or was
    hardly searched, if an arm's budget is below the rule in conf/hydra/sweeper/study.yaml (fairness), or
    if an adopted arm was trained differently or its search is unknown.
    """
    # An arm without a finished trial has nothing to compare and is listed as failed.
    sides = {arm.name: _side(results, arm) for arm in results.arms if arm.best is not None}
    reference = reference_arm(results)
    found = doubts(results)
    duels = [
        _compare(results, sides[name], sides[reference.name], settled=not found)
        for name in sides
        if reference is not None and reference.name in sides and name != reference.name
    ]
    duels, gains = _decided(results, duels, list(_gains(results, sides, settled=not found)))
    duels = [_timed(results, duel) for duel in duels]
    looked = bool(results.contrasts or results.recipe_contrasts)
    failed = [(label(arm), _outcomes(arm)) for arm in results.arms if arm.best is None]
    return Verdict(
        results.objective,
        tuple(sides.values()),
        tuple(duels),
        tuple(failed),
        tuple(found),
        results.untested,
        tuple(results.misfits.items()),
        tuple(range_edges(results)),
        # A doubt has a command of its own, and decides what else is worth running.
        () if found else tuple(_settling(results, duels)),
        results.look if looked else None,
        results.other_looks if looked else 0,
        results.served,
        served_as(results) if looked else (),
        (*protocol_sentences(results), *outlook_sentences(results)),
        tuple(gains),
    )


def served_as(results: StudyResults) -> tuple[tuple[str, ServeForm], ...]:
    """Return the LoRA arms whose winner is judged in another form than the trained one."""
    found = (
        (arm.name, arm.settings.get("evaluation.serve_as", "trained"))
        for arm in results.arms
        if arm.settings.get("adapter.method") == "lora"
    )
    return tuple((name, form) for name, form in found if form != "trained")


def _decided(
    results: StudyResults, duels: list[ArmComparison], gains: list[RecipeGain]
) -> tuple[list[ArmComparison], list[RecipeGain]]:
    """Return the comparisons of arms and with recipes with what their p values show.

    All of them are one family, whose error is bounded at the level that the looks leave.
    """
    # Looks that an older version did not count may have been many. Its seeds are not fresh either.
    alpha = look_alpha(results.look or 1)
    of_arms = [results.contrast(duel.side.arm) for duel in duels]
    # A recipe that was not judged on the test split asks nothing of it, and costs the others nothing
    judged = {gain.arm: results.recipe_contrast(gain.arm) for gain in gains}
    family = [*of_arms, *(found for found in judged.values() if found is not None)]
    leads = holm([_p(each.p_value if each else None) for each in family], alpha)
    same = holm([_p(each.equivalence_p if each else None) for each in family], alpha)
    shown = iter(zip(leads, same, strict=True))

    def with_evidence(duel: ArmComparison) -> ArmComparison:
        lead, equal = next(shown)
        found = replace(duel.evidence, ahead=lead, equivalent=equal, level=alpha)
        return replace(duel, evidence=found)

    decided = [with_evidence(duel) for duel in duels]
    return decided, [
        gain
        if gain.comparison is None or judged[gain.arm] is None
        else replace(gain, comparison=with_evidence(gain.comparison))
        for gain in gains
    ]


def _timed(results: StudyResults, duel: ArmComparison) -> ArmComparison:
    """Return the comparison with the ratio of the arms' times."""
    arms = {arm.name: arm for arm in results.arms}
    own, reference = arms[duel.side.arm], arms[duel.reference.arm]
    cpu = on_cpu(own) and on_cpu(reference)
    return replace(duel, time=time_ratio(own, reference), on_cpu=cpu)


def _p(value: float | None) -> float:
    return 1.0 if value is None else value


def _settling(results: StudyResults, duels: list[ArmComparison]) -> Iterator[str]:
    """Yield the commands that would decide an undecided comparison, where seeds or rows can."""
    for duel in duels:
        needed = duel.needed
        if duel.outcome != "undecided" or needed is None or needed.seeds > MOST_SEEDS:
            continue
        command, ratio = results.command, results.arms[0].settings.get("data.test_ratio")
        if needed.rows > 1:
            # Other rows are another test split, which this study must not see after its search.
            more = (ratio or 0.0) * needed.rows
            if not 0 < more <= LARGEST_TEST_RATIO:
                continue
            command = with_override(renamed(results, "rows"), "data.test_ratio", f"{more:.2g}")
        key = "hydra.sweeper.finalists.fresh_seeds"
        yield with_override(command, key, str(needed.seeds))


def _side(results: StudyResults, arm: ArmResult) -> ArmSide:
    best = arm.best
    assert best is not None
    assert best.value is not None
    return ArmSide(
        arm=arm.name,
        label=label(arm),
        point=_point(arm, best),
        value=best.value,
        base_value=arm.base_value,
        test_loss=None if arm.final is None else arm.final.test_loss,
        untuned_test_loss=None if arm.final is None else arm.final.untuned_test_loss,
        forgetting=results.forgotten(arm.name),
        seeds=results.seeds(arm.name),
        trials=arm.tried if arm.adopted is None else arm.adopted.trials,
        trainable=best.metric("parameters/trainable"),
        device_seconds=arm.device_seconds,
        seconds_per_trial=arm.seconds_per_trial,
        peak_memory_mib=best.metric("cost/peak_memory_mib"),
        artifact_mib=best.metric("cost/artifact_mib"),
        run_id=None if arm.adopted is None else arm.adopted.run_id,
        failed_seeds="" if arm.final is None else _failed_seeds(label(arm), _seeds_of(arm.final)),
    )


def _seeds_of(final: FinalistRanking) -> tuple[SeedRepeat, ...]:
    return (*final.of_winner.repeats, *final.judged)


def _failed_seeds(name: str, repeats: Sequence[SeedRepeat]) -> str:
    """Return how many seeds of a configuration diverged or ran out of memory, or ''."""
    failed = impossible(repeats)
    if not failed:
        return ""
    causes = Counter(
        repeat.outcome.cause
        for repeat in repeats
        if repeat.outcome is not None and impossible([repeat])
    )
    words = {"oom": "ran out of memory", "refused": "could not be trained"}
    said = ", ".join(
        f"{count} of {len(repeats)} seeds {words.get(cause, cause)}"
        for cause, count in causes.items()
    )
    return f"{capital(name)} is unstable: {said}."


def _point(arm: ArmResult, best: TrialResult) -> str:
    if arm.adopted is not None:
        return f"adopted from MLflow run {arm.adopted.run_id}"
    return point_words(best.params)


def _compare(
    results: StudyResults, side: ArmSide, reference: ArmSide, *, settled: bool
) -> ArmComparison:
    """Compare two arms on the test split if both were evaluated there, else on the validation split."""
    objective, found = results.objective, results.contrast(side.arm)
    # The validation split selected the winners, so the test split is preferred.
    if found is not None and found.reference == reference.arm:
        return ArmComparison(
            side=side,
            reference=reference,
            objective=objective,
            split=found.split,
            values=found.losses,
            difference=found.difference,
            retained=found.retained,
            noise=found.noise,
            base=found.base_loss,
            evidence=replace(_evidence(results, found), settled=settled),
        )
    # Both gains count from the reference's base: a base that NF4 made worse must not flatter QLoRA.
    base = reference.base_value
    values = _validation(results, side), _validation(results, reference)
    gain, reference_gain = (objective.gain(value, over=base) for value in values)
    return ArmComparison(
        side=side,
        reference=reference,
        objective=objective,
        split="validation",
        values=values,
        difference=IntervalEstimate(value=values[0] - values[1]),
        retained=IntervalEstimate(value=100 * gain / reference_gain)
        if reference_gain > 0
        else None,
        noise=(None, None),
        base=base,
        evidence=ComparisonEvidence(settled=settled),
    )


def _gains(
    results: StudyResults, sides: Mapping[str, ArmSide], *, settled: bool
) -> Iterator[RecipeGain]:
    """Yield the comparison of each arm's winner with the arm's recipe, where there is one."""
    for arm in results.arms:
        recipe = None if arm.final is None else arm.final.recipe
        if recipe is not None and arm.name in sides:
            yield _recipe_gain(results, arm, sides[arm.name], recipe, settled=settled)


def _recipe_gain(
    results: StudyResults, arm: ArmResult, side: ArmSide, recipe: RecipeResult, *, settled: bool
) -> RecipeGain:
    """Compare an arm's winner with its recipe, on the test split if both were judged there."""
    gain = RecipeGain(arm.name, side.label, recipe.name, recipe.source, settled)
    if arm.best is None or recipe.number == arm.best.number:
        return gain
    known = _recipe_side(arm, side, recipe)
    values = _validation(results, side), known.value
    comparison = ArmComparison(
        side=side,
        reference=known,
        objective=results.objective,
        split="validation",
        values=values,
        difference=IntervalEstimate(value=values[0] - values[1]),
        retained=None,
        noise=(None, None),
        base=side.base_value,
        evidence=ComparisonEvidence(settled=settled),
    )
    found = results.recipe_contrast(arm.name)
    if found is not None:
        comparison = replace(
            comparison,
            split=found.split,
            values=found.losses,
            difference=found.difference,
            noise=found.noise,
            base=found.base_loss,
            evidence=replace(_evidence(results, found), settled=settled),
        )
    failed = _failed_seeds(known.label, recipe.judged)
    return replace(gain, comparison=comparison, failed_seeds=failed)


def _recipe_side(arm: ArmResult, side: ArmSide, recipe: RecipeResult) -> ArmSide:
    """Return the side of an arm's recipe, with which the side of the arm's winner is compared."""
    trial = next(each for each in arm.trials if each.number == recipe.number)
    value = statistics.fmean(recipe.values) if recipe.values else trial.value
    assert value is not None, "a recipe was tried to its end"
    return replace(
        side,
        label=f"the recipe {recipe.name}",
        point=point_words(trial.params),
        value=value,
        test_loss=None,
        forgetting=None,
        seeds=len(recipe.test_losses) or len(recipe.values) or 1,
        failed_seeds="",
    )


def _evidence(results: StudyResults, found: ArmContrast) -> ComparisonEvidence:
    margin = results.equivalence_margin
    size = None
    if margin is not None:
        gain = abs(found.base_loss - found.losses[1])
        size = margin.absolute if margin.share is None else margin.share * gain
    return ComparisonEvidence(
        standard_error=found.standard_error,
        freedom=found.freedom,
        seed_share=found.seed_share or 0.0,
        seeds=found.seeds,
        fresh=found.fresh,
        margin=margin,
        margin_size=size,
        fixed_seeds=tuple(
            words
            for key, words in FIXED_SEEDS.items()
            if any(arm.settings.get(key) is not None for arm in results.arms)
        ),
    )


def _validation(results: StudyResults, side: ArmSide) -> float:
    """Return an arm's value on the validation split: the mean over its winner's seeds."""
    arm = next(each for each in results.arms if each.name == side.arm)
    # Where nothing was repeated, the trial's own value is all there is.
    repeats = () if arm.final is None else arm.final.repeats
    values = [repeat.value for repeat in repeats if repeat.value is not None]
    return statistics.fmean(values) if values else side.value


def _outcomes(arm: ArmResult) -> str:
    causes = Counter(trial.outcome.cause for trial in arm.trials)
    return (
        ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        or "no trial has ended"
    )


def _sentences(verdict: Verdict) -> Iterator[str]:
    if verdict.doubts:
        yield "PROVISIONAL: another run could change this answer."
        yield from (f"{capital(doubt.reason)}." for doubt in verdict.doubts)
    for duel in verdict.duels:
        yield from comparison_sentences(duel)
        if (words := visible_sentence(duel)) is not None:
            yield words
    if not verdict.duels:
        yield from (single_arm_sentence(side, verdict.objective) for side in verdict.sides)
    for gain in verdict.recipes:
        yield from recipe_sentences(gain)
    yield from adoption_sentences(verdict.sides)
    yield from (f"{capital(edge.reason)}." for edge in verdict.edges)
    yield from forgetting_sentences(verdict.sides)
    yield from served_sentences(verdict.served, verdict.labels, verdict.served_as)
    yield from verdict.protocol
    yield from _missing_sentences(verdict)
    # Comparisons share their reference, of which each says the same.
    yield from dict.fromkeys(words for duel in verdict.duels for words in seed_sentences(duel))
    if (words := look_sentence(verdict.look, verdict.other_looks)) is not None:
        yield words
    if verdict.sides and verdict.untested is not None:
        yield f"Not evaluated on the test split: {verdict.untested}."


def _missing_sentences(verdict: Verdict) -> Iterator[str]:
    """Yield the arms that have no result, and why."""
    if not verdict.sides:
        yield "No trial has finished, so there is nothing to compare."
    elif not verdict.duels:
        yield "There is no other arm with a finished trial to compare it with."
    for name, outcomes in verdict.failed:
        yield f"{capital(name)} has no finished trial ({outcomes})."
    for arm, misfit in verdict.misfits:
        yield f"Arm {arm} does not fit the device and was not run: {misfit}."
