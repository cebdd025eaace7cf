"""Loaders: endless micro-batches for training from any step on, and every row once for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain.data.collate import filler

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.data.sampler import StepSampler

Collate = Callable[[Sequence[Any]], dict[str, Any]]
AHEAD = 2
"""Micro-batches that each loader thread may be ahead."""


@dataclass
class _Rows:
    """Micro-batches by their lists of row numbers: what loader threads read."""

    dataset: Dataset
    collate: Collate
    pad_id: int
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbers: list[int]) -> dict[str, Any]:
        return {**self._batch(numbers), "split": self.split, "row_numbers": numbers}

    def _batch(self, numbers: list[int]) -> dict[str, Any]:
        if not numbers:
            return filler(self.dataset[0], pad_id=self.pad_id)
        columns = self.dataset.with_format("numpy")[numbers]
        return self.collate([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])


def _batches(rows: _Rows, numbers: Iterable[list[int]], workers: int) -> Iterator[Any]:
    """The micro-batches, in order, made ahead by `workers` threads.

    Threads, since a process forked from a training one, which has threads, now and then hangs for ever. They do
    as well: all that is left to do is to copy tokens out of memory-mapped files.
    """
    if not workers:
        yield from map(rows.__getitem__, numbers)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    waiting: deque[Future[Any]] = deque()
    try:
        for one in numbers:
            waiting.append(pool.submit(rows.__getitem__, one))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class TrainLoader:
    """This worker's training micro-batches, without end, from optimizer step `start` on."""

    dataset: Dataset
    sampler: StepSampler
    collate: Collate
    pad_id: int
    start: Callable[[], int]
    num_workers: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return self.sampler.steps_per_epoch

    def samples_before(self, step: int) -> int:
        """Rows that the first `step` optimizer steps of an epoch consume."""
        return self.sampler.samples_before(step)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _batches(_Rows(self.dataset, self.collate, self.pad_id, "train"), self._numbers(), self.num_workers)

    def _numbers(self) -> Iterator[list[int]]:
        step = self.start()
        while True:
            yield from self.sampler.micro_batches(step)
            step += 1


@dataclass
class EvalLoader:
    """This worker's evaluation micro-batches: every row once over all workers, equally many batches on each."""

    dataset: Dataset
    collate: Collate
    pad_id: int
    micro_batch_size: int
    rank: int
    world: int
    num_workers: int = 0

    def __len__(self) -> int:
        return -(-len(self.dataset) // (self.micro_batch_size * self.world))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.micro_batch_size
        starts = [(j * self.world + self.rank) * size for j in range(len(self))]
        numbers = [list(range(start, min(start + size, len(self.dataset)))) for start in starts]
        return _batches(_Rows(self.dataset, self.collate, self.pad_id, "eval"), numbers, self.num_workers)
