"""The answer that an earlier run left in a study's folder, and when a new one may replace it."""

from __future__ import annotations

from dataclasses import dataclass

from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder
from sweeper.reporting.results import ArmResult, StudyResults, load_results


@dataclass(frozen=True)
class StoredAnswer:
    """An answer in a study's folder."""

    folder: StudyFolder
    results: StudyResults | None
    """The results, or None if this version cannot read them."""

    def yields_to(self, results: StudyResults) -> bool:
        """Return True if results of a run that has not come to its end may replace the answer."""
        # an answer that cannot be read cannot be compared, so only a finished run replaces it
        return self.results is not None and is_richer(results, self.results)

    def __str__(self) -> str:
        """Return the place of the answer, with the trials and finalists that it rests on."""
        files = (self.folder.page, self.folder.report, self.folder.results)
        place = next((path for path in files if path.exists()), self.folder.results)
        if self.results is None:
            return str(place)
        trials = sum(arm.tried for arm in self.results.arms)
        finalists = sum(len(arm.final.finalists) for arm in self.results.arms if arm.final)
        return f"{place} ({trials} trials, {finalists} finalists)"


def find_answer(folder: StudyFolder) -> StoredAnswer | None:
    """Return the answer in a study's folder, or None if no run has written one."""
    if not folder.results.exists():
        return None
    try:
        return StoredAnswer(folder, load_results(folder.path.name, folder.path.parent))
    except StudyError:
        return StoredAnswer(folder, None)


def is_richer(results: StudyResults, earlier: StudyResults) -> bool:
    """Return True if results rest on all that earlier results rest on, and on more.

    Compared are each arm's numbers of counted trials, of its finalists' seeds, and of the winner's
    losses on the test split and on general text.
    """
    now, then = _counts(results), _counts(earlier)
    return now != then and all(now.get(name, 0) >= count for name, count in then.items())


def _counts(results: StudyResults) -> dict[str, int]:
    return {
        f"{arm.name} {part}": count for arm in results.arms for part, count in _parts(arm).items()
    }


def _parts(arm: ArmResult) -> dict[str, int]:
    if arm.final is None:
        return {"trials": arm.tried}
    values = [value for finalist in arm.final.finalists for value in finalist.values]
    return {
        "trials": arm.tried,
        "finalists": len(values),
        "test losses": len(arm.final.test_losses),
        "general losses": len(arm.final.general_losses),
    }
