"""The processes that train one trial together, each on a device of its own.

Rank 0 leads: it alone judges, decides, writes and is heard outside; the others compute their share of
every batch and do as it says. transformers.Trainer and accelerate find torch's process group by
themselves and average the gradients (DistributedDataParallel).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState
from torch import distributed
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from transformers import TrainerCallback, TrainerControl

from sweeper.config.settings import TrialSettings
from sweeper.modeling.hardware import device

HOST = "127.0.0.1"
PATIENCE = timedelta(hours=6)
"""How long a rank waits for another: the leader judges alone, and a whole split can take long."""

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """This process among those that train a trial."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The leader's value on every rank; it travels as JSON."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        length = torch.tensor([len(text)], device=device())
        distributed.broadcast(length, 0)
        content = torch.empty(int(length), dtype=torch.uint8, device=device())
        if self.leads:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        distributed.broadcast(content, 0)
        agreed: T = json.loads(bytes(content.tolist()))
        return agreed


ALONE = RankGroup()

Join = Callable[[TrialSettings, Path], AbstractContextManager[RankGroup]]
"""Gather the ranks that a trial with these settings needs; they keep to its folder of checkpoints."""


@contextmanager
def alone(settings: TrialSettings, checkpoints: Path) -> Iterator[RankGroup]:
    """See Join: this process has nobody to join it."""
    assert settings.training.devices_per_trial == 1, "who has followers gathers them"
    yield ALONE


def open_meeting(size: int) -> TCPStore:
    """Where `size` ranks find each other: a free port of this machine."""
    return TCPStore(HOST, 0, size, is_master=True, wait_for_workers=False)


def find_meeting(size: int, port: int) -> TCPStore:
    """The meeting that the leader opened."""
    return TCPStore(HOST, port, size)


@contextmanager
def joined(rank: int, size: int, store: Store) -> Iterator[RankGroup]:
    """Be one rank of a training for as long as the context lasts."""
    own = {
        **{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        "LOCAL_RANK": "0" if device().type == "cuda" else str(rank),  # a rank sees its own GPU only
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # accelerate would choose another number
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    AcceleratorState._reset_state(reset_partial_state=True)
    backend = "nccl" if device().type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield RankGroup(rank, size)
    finally:
        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class RankSyncCallback(TrainerCallback):  # type: ignore[misc]
    """After every step and evaluation all ranks do what the leader's callbacks decided.

    The last callback of the leader, and the only one of the others.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._follow(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._follow(control)

    def _follow(self, control: TrainerControl) -> None:
        if self._ranks.size == 1:
            return
        for name, value in self._ranks.agree(vars(control)).items():
            setattr(control, name, value)
