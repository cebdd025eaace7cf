"""The exchange of Ulysses attention: from some positions of all heads to all positions of some heads, and back.

Jacobs et al., "DeepSpeed Ulysses" (2023). Everything that goes from one worker to another goes in one message. The
gradient of an exchange is the exchange the other way, without a factor: each worker's loss is a sum over positions of
its own, and gradients are added over the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from ptrain_sequence_parallel.groups import Group

HEADS, POSITIONS = 1, 2
"""Dimensions of [b, heads, s, d]."""
Swap = Callable[[torch.Tensor], torch.Tensor]
"""Takes a message [size, n], whose part r is for worker r, to one whose part r is from worker r."""


def to_heads(group: Group, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[b, heads, s / size, d] of this worker's positions to [b, heads / size, s, d] of its heads, each tensor."""
    return _Exchange.apply(group, HEADS, POSITIONS, *tensors)


def to_positions(group: Group, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The other way: [b, heads / size, s, d] to [b, heads, s / size, d]."""
    return _Exchange.apply(group, POSITIONS, HEADS, *tensors)


def repeats(heads: int, shared: int, size: int) -> int:
    """How often each of `shared` heads of keys and values is repeated, so that every worker gets those it needs.

    Worker r computes the heads r x n to r x n + n - 1 of the queries, where n is heads / size. The heads that share
    keys and values, heads / shared of them, are all on one worker, or fill several, or lie across the borders of
    workers: in the last case each head gets keys and values of its own.
    """
    own, together = heads // size, heads // shared
    if own % together == 0:
        return 1
    return together // own if together % own == 0 else together


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, split: int, join: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut the dimension `split`, and get the dimension `join` whole."""
        ctx.group, ctx.split, ctx.join = group, split, join
        return tuple(moved(tensors, group.size, split, join, lambda message: _swapped(message, group)))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[Any, ...]:
        """The exchange the other way."""
        back = moved(gradients, ctx.group.size, ctx.join, ctx.split, lambda message: _swapped(message, ctx.group))
        return None, None, None, *back


def _swapped(message: torch.Tensor, group: Group) -> torch.Tensor:
    received = torch.empty_like(message)
    if message.is_meta:  # a plan goes through the exchange alone
        return received
    distributed.all_to_all_single(received, message, group=group.process)
    return received


def moved(tensors: Sequence[torch.Tensor], size: int, split: int, join: int, swap: Swap) -> list[torch.Tensor]:
    """`tensors` with the dimension `split` cut up over `size` workers, and the dimension `join` put together of theirs.

    In one message, unless they differ in dtype.
    """
    if len({tensor.dtype for tensor in tensors}) > 1:
        return [one for tensor in tensors for one in moved([tensor], size, split, join, swap)]
    return unpacked(swap(packed(tensors, size, split)), tensors, split, join)


def packed(tensors: Sequence[torch.Tensor], size: int, split: int) -> torch.Tensor:
    """The message [size, n]: part r holds what worker r gets of each tensor, its share of the dimension `split`."""
    parts = [tensor.unflatten(split, (size, -1)).movedim(split, 0).flatten(1) for tensor in tensors]
    return torch.cat(parts, dim=1)


def unpacked(message: torch.Tensor, tensors: Sequence[torch.Tensor], split: int, join: int) -> list[torch.Tensor]:
    """What came of each tensor: of its shape with `split` shorter, and `join` longer, by the number of workers.

    Args:
        message: [size, n], part r from worker r.
        tensors: those that this worker sent, for their shapes.
    """
    size, found = len(message), []
    for part, tensor in zip(message.split([t.numel() // size for t in tensors], dim=1), tensors, strict=True):
        shape = list(tensor.shape)
        shape[split] //= size
        found.append(part.unflatten(1, shape).movedim(0, join).flatten(join, join + 1))
    return found
