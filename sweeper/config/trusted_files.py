"""The configuration files whose author may name code, and places outside the working folder.

These are the packaged files, and what the user has named in SWEEPER_TRUST. A file that somebody else
wrote decides what is trained, and neither what is imported nor where anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from sweeper.config.evaluation_settings import EvaluationSettings
from sweeper.core.errors import ConfigError

VARIABLE = "SWEEPER_TRUST"
"""Environment variable that lists trusted files and folders, separated like those of PATH."""


def is_trusted(path: Path, packaged: Iterable[Path] = ()) -> bool:
    """Return True if a file is one of the trusted files, or lies in a trusted folder."""
    named = (
        Path(text).expanduser() for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text
    )
    # resolved, because a link in a trusted folder may lead to a file of somebody else
    found = path.resolve()
    return any(found.is_relative_to(root.resolve()) for root in (*packaged, *named))


def require_trusted_modules(
    settings: EvaluationSettings, source: Path, named: Collection[str] = ()
) -> None:
    """Refuse modules that are to be imported because a stored configuration names them.

    Args:
        settings: the stored settings.
        source: the file that they were read from.
        named: modules that the command line names.

    Raises:
        ConfigError: neither the file nor the modules are named by the user.
    """
    modules = settings.metric_modules if settings.metrics else []
    wanted = [module for module in modules if module not in named]
    if wanted and not is_trusted(source):
        listed = ",".join(wanted)
        raise ConfigError(
            [
                f"evaluation.metric_modules=[{listed}]: {source} names code to import. If you trust "
                f"that file, set {VARIABLE}={source}"
            ]
        )
