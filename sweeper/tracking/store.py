"""MLflow's store as it is asked by people and by nights: calls wait, for at most a minute.

What a driver records goes through `mlflow_tracker`, which waits for nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.errors import TrackingError
from sweeper.redaction import redact
from sweeper.tracking.mlflow_tracker import OUTAGE_SETTINGS, local_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Store:
    """One tracking server or local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """`uri` is a tracking server or database; without one the store is local, under `root`."""
        self._uri = uri
        self._root = root
        self._made: MlflowClient | None = None

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """The client; MLflow's errors become one line."""
        try:
            yield self._connect()
        except TrackingError:
            raise
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException | OSError):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrackingError(f"MLflow: {redact(first)}") from None

    def _connect(self) -> MlflowClient:
        if self._made is None:
            for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **OUTAGE_SETTINGS}.items():
                os.environ.setdefault(name, value)
            import mlflow  # two seconds, and only where there is something to ask for

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self._root.mkdir(parents=True, exist_ok=True)
            self._made = mlflow.MlflowClient(self._uri or local_uri(self._root))
        return self._made
