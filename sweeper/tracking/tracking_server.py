"""The connection to MLflow: a server, a database or a local store, which may be unavailable.

Distinguishes transient errors (the server is down, busy or hung) from permanent ones. Independent of
what is recorded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from sqlalchemy import URL

from sweeper.core.errors import AccessRefused, SweeperError, TrackingError
from sweeper.core.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would break the study's live table
    # By default a call can wait for 246 seconds. MLflow's own retries could store a point twice, so
    # RunShipper retries, which reads first what the store has
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
TRANSIENT = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
)
"""MLflow's error codes for a server that may respond later."""
UNAUTHENTICATED = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"})
DELETED_RUN = "must be in the 'active' state"
"""Part of MLflow's refusal of a request for a deleted run or in a deleted experiment."""
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
ANSWER_SECONDS = 5
"""Seconds to wait for a server's version. A hung server never responds."""
TABLES_SECONDS = 300
"""Time limit for another process to create the local store's tables, which takes seconds."""
OLDEST = 2
"""Oldest major version whose REST API supports everything that is recorded."""
MODELS_SINCE = 3
"""First major version with LoggedModels."""
CREDENTIALS = (
    "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to valid "
    "credentials"
)


class StoreAway(Exception):
    """The store is unavailable and may respond later. The message states the reason."""


def local_uri(root: Path) -> str:
    """Return the URI of the local store in a folder: one SQLite file, with artifacts next to it."""
    return URL.create("sqlite", database=str(root / "mlflow.db")).render_as_string()


class TrackingServer:
    """A tracking server, a database, or the local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """Name a store: a tracking server or database at `uri`, or the local one under `root`."""
        self.uri = uri
        self.root = root
        self.remarks: list[str] = []
        """Messages about features that this server's version lacks, each once."""
        self.version: str | None = None
        """Version of an HTTP server, or None if unknown."""
        self._modelless = False
        self._client: MlflowClient | None = None

    @property
    def name(self) -> str:
        """Address of the store without its password, for messages and marks."""
        return redact(self.uri or local_uri(self.root.resolve()))

    @property
    def is_http(self) -> bool:
        """True if the store is an HTTP server, whose requests can time out."""
        return self.uri is not None and self.uri.startswith(("http://", "https://"))

    def client(self) -> MlflowClient:
        """Return the connected client.

        Raises:
            StoreAway: the store does not respond.
            TrackingError: the store refuses the connection.
        """
        if self._client is None:
            for name, value in SETTINGS.items():
                os.environ.setdefault(name, value)
            import mlflow  # here, because the import takes two seconds and the first trial can start

            # Their INFO lines about tables and migrations would break the study's live table
            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            try:
                self._client = self._connect(mlflow.MlflowClient)
            except Exception as error:  # noqa: BLE001 - mapped here, at the seam
                raise as_tracking_error(error, self.name) from None
        return self._client

    def responds(self) -> bool:
        """Return True if an HTTP server responds now. A store without a server always does."""
        try:
            self._ask_version()
        except Exception:  # noqa: BLE001 - any error means that there is no response
            return False
        return True

    def holds_models(self) -> bool:
        """Return False if the server is known to lack LoggedModels, which MLflow has since 3.0."""
        major = (self.version or "").partition(".")[0]
        if self._modelless or (major.isdigit() and int(major) < MODELS_SINCE):
            self.note_missing_models()
            return False
        return True

    def note_missing_models(self) -> None:
        """Record that the server has no LoggedModels."""
        self._modelless = True
        which = f"MLflow {self.version}" if self.version else "an older MLflow"
        self.remark(
            f"{self.name} runs {which}, which has no LoggedModels, so adapters are recorded only as "
            "artifacts of their runs"
        )

    def remark(self, message: str) -> None:
        """Add a message about a missing feature, once."""
        if message not in self.remarks:
            self.remarks.append(message)

    def _connect(self, make: type[MlflowClient]) -> MlflowClient:
        if self.is_http:
            self._ask_version()
            return make(self.uri)
        if self.uri is not None:  # a database, which has no version to ask for
            return make(self.uri)
        self.root.mkdir(parents=True, exist_ok=True)
        # concurrent creation of the tables would fail
        with FileLock(self.root / ".mlflow.lock", timeout=TABLES_SECONDS):
            return make(local_uri(self.root.resolve()))

    def _ask_version(self) -> None:
        """Request /version with MLflow's credentials. Behind a proxy the version can stay unknown."""
        if not self.is_http:
            return
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        answer = http_request(
            get_default_host_creds(self.uri),
            "/version",
            "GET",
            max_retries=0,
            timeout=ANSWER_SECONDS,
            raise_on_status=False,
        )
        if answer.status_code in (401, 403):
            raise AccessRefused(f"{self.name} refuses access ({answer.status_code}). {CREDENTIALS}")
        if answer.status_code >= 500:
            raise StoreAway(f"{self.name} responds with status {answer.status_code}")
        if answer.status_code == 200:
            self._record_version(answer.text.strip())

    def _record_version(self, version: str) -> None:
        self.version = version
        major = version.partition(".")[0]
        if major.isdigit() and int(major) < OLDEST:
            self.remark(
                f"{self.name} runs MLflow {version}. The oldest supported version is {OLDEST}.0"
            )


def as_tracking_error(error: Exception, name: str) -> StoreAway | TrackingError:
    """Convert an error of MLflow or requests to StoreAway (transient) or TrackingError (permanent)."""
    if isinstance(error, StoreAway | TrackingError):
        return error
    lines = redact(str(error)).splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, SweeperError):  # all lines about a damaged artifact are for the user
        return TrackingError("; ".join(line.strip() for line in lines))
    code = getattr(error, "error_code", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if code in UNAUTHENTICATED or status in (401, 403):
        return AccessRefused(f"{name} refuses access: {reason}. {CREDENTIALS}")
    if code is not None:
        return StoreAway(reason) if code in TRANSIENT else TrackingError(reason)
    if status is not None:
        # 429: too many requests at the moment
        return StoreAway(reason) if status >= 500 or status == 429 else TrackingError(reason)
    if isinstance(error, FileNotFoundError):  # a missing file of ours is not an outage
        return TrackingError(reason)
    return StoreAway(reason) if isinstance(error, OSError) else TrackingError(reason)


def lacks_endpoint(error: Exception) -> bool:
    """Return True if the server is too old to support a request."""
    return getattr(error, "error_code", None) == "ENDPOINT_NOT_FOUND"


def is_gone(error: Exception) -> bool:
    """Return True if the run no longer exists, because it was deleted or the store was replaced."""
    return getattr(error, "error_code", None) == NOT_FOUND


def is_deleted(error: Exception) -> bool:
    """Return True if a request failed because its run was deleted, as in MLflow's UI."""
    # MLflow has no code of its own for this refusal. The run still exists until `mlflow gc`
    words = str(error)
    return "The run " in words and DELETED_RUN in words
