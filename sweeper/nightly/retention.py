"""Which weights of a study are kept, and the removal of the others; its figures are never touched.

Policy: the best `keep_adapters` adapters of all arms stay, and whatever a registry's champion points
at, with their further seeds. Every other adapter, every full fine-tune's weights, merged model, archive
and checkpoint goes.
Optuna's storage, metrics, logs, configs and reports stay for ever: they are small, and a trial whose
weights are gone can be trained again from its config.yaml.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sweeper.errors import StudyLocked
from sweeper.folders import StudyFolder, TrialFolder, size_mib
from sweeper.reporting.results import load_results


@dataclass(frozen=True)
class Removal:
    """Something that is, or would be, deleted."""

    path: Path
    mib: float
    why: str


def removals(
    study_name: str, output_dir: Path, keep_adapters: int, champions: Collection[Path] = ()
) -> list[Removal]:
    """What the policy deletes of a study.

    Args:
        study_name: a study that has results.
        output_dir: where it is.
        keep_adapters: how many of the best adapters stay.
        champions: folders of trials that a registry points at.

    Raises:
        StudyError: there is no such study.
    """
    results = load_results(study_name, output_dir)
    folder = StudyFolder(output_dir / study_name)
    valued = [
        (results.objective.order(trial.value), trial)
        for arm in results.arms
        for trial in arm.trials
        if trial.complete and trial.value is not None
    ]
    ranked = [trial for _, trial in sorted(valued, key=lambda found: found[0])]
    held = {path.resolve() for path in champions}
    folders = [folder.trial(trial.arm, trial.number) for trial in ranked]
    with_adapter = [each for each in folders if each.adapter.is_dir()]
    held |= {each.path.resolve() for each in with_adapter[:keep_adapters]}
    return [
        found
        for arm in results.arms
        for path, trial in _trials(folder, arm.name)
        if not path.is_symlink()  # a fork's trial belongs to the study it was made in
        for found in _removals_of(TrialFolder(path), trial.resolve() in held)
    ]


def remove(study_name: str, output_dir: Path, found: list[Removal]) -> None:
    """Delete what `removals` found.

    Raises:
        StudyLocked: the study is running.
    """
    try:
        with FileLock(StudyFolder(output_dir / study_name).lock, timeout=0):
            for removal in found:
                if removal.path.is_dir():
                    shutil.rmtree(removal.path)
                else:
                    removal.path.unlink()
    except Timeout:
        raise StudyLocked(f"study {study_name!r} is running; clean it when it has ended") from None


def _trials(folder: StudyFolder, arm: str) -> Iterator[tuple[Path, Path]]:
    """Every folder with weights, and the trial whose rank decides: further seeds go with their trial."""
    for path in sorted((folder.path / arm).glob("trial_*")):
        yield path, path
    for path in sorted(folder.finalists(arm).glob("trial_*_seed_*")):
        yield path, folder.path / arm / path.name.partition("_seed_")[0]


def _removals_of(trial: TrialFolder, kept: bool) -> Iterator[Removal]:
    if trial.outcome.exists():
        yield from _existing(trial.checkpoints, "checkpoints of a trial that ended")
    elif trial.checkpoints.exists():
        return  # it may still be resumed
    yield from _existing(trial.merged, "base and adapter as one: made again from the adapter")
    for archive in sorted(trial.path.glob("*.zip")):
        if not kept:
            yield from _existing(archive, "copy of the weights")
    yield from _existing(trial.model, "weights of a full fine-tune")
    if not kept:
        yield from _existing(trial.adapter, "adapter of a loser")


def _existing(path: Path, why: str) -> Iterator[Removal]:
    if path.is_dir():
        yield Removal(path, size_mib(path), why)
    elif path.exists():
        yield Removal(path, path.stat().st_size / 2**20, why)
