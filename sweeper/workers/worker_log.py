"""A worker's log file: where its processes print, and what their last lines say."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path

from sweeper.core.redaction import redact

LOG_TAIL_LINES = 15
"""Last lines of a worker's log in the message of its death. A judgement: they hold the last error."""
BEGINS = "--- worker "


def print_into(log: Path) -> None:
    """Redirect this process's standard output and error into a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def begin_log(log: Path, worker: int) -> None:
    """Mark where a new process begins, so that `tail_of` leaves out the lines of earlier ones."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # A full disk must not prevent a worker from starting: the worker waits for space itself.
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(f"{BEGINS}{worker}, {datetime.now():%Y-%m-%d %H:%M:%S}\n")


def tail_of(log: Path) -> str:
    """Return the last lines that a worker's latest process printed, without secrets."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    _, mark, own = text.rpartition(BEGINS)
    lines = own.splitlines()[1:] if mark else text.splitlines()
    return redact("\n".join(lines[-LOG_TAIL_LINES:]))
