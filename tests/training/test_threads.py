"""How many threads a worker computes with."""

from __future__ import annotations

import torch

from sweeper.training.trial_runner import TransformersRunner


def test_a_workers_share_of_the_cores_does_not_exceed_omp_num_threads() -> None:
    """The tests run under OMP_NUM_THREADS=1: a share of four cores is one thread."""
    assert torch.get_num_threads() == 1
    TransformersRunner(threads=4)
    assert torch.get_num_threads() == 1
