"""Choose the tracker that `tracking.kind` names, and say where to look at what it recorded."""

from __future__ import annotations

from pathlib import Path

from sweeper.errors import TrackingError
from sweeper.redaction import HIDDEN, redact
from sweeper.settings import Tracking
from sweeper.tracking.baseline import Baselines
from sweeper.tracking.ledger import Ledger
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.registry import Registry
from sweeper.tracking.server import Server, local_uri
from sweeper.tracking.store import Store
from sweeper.tracking.tracker import NullTracker, Tracker

LOCAL_STORE = Path("mlruns")


def make_tracker(settings: Tracking, ledger: Path) -> Tracker:
    """The tracker that `tracking` names; `ledger` is where it writes down what it is told."""
    if settings.kind == "none":
        return NullTracker()
    return MlflowTracker(Server(settings.uri, LOCAL_STORE), ledger)


def destination(settings: Tracking, ledger: Ledger) -> Server:
    """Where a study's runs go that were left: to what the settings name, else to where they went.

    Raises:
        TrackingError: nothing is tracked, or the store's password is needed.
    """
    if settings.kind == "none":
        raise TrackingError("tracking=none records nothing; choose tracking=mlflow")
    store = ledger.store
    if settings.uri is not None or store is None:
        return Server(settings.uri, LOCAL_STORE)
    if store.uri is not None and HIDDEN in store.uri:
        raise TrackingError(
            f"recorded at {store.uri}, whose password is not kept: set MLFLOW_TRACKING_URI to it"
        )
    root = Path(store.root)
    return Server(store.uri, root if root.is_dir() else LOCAL_STORE)


def make_registry(settings: Tracking) -> Registry | None:
    """The registry beside the runs; None where nothing is tracked."""
    return None if settings.kind == "none" else Registry(settings.uri, LOCAL_STORE)


def make_store(settings: Tracking) -> Store | None:
    """Where runs are kept, to be read; None where nothing is tracked."""
    return None if settings.kind == "none" else Store(settings.uri, LOCAL_STORE)


def make_baselines(settings: Tracking) -> Baselines:
    """Where earlier full fine-tunes are looked up; with tracking=none there is nowhere (search.plan)."""
    return Baselines(settings.uri, LOCAL_STORE)


def browse_command(settings: Tracking) -> str:
    """How to look at the runs."""
    if settings.kind == "none":
        return "(tracking=none: nothing recorded)"
    uri = settings.uri or local_uri(LOCAL_STORE)
    if uri.startswith("http"):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {redact(uri)}   (in a checkout: make ui)"
