"""Settings of engines with the fake trainer, a Ray cluster on this machine, trials on two processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper.config.settings import FakeTrainer, WorkerSettings
from sweeper.core.paths import TrialFolder
from sweeper.training.trial_runner import TransformersRunner
from sweeper.workers.followers import FollowerGroup
from tests.conftest import make_settings
from tests.training.recorder import Recorder
from tests.workers.together import Train

# before ray is imported anywhere; the programs that tests start inherit it
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)


def make_workers(engine: str, fake: FakeTrainer, address: str | None = None) -> WorkerSettings:
    """Settings of an engine with the fake trainer and no limits."""
    limits = {"trial_timeout_s": None, "stall_timeout_s": None, "probe_timeout_s": None}
    return WorkerSettings.model_validate(
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


@pytest.fixture(scope="module")
def followers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FollowerGroup]:
    """One follower on this machine's CPU."""
    log = tmp_path_factory.mktemp("workers") / "worker_0.log"
    company = FollowerGroup([None, None], threads=1, log=log)
    yield company
    company.close()


@pytest.fixture
def train(tiny_base: Path, rows_file: Path, tmp_path: Path, followers: FollowerGroup) -> Train:
    """Train on as many processes as the overrides say: (outcome, what was observed, folder)."""
    runner = TransformersRunner(1, followers.join)

    def run(name: str, *overrides: str, observer: Recorder | None = None):  # type: ignore[no-untyped-def]
        settings = make_settings(
            *(f"model.base_model={tiny_base}", f"data.train={rows_file}", "quantization=none"),
            *("training.max_steps=6", "training.eval_steps=2", "training.logging_steps=1"),
            *("training.per_device_train_batch_size=4", *overrides),
        ).trial
        recorder, folder = observer or Recorder(), TrialFolder(tmp_path / name)
        return runner.run(settings, folder, {}, recorder), recorder, folder

    return run
