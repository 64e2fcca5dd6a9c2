"""Silence other libraries' warnings and logs."""

from __future__ import annotations

import logging
import warnings

LOGGERS = ("bitsandbytes", "mlflow", "alembic", "optuna", "accelerate")


def silence_libraries() -> None:
    """Hide other libraries' warnings, and their log lines below ERROR, for the rest of the process.

    Worker processes do not call this: their output goes unfiltered into log files of their own.
    """
    # Their output would mix with the live table and the study's own lines.
    warnings.filterwarnings("ignore", module=r"(?!sweeper)")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
