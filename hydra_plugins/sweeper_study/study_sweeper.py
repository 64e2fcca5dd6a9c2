"""Hydra's -m, handed over to the study. Light on imports: every Hydra start imports this module."""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class StudySweeper(Sweeper):  # type: ignore[misc]
    """Run the studies that the command line names. sweeper.config.settings validates the keys."""

    def __init__(self, **_: Any) -> None:
        self._hydra_overrides: list[str] = []

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra; launchers are not used, workers are."""
        overrides = OmegaConf.to_container(config.hydra.overrides.hydra)
        assert isinstance(overrides, list)
        self._hydra_overrides = [text for text in map(str, overrides) if "hydra.mode" not in text]

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the command line's overrides."""
        from sweeper.__main__ import run_studies

        run_studies([*self._hydra_overrides, *arguments])
