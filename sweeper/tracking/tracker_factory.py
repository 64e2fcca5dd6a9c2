"""Choose the tracker that `tracking.kind` names, and say where to look at what it recorded."""

from __future__ import annotations

from pathlib import Path

from sweeper.config.settings import TrackingSettings
from sweeper.core.errors import TrackingError
from sweeper.core.redaction import HIDDEN, redact
from sweeper.tracking.baseline_runs import BaselineStore
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.store import TrackingStore
from sweeper.tracking.tracker import NullTracker, Tracker
from sweeper.tracking.tracking_ledger import TrackingLedger
from sweeper.tracking.tracking_server import TrackingServer, local_uri

LOCAL_STORE = Path("mlruns")


def make_tracker(settings: TrackingSettings, ledger: Path) -> Tracker:
    """The tracker that `tracking` names; `ledger` is where it writes down what it is told."""
    if settings.kind == "none":
        return NullTracker()
    return MlflowTracker(TrackingServer(settings.uri, LOCAL_STORE), ledger)


def destination(settings: TrackingSettings, ledger: TrackingLedger) -> TrackingServer:
    """Where a study's runs go that were left: to what the settings name, else to where they went.

    Raises:
        TrackingError: nothing is tracked, or the store's password is needed.
    """
    if settings.kind == "none":
        raise TrackingError("tracking=none records nothing; choose tracking=mlflow")
    store = ledger.store
    if settings.uri is not None or store is None:
        return TrackingServer(settings.uri, LOCAL_STORE)
    if store.uri is not None and HIDDEN in store.uri:
        raise TrackingError(
            f"recorded at {store.uri}, whose password is not kept: set MLFLOW_TRACKING_URI to it"
        )
    root = Path(store.root)
    return TrackingServer(store.uri, root if root.is_dir() else LOCAL_STORE)


def make_registry(settings: TrackingSettings) -> ModelRegistry | None:
    """The registry beside the runs; None where nothing is tracked."""
    return None if settings.kind == "none" else ModelRegistry(settings.uri, LOCAL_STORE)


def make_store(settings: TrackingSettings) -> TrackingStore | None:
    """Where runs are kept, to be read; None where nothing is tracked."""
    return None if settings.kind == "none" else TrackingStore(settings.uri, LOCAL_STORE)


def make_baselines(settings: TrackingSettings) -> BaselineStore:
    """Where earlier full fine-tunes are looked up; with tracking=none there is nowhere (search.plan)."""
    return BaselineStore(settings.uri, LOCAL_STORE)


def browse_command(settings: TrackingSettings) -> str:
    """How to look at the runs."""
    if settings.kind == "none":
        return "(tracking=none: nothing recorded)"
    uri = settings.uri or local_uri(LOCAL_STORE)
    if uri.startswith("http"):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {redact(uri)}   (in a checkout: make ui)"
