"""Retention of weights: which weights of a study are kept. Its figures are never deleted.

The policy applies at the end of every study, to `sweeper clean` and to nights. Kept are the weights
that a report refers to (each arm's best trial, its finalists with their seeds, a Pareto front, a
registry's champion, a fork's trials) and the best `adapters` adapters. Every other adapter, full
fine-tune's weights, merged model and archive is deleted, as is the resume state of trials that
ended. Optuna's storage, metrics, logs, configs and reports stay: they are small, and a trial
without weights can be trained again from its config.yaml.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sweeper.core.errors import StudyLocked
from sweeper.core.outcome import stored_outcome
from sweeper.core.paths import StudyFolder, TrialFolder, size_mib
from sweeper.reporting.results import ArmResult, StudyResults, TrialResult, load_results
from sweeper.search.states import STATES


@dataclass(frozen=True)
class Removal:
    """A path that is, or would be, deleted."""

    path: Path
    mib: float
    why: str


def kept(results: StudyResults, folder: StudyFolder, adapters: int) -> list[TrialFolder]:
    """Return the folders of a study whose weights stay, the best adapters first.

    Args:
        results: the study's results.
        folder: the study's folder.
        adapters: number of best adapters that stay in any case.
    """
    trials = [folder.trial(trial.arm, trial.number) for trial in _ranked(results)]
    best = [trial for trial in trials if trial.adapter.is_dir()][:adapters]
    pointed = [found for arm in results.arms for found in _pointed_to(arm, folder)]
    return list(dict.fromkeys([*best, *pointed]))


def removals(
    study_name: str, output_dir: Path, adapters: int, champions: Collection[Path] = ()
) -> list[Removal]:
    """Return what the policy deletes of a study that has results.

    Raises:
        StudyError: there is no such study.
    """
    results = load_results(study_name, output_dir)
    return losers(results, StudyFolder(output_dir / study_name), adapters, champions)


def losers(
    results: StudyResults, folder: StudyFolder, adapters: int, champions: Collection[Path] = ()
) -> list[Removal]:
    """Return what the policy deletes.

    Args:
        results: the study's results.
        folder: the study's folder.
        adapters: number of best adapters that stay.
        champions: folders of trials that a registry refers to.
    """
    held = {found.path.resolve() for found in kept(results, folder, adapters)}
    held |= {path.resolve() for path in champions} | set(_forked(folder))
    return [
        found
        for arm in results.arms
        for path, trial in _trial_folders(folder, arm.name)
        if not path.is_symlink()  # a fork's trial belongs to the study it was made in
        for found in _removals_of(TrialFolder(path), trial.resolve() in held)
    ]


def delete(found: Sequence[Removal]) -> float:
    """Delete what `removals` found. The caller holds the study's lock.

    Returns:
        The freed space in MiB.
    """
    for removal in found:
        if removal.path.is_dir():
            shutil.rmtree(removal.path)
        else:
            removal.path.unlink()
    return sum(removal.mib for removal in found)


def remove(study_name: str, output_dir: Path, found: Sequence[Removal]) -> None:
    """Delete what `removals` found, under the study's lock.

    Raises:
        StudyLocked: the study is running.
    """
    try:
        with FileLock(StudyFolder(output_dir / study_name).lock, timeout=0):
            delete(found)
    except Timeout:
        raise StudyLocked(f"study {study_name!r} is running. Clean it when it has ended") from None


def _ranked(results: StudyResults) -> list[TrialResult]:
    """Return the complete trials of all arms, the best first."""
    valued = [
        (results.objective.order(trial.value), trial)
        for arm in results.arms
        for trial in arm.trials
        if trial.complete and trial.value is not None
    ]
    return [trial for _, trial in sorted(valued, key=lambda found: found[0])]


def _pointed_to(arm: ArmResult, folder: StudyFolder) -> Iterator[TrialFolder]:
    """Return the trials that the report names or whose weights its held-out figures come from."""
    numbers = list(arm.front) + ([] if arm.best is None else [arm.best.number])
    for finalist in () if arm.final is None else arm.final.finalists:
        numbers.append(finalist.number)
        for repeat in finalist.repeats:
            yield folder.finalist(arm.name, finalist.number, repeat.seed)
    for number in numbers:
        yield folder.trial(arm.name, number)


def _forked(folder: StudyFolder) -> Iterator[Path]:
    """Return the trials that a fork of this study links to."""
    # A fork lies in the same output_dir.
    for path in folder.path.parent.glob("*/*/trial_*"):
        if path.is_symlink():
            yield path.resolve()


def _trial_folders(folder: StudyFolder, arm: str) -> Iterator[tuple[Path, Path]]:
    """Yield every folder with weights and the trial that decides on it (a further seed's trial)."""
    for path in sorted((folder.path / arm).glob("trial_*")):
        yield path, path
    for path in sorted(folder.finalists(arm).glob("trial_*_seed_*")):
        yield path, folder.path / arm / path.name.partition("_seed_")[0]


def _removals_of(trial: TrialFolder, is_kept: bool) -> Iterator[Removal]:
    if _ended(trial):
        yield from _existing(trial.checkpoints, "checkpoints of a trial that ended")
    elif trial.checkpoints.exists():
        return  # it may still be resumed
    if is_kept:
        return
    yield from _existing(trial.merged, "base and adapter as one")
    for archive in sorted(trial.path.glob("*.zip")):
        yield from _existing(archive, "copy of the weights")
    yield from _existing(trial.model, "weights of a full fine-tune that is no finalist")
    yield from _existing(trial.adapter, "adapter of a loser")


def _ended(trial: TrialFolder) -> bool:
    """Return True if a trial ended for good. A cancelled trial continues from its checkpoints."""
    outcome = stored_outcome(trial)
    return outcome is not None and not STATES[outcome.cause].open


def _existing(path: Path, why: str) -> Iterator[Removal]:
    if path.is_dir():
        yield Removal(path, size_mib(path), why)
    elif path.exists():
        yield Removal(path, path.stat().st_size / 2**20, why)
