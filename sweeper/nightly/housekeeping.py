"""Cleanup after a night by the set's `retention` policy.

Weights are deleted by the rules of `sweeper clean`. Runs that users deleted in MLflow are removed for
good after a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sweeper.commands.retention import removals, remove
from sweeper.core.errors import StudyError
from sweeper.nightly.nightly_set import RetentionPolicy
from sweeper.tracking.registry import ModelRegistry


def tidy(
    policy: RetentionPolicy,
    studies: Sequence[str],
    output_dir: Path,
    registries: Sequence[ModelRegistry],
) -> list[str]:
    """Delete by the policy, or only list the deletions if policy.dry_run is set.

    Args:
        policy: the set's policy.
        studies: names of the set's studies, of tonight and of earlier nights.
        output_dir: parent of the studies' folders.
        registries: registries whose champions are kept.

    Returns:
        One line per study or store with deletions.

    Raises:
        TrackingError: a registry's champions cannot be read. Nothing is deleted then.
        StudyLocked: one of the studies is running.
        OSError: a file cannot be deleted.
    """
    lines: list[str] = []
    if policy.keep_adapters is not None:
        # Read before anything is deleted: if a registry is away, nothing is deleted.
        champions = [found.folder for registry in registries for found in registry.champions()]
        for name in studies:
            lines += _clean(name, output_dir, policy.keep_adapters, champions, policy.dry_run)
    if policy.mlflow_deleted_after is not None:
        after = policy.mlflow_deleted_after
        found = [registry.collect_deleted(after, dry_run=policy.dry_run) for registry in registries]
        lines += [words for words in found if words is not None]
    return lines


def _clean(
    name: str, output_dir: Path, keep: int, champions: Sequence[Path], dry_run: bool
) -> Iterator[str]:
    try:
        found = removals(name, output_dir, keep, champions)
    except StudyError:
        return  # the study has no results yet, or was deleted by hand
    if not found:
        return
    if not dry_run:
        remove(name, output_dir, found)
    reasons = dict.fromkeys(removal.why for removal in found)
    mib = sum(removal.mib for removal in found)
    would = "would be freed" if dry_run else "freed"
    yield f"{name}: {mib:.1f} MiB {would} ({len(found)} × {', '.join(reasons)})"
