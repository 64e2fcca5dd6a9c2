"""MLflow's store as it is asked by people and by nights: calls wait, for at most a minute.

What a driver records goes through `mlflow_tracker`, which waits for nothing.
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
        """`uri` is a tracking server or database; without one the store is local, under `root`."""
        self._uri = uri
        self._root = root
        self._server = TrackingServer(uri, root)

    def fetch_trial(self, run: str, into: Path) -> TrialFolder:
        """Download what a trial's run holds of it: config, provenance and outcome, no weights.

        Args:
            run: the run's id.
            into: a folder.

        Raises:
            TrackingError: no such run, or it is no finished trial's.
        """
        folder = TrialFolder(into)
        with self._client() as client:
            tags = client.get_run(run).data.tags
            if STUDY_TAG in tags and TRIAL_TAG not in tags:
                raise TrackingError(
                    f"run {run} is that of study {tags[STUDY_TAG]!r} as a whole; name one of its "
                    "trials' runs, or the study"
                )
            there = {item.path for item in client.list_artifacts(run)}
            wanted = (folder.config, folder.provenance, folder.outcome)
            missing = [path.name for path in wanted if path.name not in there]
            if missing:
                raise TrackingError(
                    f"run {run} is no trial that ended: it holds no {', no '.join(missing)}"
                )
            for path in wanted:
                client.download_artifacts(run, path.name, str(into))
        return folder

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """The client; MLflow's errors become one line."""
        try:
            yield self._server.client()
        except SweeperError:
            raise
        except StoreAway as away:
            raise TrackingError(f"MLflow: {away}") from None
        except Exception as error:
            from mlflow.exceptions import MlflowException

            if not isinstance(error, MlflowException | OSError):
                raise
            raise TrackingError(f"MLflow: {redact(first_line(error))}") from None
