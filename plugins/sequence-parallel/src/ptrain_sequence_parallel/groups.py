"""The workers that share sequences: consecutive ones, so that a group lies on one machine where that is possible."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain import RecipeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ptrain import Run


@dataclass(frozen=True)
class Group:
    """The workers with which this one shares sequences.

    Attributes:
        size: how many they are.
        rank: of this worker among them: which part of each sequence is its own.
    """

    size: int
    rank: int

    @property
    def process(self) -> ProcessGroup:
        """For collectives among them; every worker of the run has to ask for it first at the same time."""
        return process_group(self.size)


@functools.cache
def process_group(size: int) -> ProcessGroup:
    """The process group of this worker, of consecutive ones; made once a process, as that of all workers is."""
    from torch import distributed

    mine: Any = None
    rank = distributed.get_rank()
    for first in range(0, distributed.get_world_size(), size):
        made = distributed.new_group(list(range(first, first + size)))
        mine = made if first <= rank < first + size else mine
    if mine is None:
        raise ValueError(f"{size} does not divide the {distributed.get_world_size()} workers")
    return mine


def check_machines(run: Run, size: int) -> None:
    """Raise RecipeError where a group lies on several machines; every worker takes part."""
    import torch

    first = torch.tensor([run.rank - run.local_rank], device=run.device)  # the first worker of this machine
    found = [torch.empty_like(first) for _ in range(run.world)]
    torch.distributed.all_gather(found, first)
    machines = [int(one) for one in found]
    for start in range(0, run.world, size):
        if len(set(machines[start : start + size])) > 1:
            here = machines.count(machines[start])
            raise RecipeError(
                f"workers {start} to {start + size - 1} would share sequences, and they are not on one machine",
                where=run.loaded.positions.get(("plugins", "sequence-parallel", "size")),
                expected=f"`size` to divide the {here} workers of a machine",
                fix="write `across_nodes: true` if the network between the machines is as fast as that within them",
            )
