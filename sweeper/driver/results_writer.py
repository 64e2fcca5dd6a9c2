"""Writes results.json and report.md while a study runs and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sweeper.core.paths import StudyFolder, write_atomic, write_json
from sweeper.core.value import EquivalenceMargin, MemoryShortfall
from sweeper.driver.study_state import StudyState
from sweeper.reporting.finalist_results import ArmConclusion, FinalistRanking, finalists_seconds
from sweeper.reporting.held_out_results import (
    LEFT_ALONE,
    NOT_ENDED,
    PROVISIONAL,
    SWITCHED_OFF,
    settle,
)
from sweeper.reporting.result_tables import markdown_report
from sweeper.reporting.results import StudyResults, collect_arm, to_document
from sweeper.reporting.split_looks import count_look, models_digest
from sweeper.reporting.stored_answer import StoredAnswer, find_answer
from sweeper.reporting.verdict import judge
from sweeper.reporting.verdict_doubts import doubts
from sweeper.search.study import MARGIN

WRITING_SHARE = 0.05
"""Share of the driver's time that may be spent on results while a study runs."""


@dataclass
class ResultsWriter:
    """Collects the results of all arms from their studies, and writes them."""

    state: StudyState
    folder: StudyFolder
    provenance: Mapping[str, str]
    announce: Callable[[str], None]
    misfits: dict[str, MemoryShortfall] = field(default_factory=dict)
    """Arms that are larger than the device, by name."""
    finals: dict[str, ArmConclusion] | None = None
    """The arms' finalists, once they have run."""
    unsettled: bool = False
    """True if the test split was left unread because the answer is PROVISIONAL."""
    earlier: StoredAnswer | None = field(init=False)
    """The answer that was there before this run."""
    _next_write: float = 0.0

    def __post_init__(self) -> None:
        self.earlier = find_answer(self.folder)

    def collect(self) -> StudyResults:
        """Return the results so far."""
        plan, studies = self.state.plan, self.state.studies
        results = StudyResults(
            study_name=plan.study.study_name,
            command=plan.command,
            provenance=self.provenance,
            arms=tuple(
                collect_arm(
                    arm,
                    studies[arm.name],
                    plan.study.costs,
                    finalists_seconds(self.folder, arm.name),
                )
                for arm in plan.arms
                if arm.name in studies
            ),
            fairness=plan.study.fairness,
            untested=NOT_ENDED if plan.study.finalists.top else SWITCHED_OFF,
            misfits=self.misfits,
            equivalence_margin=self._margin(),
            protocol=plan.study.protocol,
            pruner=plan.study.pruner.class_name or plan.study.pruner.name,
        )
        if self.finals is None:
            return results
        unread = PROVISIONAL if self.unsettled else None
        untested = unread if plan.study.finalists.test else LEFT_ALONE
        settled = settle(results.model_copy(update={"untested": untested}), self.finals)
        looked = settled.contrasts or settled.recipe_contrasts
        return self._counted(settled) if looked else settled

    def _margin(self) -> EquivalenceMargin | None:
        """Return the margin that was fixed before the first trial of the first arm."""
        studies = [self.state.studies[arm.name] for arm in self.state.plan.arms
                   if arm.name in self.state.studies]  # fmt: skip
        stored = studies[0].user_attrs.get(MARGIN) if studies else None
        return None if stored is None else EquivalenceMargin.model_validate(stored)

    def _counted(self, results: StudyResults) -> StudyResults:
        """Count the look at the test split that the contrasts are."""
        finals = {arm.name: arm.final for arm in results.arms if arm.final is not None}
        judged = {name: (final.winner, final.test_losses) for name, final in finals.items()}
        judged |= {
            f"{name} recipe": (final.recipe.number, final.recipe.test_losses)
            for name, final in finals.items()
            if final.recipe is not None and final.recipe.test_losses
        }
        # An older worker gives no digest of the test rows. That of all rows differs as they do.
        facts = results.arms[0].facts
        split = facts.test_digest or facts.data_digest
        fork_of = self.state.plan.study.fork_of
        look = count_look(self.folder, fork_of, split, models_digest(judged))
        return results.model_copy(update={"look": look.number, "other_looks": look.others})

    def is_doubtful(self, rankings: Mapping[str, FinalistRanking]) -> bool:
        """Return True if the answer with these winners is PROVISIONAL."""
        results = self.collect()
        arms = [arm.model_copy(update={"final": rankings.get(arm.name)}) for arm in results.arms]
        return bool(doubts(results.model_copy(update={"arms": tuple(arms)})))

    def is_surpassed_by(self, results: StudyResults) -> bool:
        """Return True if results of an unfinished run may replace the answer that was there before."""
        return self.earlier is None or self.earlier.yields_to(results)

    def on_trial_finished(self) -> None:
        """Write the results, so that a report can be read while the study runs or after a crash.

        Skipped while trials end faster than hundreds of them can be written, and while the answer
        of an earlier run is richer.
        """
        began = time.monotonic()
        if began < self._next_write:
            return
        results = self.collect()
        try:
            if self.is_surpassed_by(results):
                self.write(results)
        except OSError as error:  # a full disk: the storage has it all, the next trial tries again
            self.announce(f"results are not written: {error}")
        took = time.monotonic() - began
        self._next_write = began + took / WRITING_SHARE

    def write(self, results: StudyResults) -> None:
        """Write results.json and report.md."""
        verdict = judge(results)
        document = {**to_document(results), "verdict": verdict.document()}
        write_json(self.folder.results, document)
        write_atomic(self.folder.report, markdown_report(results, verdict))
