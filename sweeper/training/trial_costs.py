"""Account for what a trial uses: steps, seconds by stage, tokens and retries after out of memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sweeper.core.stage_words import stage
from sweeper.core.stored_files import read_object, tell_damage
from sweeper.data.padding_free import ROW_BOUNDS

Stage = Literal["load", "data", "train", "eval", "save"]
"""Parts of a trial that exclude each other: an evaluation inside training is not training time."""
STAGE_WORDS: dict[Stage, str] = {
    "load": "loading the model",
    "data": "reading and tokenizing the data",
    "train": "training",
    "eval": "judging",
    "save": "storing the model",
}
"""Words for each stage, for the person who waits for it."""


LOST_COSTS = "what earlier attempts cost is lost, and counts as nothing"


class TrialCosts:
    """Costs of a trial, filled while the trial runs and readable after an exception too.

    `figures` (numbers for the outcome), `facts` and `advice` (text for the training log) hold what is
    known about the trial outside its training loop.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.devices = 1
        self.oom_retries = 0
        self.figures: dict[str, float] = {}
        self.facts: dict[str, str] = {}
        self.advice: list[str] = []
        self.failures: dict[str, str] = {}
        """Last reasons why user-defined metrics had no value, by metric."""
        self._tokens = TokenSums()
        self._elapsed = self._cpu = 0.0
        """Wall and CPU seconds of earlier attempts."""
        self._seconds = dict.fromkeys(get_args(Stage), 0.0)
        self._cpu_seconds = dict.fromkeys(get_args(Stage), 0.0)
        self._stages: list[Stage] = []
        self._started = self._charged = time.monotonic()
        self._cpu_started = self._cpu_charged = time.process_time()

    def count_retry(self) -> None:
        """Count a further try after out of memory."""
        self.oom_retries += 1

    @classmethod
    def continued(cls, earlier: Path) -> TrialCosts:
        """Return a new attempt's costs, which include those of earlier attempts.

        Args:
            earlier: the file with `spent` of the earlier attempts, which need not exist.
        """
        costs = cls()
        if found := read_object(earlier, LOST_COSTS):
            try:
                costs._add(found)
            except (KeyError, TypeError, ValueError) as error:
                tell_damage(earlier, error, LOST_COSTS)
                return cls()
        return costs

    def warn(self, failures: Mapping[str, str]) -> None:
        """Add a warning for each user-defined metric that failed for the first time in this attempt."""
        for metric, reason in failures.items():
            if metric not in self.failures:
                self.advice.append(f"{metric} has no value at step {self.steps}: {reason}")
            self.failures[metric] = reason

    def _add(self, found: Mapping[str, Any]) -> None:
        self._seconds |= {name: float(value) for name, value in found["seconds"].items()}
        self._cpu_seconds |= {name: float(value) for name, value in found["cpu_seconds"].items()}
        self._elapsed, self._cpu = float(found["elapsed"]), float(found["cpu"])
        self.oom_retries = int(found["oom_retries"])
        tokens = self._tokens
        tokens.non_padding, tokens.targets, tokens.samples = map(int, found["tokens"])

    def spent(self) -> dict[str, Any]:
        """Return the costs so far as a JSON document that the next attempt adds to its own."""
        self._charge()
        tokens = self._tokens
        return {
            "seconds": self._seconds,
            "cpu_seconds": self._cpu_seconds,
            "elapsed": self._elapsed + time.monotonic() - self._started,
            "cpu": self._cpu + time.process_time() - self._cpu_started,
            "oom_retries": self.oom_retries,
            "tokens": [int(tokens.non_padding), int(tokens.targets), tokens.samples],
        }

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Charge the time inside the context to `name`. A nested stage pauses the outer one."""
        self._charge()
        self._stages.append(name)
        try:
            with stage(STAGE_WORDS[name]):
                yield
        finally:
            self._charge()
            self._stages.pop()

    def seconds(self, name: Stage) -> float:
        """Return the wall seconds charged to a stage so far."""
        self._charge()
        return self._seconds[name]

    def add_step(
        self, batches: Sequence[Mapping[str, torch.Tensor]], targets: torch.Tensor, devices: int
    ) -> None:
        """Count the micro-batches of one optimiser step, without copying anything from the device.

        Args:
            batches: the micro-batches of this device. The other devices have as many each.
            targets: number of target tokens of the step, on all devices.
            devices: number of devices that share the step.
        """
        self.devices = devices
        self._tokens.add(batches, targets, devices)

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens per second of training time so far."""
        # transformers counts tokens too, but waits for the GPU in every micro-batch to do so
        return float(self._tokens.non_padding) / max(self.seconds("train"), 1e-9)

    def metrics(self) -> dict[str, float]:
        """Return all costs under the metric names of the outcome."""
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
    """Running sums over training batches, which stay on the batches' device until they are read."""

    def __init__(self) -> None:
        self.non_padding: torch.Tensor | int = 0
        """Number of non-padding tokens."""
        self.targets: torch.Tensor | int = 0
        """Number of tokens that carry loss."""
        self.samples = 0

    def add(
        self, batches: Sequence[Mapping[str, torch.Tensor]], targets: torch.Tensor, devices: int
    ) -> None:
        """Add the micro-batches of one step, times the devices, and the step's target tokens."""
        self.targets = self.targets + targets
        for batch in batches:
            # Packed rows have no mask, and little padding
            bounds, mask = batch.get(ROW_BOUNDS), batch.get("attention_mask")
            if mask is None or bounds is not None:
                shown: torch.Tensor | int = batch["input_ids"].numel()
            else:
                shown = mask.sum()
            rows = batch["input_ids"] if bounds is None else bounds[1:]
            self.non_padding = self.non_padding + shown * devices
            self.samples += len(rows) * devices
