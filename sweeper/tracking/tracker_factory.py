"""Create the tracker and the stores that the `tracking` settings name."""

from __future__ import annotations

from pathlib import Path

from sweeper.config.settings import TrackingSettings
from sweeper.core.errors import TrackingError
from sweeper.core.redaction import HIDDEN, redact
from sweeper.core.references import names_in, resolved
from sweeper.tracking.baseline_runs import BaselineStore
from sweeper.tracking.mlflow_tracker import MlflowTracker
from sweeper.tracking.registry import ModelRegistry
from sweeper.tracking.store import TrackingStore
from sweeper.tracking.tracker import NullTracker, Tracker
from sweeper.tracking.tracking_ledger import TrackingLedger
from sweeper.tracking.tracking_server import TrackingServer, local_uri

LOCAL_STORE = Path("mlruns")


def make_tracker(settings: TrackingSettings, ledger: Path) -> Tracker:
    """Return the configured tracker. `ledger` is the folder of its entries."""
    if settings.kind == "none":
        return NullTracker()
    return MlflowTracker(TrackingServer(settings.uri, LOCAL_STORE), ledger)


def destination(settings: TrackingSettings, ledger: TrackingLedger) -> TrackingServer:
    """Return the store for a study's unshipped runs: the configured one, else the ledger's.

    Raises:
        TrackingError: tracking is off, or the store's password is needed.
    """
    if settings.kind == "none":
        raise TrackingError("tracking=none records nothing. Set tracking=mlflow")
    store = ledger.store
    if settings.uri is not None or store is None:
        return TrackingServer(settings.uri, LOCAL_STORE)
    address = None if store.uri is None else resolved(store.uri)
    if address is not None and (HIDDEN in address or names_in(address)):
        raise TrackingError(
            f"the study was recorded at {store.uri}, and passwords are not stored. "
            "Set MLFLOW_TRACKING_URI to the full address"
        )
    root = Path(resolved(store.root))
    return TrackingServer(address, root if root.is_dir() else LOCAL_STORE)


def make_registry(settings: TrackingSettings) -> ModelRegistry | None:
    """Return the model registry of the configured store, or None if tracking is off."""
    return None if settings.kind == "none" else ModelRegistry(settings.uri, LOCAL_STORE)


def make_store(settings: TrackingSettings) -> TrackingStore | None:
    """Return the configured store for reading, or None if tracking is off."""
    return None if settings.kind == "none" else TrackingStore(settings.uri, LOCAL_STORE)


def make_baselines(settings: TrackingSettings) -> BaselineStore:
    """Return the store of earlier full fine-tunes. The study's plan refuses tracking=none before."""
    return BaselineStore(settings.uri, LOCAL_STORE)


def browse_command(settings: TrackingSettings) -> str:
    """Return the address or the command that shows the runs."""
    if settings.kind == "none":
        return "(tracking=none: nothing recorded)"
    uri = settings.uri or local_uri(LOCAL_STORE)
    if uri.startswith("http"):
        return redact(uri)
    # Its job runner starts nine processes of 280 MB each, which nothing here uses
    return (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 "
        f"--backend-store-uri {redact(uri)}   (in a checkout: make ui)"
    )
