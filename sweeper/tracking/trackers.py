"""Choose the tracker that `tracking.kind` names, and say where to look at what it recorded."""

from __future__ import annotations

from pathlib import Path

from sweeper.redaction import redact
from sweeper.settings import Tracking
from sweeper.tracking.mlflow_tracker import MlflowTracker, local_uri
from sweeper.tracking.registry import Registry
from sweeper.tracking.store import Store
from sweeper.tracking.tracker import NullTracker, Tracker

LOCAL_STORE = Path("mlruns")


def make_tracker(settings: Tracking) -> Tracker:
    """The tracker that `tracking` names."""
    if settings.kind == "none":
        return NullTracker()
    return MlflowTracker(settings.uri, LOCAL_STORE, settings.registered_model_name)


def make_registry(settings: Tracking) -> Registry | None:
    """The registry beside the runs; None where nothing is tracked."""
    return None if settings.kind == "none" else Registry(settings.uri, LOCAL_STORE)


def make_store(settings: Tracking) -> Store | None:
    """Where runs are kept, to be read; None where nothing is tracked."""
    return None if settings.kind == "none" else Store(settings.uri, LOCAL_STORE)


def browse_command(settings: Tracking) -> str:
    """How to look at the runs."""
    if settings.kind == "none":
        return "(tracking=none: nothing recorded)"
    uri = settings.uri or local_uri(LOCAL_STORE)
    if uri.startswith("http"):
        return redact(uri)
    return f"mlflow ui --backend-store-uri {redact(uri)}   (in a checkout: make ui)"
