"""After a night: what its studies no longer need is deleted, by the set's policy (`retention`).

Weights go as `sweeper clean` deletes them; runs that people deleted in MLflow go for good after a while.
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
    """Delete what the policy says, or only tell (policy.dry_run).

    Args:
        policy: of the set.
        studies: study names of the set, of tonight and of earlier nights.
        output_dir: where they are.
        registries: whose champions stay.

    Returns:
        What was done, a line each.

    Raises:
        TrackingError: a registry cannot be asked which its champions are; then nothing is deleted.
        StudyLocked: one of the studies is running.
        OSError: the disk refuses.
    """
    lines: list[str] = []
    if policy.keep_adapters is not None:
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
        return  # never got as far as results, or was deleted by hand
    if not found:
        return
    if not dry_run:
        remove(name, output_dir, found)
    reasons = dict.fromkeys(removal.why for removal in found)
    mib = sum(removal.mib for removal in found)
    would = "would be freed" if dry_run else "freed"
    yield f"{name}: {mib:.1f} MiB {would} ({len(found)} × {', '.join(reasons)})"
