"""The last steps of a study, each of which is taken whatever became of the others.

A step waits for space as training does. Any other error is announced, kept, and raised at the end.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sweeper.core.errors import SweeperError, first_line, sentence

SPACE_PATIENCE_S = 15 * 60.0
"""Seconds that all steps together wait for space, as long as a worker waits."""
SPACE_WAIT_S = 2.0
"""Seconds between two looks at the disk, as a worker waits (sweeper.workers.worker)."""
FULL_BYTES, FULL_INODES = 2**20, 16
"""Free bytes and free inodes below which a failed write counts as a full disk. A judgement: reports
and pages are of this order."""


@dataclass
class GuardedSteps:
    """Takes steps one after the other."""

    folder: Path
    """The folder that the steps write to."""
    announce: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    failed: list[Exception] = field(default_factory=list)
    """The errors of the steps that failed, in order."""
    _waited_s: float = 0.0

    def take(self, name: str, step: Callable[[], object]) -> None:
        """Take a step, and wait for space if there is none.

        Args:
            name: what is missing if the step fails, as in "report.html".
            step: the step. It may be repeated.
        """
        told = False
        while True:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the other steps are taken whatever this one does
                if not self._is_waited_for(error):
                    self.failed.append(error)
                    self.announce(f"{name}: not written ({_reason(error)})")
                    return
            else:
                return
            if not told:
                self.announce(f"{name}: no space in {self.folder}. Waiting for space")
                told = True
            self.sleep(SPACE_WAIT_S)
            self._waited_s += SPACE_WAIT_S

    def raise_first(self) -> None:
        """Raise the first error, now that all steps were taken."""
        if self.failed:
            raise self.failed[0]

    def _is_waited_for(self, error: Exception) -> bool:
        return self._waited_s < SPACE_PATIENCE_S and lacks_space(error, self.folder)


def lacks_space(error: Exception, folder: Path) -> bool:
    """Return True if a step failed because its disk has no bytes or no inodes left now."""
    if not isinstance(error, OSError):
        return False
    if error.errno == errno.EDQUOT:  # a quota cannot be asked for
        return True
    if error.errno != errno.ENOSPC or not folder.exists():
        return False
    disk = os.statvfs(folder)
    # a file system that makes inodes as it needs them, such as btrfs, reports 0
    short_of_inodes = disk.f_files > 0 and disk.f_favail < FULL_INODES
    return short_of_inodes or shutil.disk_usage(folder).free < FULL_BYTES


def _reason(error: Exception) -> str:
    if isinstance(error, SweeperError):
        return str(error)
    return sentence(error) if isinstance(error, OSError) else repr(first_line(error))
