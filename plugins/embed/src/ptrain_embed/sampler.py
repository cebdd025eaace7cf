"""Which rows belong to which optimizer step, whose batch is one contrastive batch: a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ptrain.data.sampler import StepSampler

if TYPE_CHECKING:
    import numpy as np


@dataclass
class BatchSampler(StepSampler):
    """The rows of every optimizer step: each row once an epoch, in batches that differ by one row at most.

    Rows of one group are dealt out to as many batches as there are. Within a batch rows are in the order of their
    length, so that those of a micro-batch need little padding.

    Attributes:
        lengths: of each row, in tokens, [rows].
        groups: of each row, [rows]: rows of one group share a query or a positive.
        sets: of each row, [rows]: a batch has rows of one set alone.
        in_turn: all batches of a set come one after another.
    """

    lengths: np.ndarray = field(kw_only=True, repr=False)
    groups: np.ndarray = field(kw_only=True, repr=False)
    sets: np.ndarray = field(kw_only=True, repr=False)
    in_turn: bool = field(default=False, kw_only=True)
    _batches: tuple[int, list[np.ndarray]] | None = field(default=None, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return sum(-(-len(rows) // self.global_batch) for rows in self._by_set)

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (from 0) over all workers, the longest first."""
        import numpy as np

        epoch, at = divmod(0 if self.fixed else step, self.steps_per_epoch)
        rows = np.sort(self._batches_of(epoch)[at])
        return rows[np.argsort(-self.lengths[rows], kind="stable")].tolist()

    def samples_before(self, step: int) -> int:
        """Rows that the first `step` optimizer steps of an epoch consume, as many in each."""
        return round(step * self.rows / self.steps_per_epoch)

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        import numpy as np

        if self._batches is None or self._batches[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            found = [self._dealt(rows, generator) for rows in self._by_set]
            if not self.in_turn:
                found = [[batch] for batches in found for batch in batches]
            self._batches = (epoch, [batch for at in generator.permutation(len(found)) for batch in found[at]])
        return self._batches[1]

    def _dealt(self, rows: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        """The rows of a set in batches: those of a group stand together, and are dealt out like cards."""
        import numpy as np

        rows = generator.permutation(rows)
        _, groups = np.unique(self.groups[rows], return_inverse=True)
        order = np.argsort(generator.permutation(int(groups.max()) + 1)[groups], kind="stable")
        count = -(-len(rows) // self.global_batch)
        return [rows[order[at::count]] for at in range(count)]

    @cached_property
    def _by_set(self) -> list[np.ndarray]:
        """The rows of each set, in the order of the sets."""
        import numpy as np

        order = np.argsort(self.sets, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.sets[order])) + 1)
