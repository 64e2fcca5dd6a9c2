"""MLflow's store as it is asked by people and by nights: calls wait, for at most a minute.

What a driver records goes through `mlflow_tracker`, which waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.errors import SweeperError, TrackingError
from sweeper.redaction import redact
from sweeper.tracking.server import Away, Server

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Store:
    """One tracking server or local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """`uri` is a tracking server or database; without one the store is local, under `root`."""
        self._uri = uri
        self._root = root
        self._server = Server(uri, root)

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """The client; MLflow's errors become one line."""
        try:
            yield self._server.client()
        except SweeperError:
            raise
        except Away as away:
            raise TrackingError(f"MLflow: {away}") from None
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException | OSError):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TrackingError(f"MLflow: {redact(first)}") from None
