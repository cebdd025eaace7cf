"""This worker's part of a batch, and sums over the parts of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ptrain_sequence_parallel.attention import Cut

if TYPE_CHECKING:
    from ptrain import Batch
    from ptrain_sequence_parallel.groups import Group

PADDING = {"shift_labels": -100, "document_ids": -1}
"""What stands at positions that are added; 0 in everything else, and positions go on."""


def cut(batch: Batch, group: Group, pad_id: int) -> Batch:
    """What of `batch` belongs to this worker: some positions of every tensor [b, s, ...], and all that is no such.

    Labels are shifted already, so that none of them looks beyond its part. Rows are padded to a multiple of the size.
    """
    length = batch["input_ids"].shape[1]
    own = -(-length // group.size)
    padding = {**PADDING, "input_ids": pad_id}
    extra, most = own * group.size - length, max(max(row) for row in batch["document_lengths"])
    parts = {}
    for name, value in batch.items():
        if getattr(value, "shape", ())[:2] == batch["input_ids"].shape:
            whole = _padded(value, extra, padding.get(name, 0), most if name == "position_ids" else None)
            parts[name] = whole.narrow(1, group.rank * own, own).contiguous()
    told = Cut(group, batch["document_lengths"], own * group.size)
    return {**batch, **parts, "row_length": told.row_length, "attention_arguments": {"ulysses": told}}


def _padded(value: torch.Tensor, extra: int, padding: int, most: int | None) -> torch.Tensor:
    """`value` [b, s, ...] with `extra` more positions; they are numbered on, below `most`, where that is given."""
    if not extra:
        return value
    added = value.new_full((value.shape[0], extra, *value.shape[2:]), padding)
    if most is not None:
        # Learnt positions end somewhere, maybe with the longest document.
        added = (added + value[:, -1:] + torch.arange(1, extra + 1, device=value.device)) % most
    return torch.cat([value, added], dim=1)


def added(sums: torch.Tensor, group: Group) -> torch.Tensor:
    """The sums of segments [n, ...] over all parts, where each worker has those of its own, maybe of fewer segments."""
    count = torch.tensor(len(sums), device=sums.device)
    distributed.all_reduce(count, distributed.ReduceOp.MAX, group=group.process)
    missing = sums.new_zeros(int(count) - len(sums), *sums.shape[1:])
    return _Added.apply(torch.cat([sums, missing]), group)


class _Added(torch.autograd.Function):
    """The sum over the workers of a group.

    So is its gradient: each worker goes on from the sum, to a loss that is counted as often as there are workers.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return _total(values, group)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return _total(gradient, ctx.group), None


def _total(values: torch.Tensor, group: Group) -> torch.Tensor:
    total = values.contiguous().clone()
    distributed.all_reduce(total, group=group.process)
    return total
