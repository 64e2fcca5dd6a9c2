"""Ask a process with torch about trials, and say meanwhile what it does.

Commands that only read, search or report import no torch.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import IO, Any

from sweeper.config.settings import TrialSettings
from sweeper.core.errors import WorkerError
from sweeper.reporting.text_table import duration

WORDS_SECONDS = 10.0
"""Seconds between two lines that say what the process does."""
ENDING_SECONDS = 60.0
"""Time limit of a process that has answered and frees its memory."""
Tell = Callable[[str], None]
"""Receives a line for the person who waits."""


def ask(
    module: str,
    settings: Sequence[TrialSettings],
    activity: str,
    limit_s: float,
    *arguments: str,
    tell: Tell = lambda _: None,
    words_s: float = WORDS_SECONDS,
) -> list[Any]:
    """Return the answer of a process to some trials' settings.

    The process prints lines of JSON: texts that say what it does, and one list, which is the answer.
    Other lines are those of libraries.

    Args:
        module: module that the process runs. It reads the settings from stdin.
        settings: the trials.
        activity: words for what the process does, as in "times steps".
        limit_s: seconds after which the process is ended.
        arguments: further arguments of the process.
        tell: receives the newest words and the seconds so far.
        words_s: seconds between two calls of `tell`.

    Raises:
        WorkerError: the process died, gave no answer, or took too long.
    """
    command = [sys.executable, "-m", module, *arguments]
    # As a worker's: threads that spin while they wait would make it several times slower than a worker
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A process that died has closed the pipe, and says why on stderr
            with suppress(BrokenPipeError), process.stdin:
                json.dump([one.model_dump(mode="json") for one in settings], process.stdin)
            answer = _heard(process.stdout, limit_s, tell, words_s)
            failed = process.wait(ENDING_SECONDS) != 0
        except (TimeoutError, subprocess.TimeoutExpired):
            raise WorkerError(
                f"the process that {activity} gave no answer for {limit_s / 60:g} min"
            ) from None
        finally:
            process.kill()  # does nothing to a process that has ended
        if failed or answer is None:
            errors.seek(0)
            raise WorkerError(f"the process that {activity} died:\n{errors.read().strip()}")
    return answer


def _heard(lines: IO[str], limit_s: float, tell: Tell, words_s: float) -> list[Any] | None:
    """Return the list that a process prints, or None without one, and pass on its words.

    Raises:
        TimeoutError: the process has not ended after `limit_s` seconds.
    """
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_pass_lines, args=(lines, found), daemon=True).start()
    began = told = time.monotonic()
    words, answer = "", None
    while True:
        now = time.monotonic()
        if now - began >= limit_s:
            raise TimeoutError
        if words and now - told >= words_s:
            told = now
            tell(f"  {duration(now - began)}: {words}")
        with suppress(queue.Empty):
            line = found.get(timeout=min(words_s, limit_s - (now - began)))
            if line is None:
                return answer
            document = _parsed(line)
            words = document if isinstance(document, str) else words
            answer = document if isinstance(document, list) else answer


def _pass_lines(lines: Iterable[str], found: queue.SimpleQueue[str | None]) -> None:
    for line in lines:
        found.put(line)
    found.put(None)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
