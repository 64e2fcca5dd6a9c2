"""Read MLflow's store for commands and nights, with calls that wait for at most a minute.

Drivers record through `mlflow_tracker`, whose calls never wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.core.errors import SweeperError, TrackingError, first_line
from sweeper.core.paths import TrialFolder
from sweeper.core.redaction import redact
from sweeper.tracking.shipment import STUDY_TAG, TRIAL_TAG
from sweeper.tracking.tracking_server import StoreAway, TrackingServer

if TYPE_CHECKING:
    from mlflow import MlflowClient


class TrackingStore:
    """One tracking server or local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """Open a store: a tracking server or database at `uri`, or the local one under `root`."""
        self._uri = uri
        self._root = root
        self._server = TrackingServer(uri, root)

    def fetch_trial(self, run: str, into: Path) -> TrialFolder:
        """Download a trial's config, provenance and outcome from its run, without weights.

        Args:
            run: the run's id.
            into: folder for the files.

        Raises:
            TrackingError: the run does not exist, or is not the run of a finished trial.
        """
        folder = TrialFolder(into)
        with self._client() as client:
            tags = client.get_run(run).data.tags
            if STUDY_TAG in tags and TRIAL_TAG not in tags:
                raise TrackingError(
                    f"run {run} is the parent run of study {tags[STUDY_TAG]!r}. "
                    "Give the run of one of its trials, or the study"
                )
            stored = {item.path for item in client.list_artifacts(run)}
            needed = (folder.config, folder.provenance, folder.outcome)
            missing = [path.name for path in needed if path.name not in stored]
            if missing:
                raise TrackingError(
                    f"run {run} is not a finished trial: it has no {', no '.join(missing)}"
                )
            for path in needed:
                client.download_artifacts(run, path.name, str(into))
        return folder

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """Yield the client, and convert MLflow's errors to a TrackingError of one line."""
        try:
            yield self._server.client()
        except SweeperError:
            raise
        except StoreAway as away:
            raise TrackingError(f"MLflow: {away}") from None
        except Exception as error:
            # Here, because the import takes two seconds
            from mlflow.exceptions import (
                MlflowException,
            )

            if not isinstance(error, MlflowException | OSError):
                raise
            raise TrackingError(f"MLflow: {redact(first_line(error))}") from None
