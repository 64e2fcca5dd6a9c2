"""One MLflow store, asked by verbs that wait for its answer (the tracker waits for none).

Connects once and only when asked; MLflow's errors become one line. Also reads a trial back from its run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sweeper.errors import TrackingError
from sweeper.folders import TrialFolder
from sweeper.redaction import redact
from sweeper.tracking.logged_models import STUDY_TAG
from sweeper.tracking.mlflow_tracker import OUTAGE_SETTINGS, PARENT_TAG, local_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Store:
    """A tracking server or a local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """`uri` is a tracking server or database; without one the store is local, under `root`."""
        self.uri = uri
        self.root = root
        self._made: MlflowClient | None = None

    @contextmanager
    def client(self) -> Iterator[MlflowClient]:
        """The client.

        Raises:
            TrackingError: MLflow cannot be asked, or refuses.
        """
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

    def fetch_trial(self, run: str, into: Path) -> TrialFolder:
        """Download what a trial's run holds of it: config, provenance and outcome, no weights.

        Args:
            run: the run's id.
            into: a folder.

        Raises:
            TrackingError: no such run, or it is no finished trial's.
        """
        folder = TrialFolder(into)
        with self.client() as client:
            tags = client.get_run(run).data.tags
            if STUDY_TAG in tags and PARENT_TAG not in tags:
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

    def _connect(self) -> MlflowClient:
        if self._made is None:
            for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **OUTAGE_SETTINGS}.items():
                os.environ.setdefault(name, value)
            import mlflow  # two seconds, and only where there is something to ask for

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            self.root.mkdir(parents=True, exist_ok=True)
            self._made = mlflow.MlflowClient(self.uri or local_uri(self.root))
        return self._made
