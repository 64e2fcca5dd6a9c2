"""The looks at a test split: how often a question was asked of it, and what that leaves to be found.

Every look at the same rows may find a lead by chance. The first may be wrong in 4.5 % of studies, all
later ones together in 1.5 %. Looks are counted for each test split and each family of a question: a
study, its extensions and its forks. They are recorded beside the study from which the family began.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from sweeper.config.settings import StudyName
from sweeper.core.errors import StudyError
from sweeper.core.paths import StudyFolder, write_atomic
from sweeper.core.stored_files import read_stored
from sweeper.core.value import FrozenValue

FIRST_ALPHA = 0.045
LATER_ALPHA = 0.015
"""Probability of a false lead over all looks after the first. Each gets half of what is left."""


def look_alpha(look: int) -> float:
    """Return the probability of a false lead that a look at the split may have."""
    # 0.015 * (1/2 + 1/4 + …) is 0.015, however many looks follow.
    return FIRST_ALPHA if look == 1 else LATER_ALPHA / 2 ** (look - 1)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which of several hypotheses are rejected at a family-wise error of alpha (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected


class SplitLook(FrozenValue):
    """One look at a test split: what was compared on it, and when."""

    at: datetime
    study: str
    split: str
    """Digest of the rows that were looked at."""
    models: str
    """Digest of the models that were compared. The same models again are no further look."""


class LookLedger(FrozenValue):
    """The looks of a family of studies."""

    looks: tuple[SplitLook, ...] = ()
    fork_of: StudyName | None = None
    """The study that this one was forked from, whose folder holds the family's looks."""


@dataclass(frozen=True)
class CountedLook:
    """The number of a look in its family, and how many other studies looked at the same rows."""

    number: int
    others: int


def models_digest(judged: Mapping[str, tuple[int, Iterable[int]]]) -> str:
    """Return the digest of the models of a comparison: each arm's winner and its judged seeds."""
    parts = {arm: [winner, sorted(seeds)] for arm, (winner, seeds) in judged.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def count_look(
    folder: StudyFolder, fork_of: str | None, split: str, models: str, now: datetime | None = None
) -> CountedLook:
    """Record a look at a split, unless the same models were compared on it before, and count it.

    Args:
        folder: the study's folder.
        fork_of: the study that this one was forked from.
        split: digest of the rows of the test split.
        models: digest of what was compared.
        now: the time of the look.
    """
    study, outputs = folder.path.name, folder.path.parent
    own = _read(folder)
    if own.fork_of != fork_of:
        own = own.model_copy(update={"fork_of": fork_of})
        _write(folder, own)
    root = _root(folder, fork_of)
    ledger = own if root == folder else _read(root)
    seen = [look for look in ledger.looks if look.split == split]
    known = [look.study == study and look.models == models for look in seen]
    if not any(known):
        look = SplitLook(at=now or datetime.now(UTC), study=study, split=split, models=models)
        _write(root, ledger.model_copy(update={"looks": (*ledger.looks, look)}))
    number = 1 + known.index(True) if any(known) else 1 + len(seen)
    return CountedLook(number, _others(outputs, split, root.path.name))


def _root(folder: StudyFolder, fork_of: str | None) -> StudyFolder:
    """Return the folder of the study from which the family began, as far as it is still there."""
    root, visited = folder, {folder.path.name}
    while fork_of is not None and fork_of not in visited:
        parent = StudyFolder(folder.path.parent / fork_of)
        if not parent.path.exists():
            break
        visited.add(fork_of)
        root, fork_of = parent, _read(parent).fork_of
    return root


def _others(outputs: Path, split: str, family: str) -> int:
    """Return how many looks of other families at the same rows are recorded in the same folder."""
    paths = [path.parent for path in outputs.glob("*/looks.json") if path.parent.name != family]
    # another study's damaged file must not end this one
    found = (
        read_stored(
            StudyFolder(path).looks, LookLedger, "its looks at the test split are not counted"
        )
        for path in paths
    )
    return sum(look.split == split for ledger in found if ledger for look in ledger.looks)


def _read(folder: StudyFolder) -> LookLedger:
    try:
        return LookLedger.model_validate_json(folder.looks.read_bytes())
    except FileNotFoundError:
        return LookLedger()
    except ValidationError as error:
        raise StudyError(
            f"{folder.looks} cannot be read, so the looks at the test split cannot be counted: "
            f"{error.error_count()} errors. Restore the file, or remove it to count from one again"
        ) from None


def _write(folder: StudyFolder, ledger: LookLedger) -> None:
    write_atomic(folder.looks, ledger.model_dump_json(indent=2) + "\n")
