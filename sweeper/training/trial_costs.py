"""What a trial has used so far, whatever becomes of it: steps, seconds by stage, tokens, retries."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sweeper.core.paths import read_json

Stage = Literal["load", "data", "train", "eval", "save"]


class TrialCosts:
    """Filled while a trial runs; read at its end, also by whoever catches its exception.

    `figures` and `facts` hold what is known of the trial from outside its training loop: numbers
    for the outcome, words for the training log.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.devices = 1
        self.oom_retries = 0
        self.figures: dict[str, float] = {}
        self.facts: dict[str, str] = {}
        self.advice: list[str] = []
        self._tokens = TokenSums()
        self._elapsed = self._cpu = 0.0
        """Of earlier attempts."""
        self._seconds = dict.fromkeys(get_args(Stage), 0.0)
        self._cpu_seconds = dict.fromkeys(get_args(Stage), 0.0)
        self._stages: list[Stage] = []
        self._started = self._charged = time.monotonic()
        self._cpu_started = self._cpu_charged = time.process_time()

    @classmethod
    def continued(cls, earlier: Path) -> TrialCosts:
        """A new attempt's meter, which goes on from what those before it had spent (`spent`), if any."""
        meter = cls()
        if earlier.exists():
            found = read_json(earlier)
            meter._seconds |= found["seconds"]
            meter._cpu_seconds |= found["cpu_seconds"]
            meter._elapsed, meter._cpu = found["elapsed"], found["cpu"]
            meter.oom_retries = found["oom_retries"]
            tokens = meter._tokens
            tokens.seen, tokens.targets, tokens.samples = found["tokens"]
        return meter

    def spent(self) -> dict[str, Any]:
        """Everything up to now that a further attempt has to count as well, as JSON."""
        self._charge()
        tokens = self._tokens
        return {
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "elapsed": self._elapsed + time.monotonic() - self._started,
            "cpu": self._cpu + time.process_time() - self._cpu_started,
            "oom_retries": self.oom_retries,
            "tokens": [int(tokens.seen), int(tokens.targets), tokens.samples],
        }

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Charge the time inside to `name`; a stage within a stage pauses the outer one."""
        self._charge()
        self._stages.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stages.pop()

    def seconds(self, name: Stage) -> float:
        """Wall seconds charged to a stage up to now."""
        self._charge()
        return self._seconds[name]

    def saw(
        self, batches: Sequence[Mapping[str, torch.Tensor]], targets: torch.Tensor, devices: int
    ) -> None:
        """Count the micro-batches of one optimiser step; nothing is copied from the device.

        Args:
            batches: those of this device; each of the others has as many.
            targets: target tokens of the step, on all devices.
            devices: how many share the step.
        """
        self.devices = devices
        self._tokens.add(batches, targets, devices)

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens per second of training, up to now."""
        return float(self._tokens.seen) / max(self.seconds("train"), 1e-9)

    def metrics(self) -> dict[str, float]:
        """All of it under the names of the outcome."""
        train = max(self.seconds("train"), 1e-9)
        seconds = self._elapsed + time.monotonic() - self._started
        return {
            **self.figures,
            **{f"cost/{name}_seconds": spent for name, spent in self._seconds.items()},
            **{f"cost/{name}_cpu_seconds": spent for name, spent in self._cpu_seconds.items()},
            "cost/seconds": seconds,
            "cost/device_seconds": seconds * self.devices,
            "cost/cpu_seconds": self._cpu + time.process_time() - self._cpu_started,
            "cost/oom_retries": float(self.oom_retries),
            "cost/tokens_per_second": self.tokens_per_second,
            "cost/target_tokens_per_second": float(self._tokens.targets) / train,
            "cost/samples_per_second": self._tokens.samples / train,
        }

    def _charge(self) -> None:
        now, cpu_now = time.monotonic(), time.process_time()
        if self._stages:
            self._seconds[self._stages[-1]] += now - self._charged
            self._cpu_seconds[self._stages[-1]] += cpu_now - self._cpu_charged
        self._charged, self._cpu_charged = now, cpu_now


class TokenSums:
    """Running sums over training batches, kept on the batches' device until they are read."""

    def __init__(self) -> None:
        self.seen: torch.Tensor | int = 0
        """Non-padding tokens."""
        self.targets: torch.Tensor | int = 0
        """Tokens that carry loss."""
        self.samples = 0

    def add(
        self, batches: Sequence[Mapping[str, torch.Tensor]], targets: torch.Tensor, devices: int
    ) -> None:
        """Add the micro-batches of one step, times the devices, and their number of target tokens."""
        self.targets = self.targets + targets
        for batch in batches:
            # packed rows have no mask: what pads them is little
            shown = (
                batch["attention_mask"].sum()
                if "attention_mask" in batch
                else batch["input_ids"].numel()
            )
            self.seen = self.seen + shown * devices
            self.samples += len(batch["input_ids"]) * devices
