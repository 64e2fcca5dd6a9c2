"""The group of processes that train one trial together, each on its own device.

Rank 0 is the leader: it alone evaluates, decides, writes files and reports to the driver. The other
ranks compute their share of every batch and follow the leader's decisions. transformers.Trainer and
accelerate detect torch's process group and average the gradients (DistributedDataParallel).
"""

from __future__ import annotations

import json
import os
import re
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
from sweeper.core.input_digests import InputDigests
from sweeper.modeling.hardware import device

# the ranks of a trial are on one machine, and no other machine may connect
HOST = "127.0.0.1"
LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|FORK_LAUNCHED"
    r"|(OMPI|MV2)_COMM_WORLD_.*|PMI_(RANK|SIZE)|MPI_LOCAL.*|FSDP_.*"
    r"|ACCELERATE_(USE_.*|MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|TORCH_DEVICE|DYNAMO_.*)"
)
"""Environment variables by which torchrun, accelerate launch, mpirun and Slurm steps name a group.

transformers and accelerate would wait for that group, although the worker trains alone.
"""
RANK_TIMEOUT = timedelta(hours=6)
"""Longest wait of one rank for another. The others wait while the leader evaluates a whole split."""

T = TypeVar("T")


@dataclass(frozen=True)
class RankGroup:
    """The rank of this process and the number of processes that train the trial."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True if this process is the leader, which decides and writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the leader's value on every rank. The value must be JSON."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        # Tensors of bytes: torch's broadcast_object_list would unpickle what arrives
        length = torch.tensor([len(text)], device=device())
        distributed.broadcast(length, 0)
        content = torch.empty(int(length), dtype=torch.uint8, device=device())
        if self.leads:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        distributed.broadcast(content, 0)
        agreed: T = json.loads(bytes(content.tolist()))
        return agreed

    def largest(self, value: int) -> int:
        """Return the largest value of all ranks."""
        if self.size == 1:
            return value
        found = torch.tensor([value], device=device())
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)


SINGLE_PROCESS = RankGroup()

Join = Callable[[TrialSettings, Path, InputDigests], AbstractContextManager[RankGroup]]
"""Starts the ranks that a trial with these settings needs.

All of them use its checkpoint folder, and must find the digests of what the leader has loaded.
"""


@contextmanager
def single_process(
    settings: TrialSettings, checkpoints: Path, found: InputDigests
) -> Iterator[RankGroup]:
    """Yield a group of this process alone: the default Join of a runner without followers."""
    assert settings.training.devices_per_trial == 1, "only a runner with followers can gather them"
    yield SINGLE_PROCESS


def leave_launcher() -> None:
    """Remove what a surrounding launcher says about its processes from this process's environment."""
    for name in [name for name in os.environ if LAUNCHER_VARIABLES.fullmatch(name)]:
        del os.environ[name]


def open_rendezvous(size: int) -> TCPStore:
    """Open the store through which `size` ranks find each other, on a free port of this machine."""
    # The system chooses a port, which the others are told before they can join
    return TCPStore(HOST, 0, size, is_master=True, wait_for_workers=False)


def join_rendezvous(size: int, port: int) -> TCPStore:
    """Connect to the store that the leader opened on `port`."""
    return TCPStore(HOST, port, size)


@contextmanager
def process_group(rank: int, size: int, store: Store) -> Iterator[RankGroup]:
    """Join torch's process group as one rank for the duration of the context."""
    own = {
        **{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        "LOCAL_RANK": "0"
        if device().type == "cuda"
        else str(rank),  # a rank sees its own GPU first
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # accelerate would choose another number
    }
    # accelerate reads these variables only once a process, so its state is reset before and after
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    AcceleratorState._reset_state(reset_partial_state=True)
    own_gpu = device() if device().type == "cuda" else None
    distributed.init_process_group(
        "gloo" if own_gpu is None else "nccl",
        store=store,
        rank=rank,
        world_size=size,
        timeout=RANK_TIMEOUT,
        device_id=own_gpu,  # torch would guess the GPU from the rank, and each rank's own is its first
    )
    try:  # transformers and accelerate detect the group from torch and the variables
        yield RankGroup(rank, size)
    finally:
        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class RankSyncCallback(TrainerCallback):  # type: ignore[misc]
    """Copies the decisions of the leader's callbacks to all ranks after every step and evaluation.

    The last callback of the leader and the only one of the other ranks. Early stopping, pruning and
    Ctrl-C need no further synchronisation.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._copy_decisions(control)

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        self._copy_decisions(control)

    def _copy_decisions(self, control: TrainerControl) -> None:
        if self._ranks.size == 1:
            return
        for name, value in self._ranks.broadcast(vars(control)).items():
            setattr(control, name, value)
