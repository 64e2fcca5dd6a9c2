"""The session of a worker process, which keeps the priority of the command that started it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

AUTOGROUP = Path("/proc/self/autogroup")
"""Linux's group of the processes of one session, among which it divides the CPU, with a nice value."""
ATTEMPTS = 5
"""Tries to set the nice value. A judgement: as many workers may start at once and share the limit
below."""
ATTEMPT_SECONDS = 0.15
"""Linux lets unprivileged processes change one autogroup in each tenth of a second."""


def lead_session() -> None:
    """Lead a session of one's own, which a Ctrl-C in the terminal does not reach, at the same priority.

    Where Linux schedules by session, a process's nice value counts only within its session. A session
    of one niced process would get as much of the CPU as any other, so the session is niced too.
    """
    group = group_nice()
    os.setsid()
    wanted = max(group or 0, os.getpriority(os.PRIO_PROCESS, 0))
    if group is None or wanted <= 0:
        return
    # without the right to write there, the process has its nice value and Linux ignores it
    for _ in range(ATTEMPTS):
        with suppress(OSError):
            AUTOGROUP.write_text(f"{wanted}\n", encoding="ascii")
            return
        time.sleep(ATTEMPT_SECONDS)


def group_nice() -> int | None:
    """Return the nice value of this process's session, or None where the system schedules otherwise."""
    try:
        words = AUTOGROUP.read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(words[-1]) if words[-1:] else None
