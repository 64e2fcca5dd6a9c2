"""A worker inside a torchrun, mpirun or Slurm step trains alone."""

from __future__ import annotations

import os

import pytest

from sweeper.training.distributed import leave_launcher
from sweeper.training.trial_runner import TransformersRunner
from tests.training.conftest import RunTiny

LAUNCHED = {
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
    **{"OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2", "PMI_RANK": "1"},
    **{"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp16"},
}
"""What the launchers leave in the environment of a process that they start."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the second of two processes."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")


def test_a_launchers_variables_are_left_and_no_others(launched: None) -> None:
    """What users set for their network or their job stays."""
    leave_launcher()
    assert not LAUNCHED.keys() & os.environ.keys()
    assert (os.environ["SLURM_PROCID"], os.environ["NCCL_DEBUG"]) == ("1", "INFO")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_trial_waits_for_no_other_process(launched: None, run_tiny: RunTiny) -> None:
    """accelerate would wait for rank 0 at an address where nothing answers."""
    outcome, losses, _ = run_tiny("t", runner=TransformersRunner(threads=1))
    assert outcome.cause == "finished", outcome.message
    assert len(losses) == 3
