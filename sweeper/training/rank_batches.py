"""Give every rank of a trial as many batches, without training any row twice."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import BatchSampler

NO_ROW = -1
"""Index of a row that adds nothing to the loss."""


class CompletedBatches(BatchSampler):
    """Batches of all ranks, completed by batches without a row to a multiple of the ranks.

    accelerate would complete them with the first rows of the epoch, so that a trial on several devices
    would train these twice, and would not be the trial of one device.
    """

    def __init__(self, batches: BatchSampler, ranks: int) -> None:
        self._batches = batches
        self._ranks = ranks
        self.sampler = batches.sampler  # accelerate sets its epoch
        self.batch_size = batches.batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return -(-len(self._batches) // self._ranks) * self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches
        for _ in range(len(self) - len(self._batches)):
            yield [NO_ROW]
