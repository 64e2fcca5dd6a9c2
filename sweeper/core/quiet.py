"""What other libraries print, kept off the terminal: their words would stand between a study's own."""

from __future__ import annotations

import logging
import warnings

LOGGERS = ("bitsandbytes", "mlflow", "alembic", "optuna", "accelerate")


def hush() -> None:
    """For the rest of the process: no warnings but sweeper's, no log lines but errors.

    A worker's process prints into its own log instead, where everything stays.
    """
    warnings.filterwarnings("ignore", module=r"(?!sweeper)")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
