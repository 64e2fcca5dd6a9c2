"""The one connection to MLflow: a server or a local store, which may be away.

Tells errors that may pass (the server is away, busy or hung) from those that will not. Knows nothing of
what is recorded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from sweeper.core.errors import SweeperError, TrackingError
from sweeper.core.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would stand in the study's table
    # MLflow's own defaults keep one call waiting for 246 seconds; a request that is sent again inside
    # MLflow's client could store a point twice, so it is sent again by whoever can look first
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
AWAY = frozenset(
    {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
)
"""MLflow's error codes for a server that may answer later."""
UNAUTHENTICATED = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"})
GONE = "RESOURCE_DOES_NOT_EXIST"
ANSWER_SECONDS = 5
"""How long a server may take to tell its version; a hung one never does."""
OLDEST = 2
"""The oldest major version whose REST API has all that is recorded."""
MODELS_SINCE = 3
"""The first major version with LoggedModels."""
CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what it "
    "accepts"
)


class StoreAway(Exception):
    """The store does not answer now, and may later; the message says why."""


def local_uri(root: Path) -> str:
    """The store under a folder: one SQLite file, artifacts beside it."""
    return f"sqlite:///{root / 'mlflow.db'}"


class TrackingServer:
    """A tracking server, a database, or the local store."""

    def __init__(self, uri: str | None, root: Path) -> None:
        """`uri` is a tracking server or database; without one the store is local, under `root`."""
        self.uri = uri
        self.root = root
        self.remarks: list[str] = []
        """What this server's version cannot hold, for people; each is said once."""
        self.version: str | None = None
        """What an HTTP server says it is; None before it was asked, or if it does not say."""
        self._modelless = False
        self._made: MlflowClient | None = None

    @property
    def name(self) -> str:
        """Which store this is, for people and for marks: without a password."""
        return redact(self.uri or local_uri(self.root.resolve()))

    @property
    def is_http(self) -> bool:
        """Whether requests travel over a network and can time out."""
        return self.uri is not None and self.uri.startswith(("http://", "https://"))

    def client(self) -> MlflowClient:
        """The connected client.

        Raises:
            Away: it does not answer.
            TrackingError: it answers, and will not have us.
        """
        if self._made is None:
            for name, value in SETTINGS.items():
                os.environ.setdefault(name, value)
            import mlflow  # two seconds, and not needed before the first trial is on its way

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            try:
                self._made = self._connect(mlflow.MlflowClient)
            except Exception as error:  # noqa: BLE001 - mapped here, at the seam
                raise as_ours(error, self.name) from None
        return self._made

    def answers(self) -> bool:
        """Whether an HTTP server is there at this moment; a store without a server always is."""
        try:
            self._ask_version()
        except Exception:  # noqa: BLE001 - whatever it is, it is no answer
            return False
        return True

    def holds_models(self) -> bool:
        """Whether LoggedModels may be asked for: MLflow has them since 3.0."""
        major = (self.version or "").partition(".")[0]
        if self._modelless or (major.isdigit() and int(major) < MODELS_SINCE):
            self.know_no_models()
            return False
        return True

    def know_no_models(self) -> None:
        """It has no LoggedModels: said once."""
        self._modelless = True
        which = f"MLflow {self.version}" if self.version else "an older MLflow"
        self.remark(
            f"{self.name} is {which}, which has no LoggedModels: adapters are recorded as artifacts of "
            "their runs only"
        )

    def remark(self, words: str) -> None:
        """Note what the server cannot hold, once."""
        if words not in self.remarks:
            self.remarks.append(words)

    def _connect(self, make: type[MlflowClient]) -> MlflowClient:
        if self.is_http:
            self._ask_version()
            return make(self.uri)
        if self.uri is not None:
            return make(self.uri)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".mlflow.lock"):  # two that create its tables at once both fail
            return make(local_uri(self.root.resolve()))

    def _ask_version(self) -> None:
        """GET /version, with MLflow's own credentials; a proxy may hide it."""
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
            raise TrackingError(f"{self.name} refuses us ({answer.status_code}): {CREDENTIALS}")
        if answer.status_code >= 500:
            raise StoreAway(f"{self.name} answers with {answer.status_code}")
        if answer.status_code == 200:
            self._know_version(answer.text.strip())

    def _know_version(self, version: str) -> None:
        self.version = version
        major = version.partition(".")[0]
        if major.isdigit() and int(major) < OLDEST:
            self.remark(
                f"{self.name} is MLflow {version}; {OLDEST}.0 is the oldest that is supported"
            )


def as_ours(error: Exception, name: str) -> StoreAway | TrackingError:
    """MLflow's (or requests') error as one of the two there are: it may pass, or it will not."""
    if isinstance(error, StoreAway | TrackingError):
        return error
    lines = redact(str(error)).splitlines()
    reason = lines[0] if lines else type(error).__name__
    if isinstance(error, SweeperError):  # a damaged artifact: all of its lines are for the user
        return TrackingError("; ".join(line.strip() for line in lines))
    code = getattr(error, "error_code", None)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if code in UNAUTHENTICATED or status in (401, 403):
        return TrackingError(f"{name} refuses us: {reason}; {CREDENTIALS}")
    if code is not None:
        return StoreAway(reason) if code in AWAY else TrackingError(reason)
    if status is not None:
        return StoreAway(reason) if status >= 500 or status == 429 else TrackingError(reason)
    if isinstance(error, FileNotFoundError):
        return TrackingError(reason)
    return StoreAway(reason) if isinstance(error, OSError) else TrackingError(reason)


def lacks_endpoint(error: Exception) -> bool:
    """Whether the server is too old to know this kind of request."""
    return getattr(error, "error_code", None) == "ENDPOINT_NOT_FOUND"


def is_gone(error: Exception) -> bool:
    """Whether the store does not have what was asked for: it was made anew, or somebody deleted it."""
    return getattr(error, "error_code", None) == GONE
