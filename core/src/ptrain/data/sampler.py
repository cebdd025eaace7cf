"""Which rows belong to which optimizer step: a pure function of (seed, step), dealt out to the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass
class StepSampler:
    """The rows of every optimizer step, reshuffled each epoch, nothing dropped and nothing repeated.

    An epoch has `ceil(rows / global batch)` steps; the last one is smaller. The rows of a step do not depend on
    how the global batch is cut: micro-batch j of worker r holds positions `(j * world + r) * micro` and on.

    Attributes:
        rows: how many rows there are.
        micro_batch_size, accumulation, rank, world: how the global batch is cut, and which part is wanted.
        seed: of the order.
        fixed: always the rows of the first step (to see that a model can learn them).
    """

    rows: int
    micro_batch_size: int
    accumulation: int
    rank: int
    world: int
    seed: int
    fixed: bool = False
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step over all workers."""
        return self.micro_batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return -(-self.rows // self.global_batch)

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, int64 [rows]."""
        import numpy as np

        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._order = (epoch, generator.permutation(self.rows))
        return self._order[1]

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (from 0) over all workers, in order."""
        epoch, at = divmod(0 if self.fixed else step, self.steps_per_epoch)
        return self.order(epoch)[at * self.global_batch : (at + 1) * self.global_batch].tolist()

    def samples_before(self, step: int) -> int:
        """Rows that the first `step` optimizer steps of an epoch consume."""
        return min(step * self.global_batch, self.rows)

    def micro_batches(self, step: int) -> list[list[int]]:
        """This worker's micro-batches of `step`: always `accumulation` lists, empty where rows run out."""
        rows, size = self.step_rows(step), self.micro_batch_size
        starts = [(j * self.world + self.rank) * size for j in range(self.accumulation)]
        return [rows[start : start + size] for start in starts]
