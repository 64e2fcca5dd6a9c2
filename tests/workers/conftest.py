"""Settings of engines with the fake trainer, and a Ray cluster on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from sweeper.settings import FakeTrainer, Workers

# before ray is imported anywhere; the programs that tests start inherit it
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)


def make_workers(engine: str, fake: FakeTrainer, address: str | None = None) -> Workers:
    """Settings of an engine with the fake trainer and no limits."""
    limits = {"trial_timeout_s": None, "stall_timeout_s": None}
    return Workers.model_validate(
        {"engine": engine, "trainer": "fake", "address": address, "fake": fake, **limits}
    )


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A head node of one CPU; tests may add nodes, and remove them again."""
    pytest.importorskip("ray", reason="Ray is optional")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **SMALL})
    yield cluster
    cluster.shutdown()


SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
