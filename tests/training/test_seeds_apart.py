"""A seed of the initialisation alone, in a real training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_program


def _adapter(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The adapter of a training that hardly moves its weights."""
    still = ("training.max_steps=1", "training.learning_rate=1e-12", "tracking=none")
    folder.mkdir()
    done = run_program([*still, *overrides], folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.rglob("adapter_model.safetensors")
    return {name: each for name, each in load_file(path).items() if "lora_A" in name}


@pytest.mark.slow
def test_the_initialisation_follows_its_own_seed(tmp_path: Path) -> None:
    """Equal under the same seed_init whatever `seed` is, and another one without it."""
    first = _adapter(tmp_path / "a", "seed=1", "seed_init=5")
    second = _adapter(tmp_path / "b", "seed=2", "seed_init=5", "seed_data=9")
    third = _adapter(tmp_path / "c", "seed=2")
    assert first.keys() == second.keys() == third.keys()
    for name, weights in first.items():
        assert torch.allclose(weights, second[name], atol=1e-9)
        assert not torch.allclose(weights, third[name], atol=1e-3)
