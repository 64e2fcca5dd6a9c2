"""The end of a command: its exit code, and the message that belongs to it."""

from __future__ import annotations

import signal
from collections.abc import Callable

from sweeper.core.errors import SweeperError, sentence
from sweeper.core.steady_output import echo


def run_to_code(run: Callable[[], object]) -> int:
    """Run a command, and return its exit code. Its errors become messages."""
    try:
        run()
    except SweeperError as error:
        echo(error, stderr=True)
        return error.exit_code
    except OSError as error:
        echo(sentence(error), stderr=True)
        return SweeperError.exit_code
    except KeyboardInterrupt as stop:
        echo("stopped", stderr=True)
        # a stop by another signal than Ctrl-C carries a code of its own (sweeper.core.signals)
        return int(getattr(stop, "exit_code", 128 + signal.SIGINT))
    return 0
