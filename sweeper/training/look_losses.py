"""Store the losses of each row that a trial's looks were at: look_losses.jsonl, one line for each look.

Two trials look at the same rows, so the difference of two looks has a tenth of the noise that each of
them has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from sweeper.core.paths import write_atomic
from sweeper.core.stored_files import read_words
from sweeper.data.tokens import Tokens
from sweeper.evaluation.token_loss import LossSum


@dataclass(frozen=True)
class StoredLook:
    """The losses of one look."""

    step: int
    rows: str
    """The sha256 of the rows. Two looks compare row by row only if it is equal."""
    nll: tuple[float, ...]
    """Summed negative log-likelihood of each row's target tokens, in nats."""
    tokens: tuple[int, ...]
    """Number of target tokens of each row."""
    # not compared, because the same look takes another time when it is made again
    cpu_seconds: float | None = field(default=None, compare=False)
    """CPU seconds of the look, or None if an older version stored it."""


@dataclass
class LookLosses:
    """Writer of look_losses.jsonl for one attempt of a trial."""

    path: Path
    rows: Sequence[Tokens]
    """Rows that the looks are at."""
    resumed_at: int
    """Optimizer step from which the attempt continues, 0 for a first attempt."""

    def __post_init__(self) -> None:
        """Remove the looks of earlier attempts that this one makes again."""
        kept = [look for look in read_looks(self.path) if look.step <= self.resumed_at]
        write_atomic(self.path, "".join(map(_line, kept)))

    def write(self, step: int, losses: Sequence[LossSum], cpu_seconds: float | None = None) -> None:
        """Append a look, with the CPU seconds that it took."""
        nll, tokens = (
            tuple(loss.nll for loss in losses),
            tuple(loss.tokens for loss in losses),
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(StoredLook(step, self.digest, nll, tokens, cpu_seconds)))

    @cached_property
    def digest(self) -> str:
        """The sha256 over the tokens and labels of the rows."""
        rows = [[list(row["input_ids"]), list(row["labels"])] for row in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_looks(path: Path) -> list[StoredLook]:
    """Return the stored looks of a trial in their order. A line that is no look is left out."""
    found = map(_look, read_words(path).splitlines())
    return [look for look in found if look is not None]


def _line(look: StoredLook) -> str:
    return json.dumps(asdict(look)) + "\n"


def _look(line: str) -> StoredLook | None:
    try:
        found = json.loads(line)
        losses = tuple(map(float, found["nll"])), tuple(map(int, found["tokens"]))
        seconds = found.get("cpu_seconds")
        spent = None if seconds is None else float(seconds)
        return StoredLook(int(found["step"]), str(found["rows"]), *losses, spent)
    # cut by a power failure, or nested deeper than Python reads
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
