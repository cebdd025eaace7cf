"""Log-probabilities of labels, with logits only where there is a label and never all of them at once.

Packed steps of 512 tokens, half of them with a label, take 1.20 times as long with all logits (`benchmarks/tricks.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from ptrain.model.head import at_once, repeatable, wide

if TYPE_CHECKING:
    from ptrain.model.head import Head

IGNORED = -100
TILE_BYTES = 2**28
"""Logits of one tile, in fp32."""


def tile_rows(vocabulary: int, tokens: int | None = None) -> int:
    """Positions of a tile: `tokens` where it is given, or those whose logits take `TILE_BYTES`."""
    return tokens or max(1, TILE_BYTES // (4 * vocabulary))


def token_logprobs(head: Head, hidden: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
    """log p(label) at each position, [b, s], 0 where the label is -100: fp32, or fp64 where logits are.

    Where there are several tiles, the logits of each are recomputed in the backward pass, so that at most one tile of
    them is alive.

    Args:
        head: maps hidden states [n, h] to logits [n, v]. Where ZeRO-3 shards it and it can't be gathered for several
            tiles, there is one.
        hidden: the last hidden states, [b, s, h].
        labels: int64 [b, s], already shifted.
        rows: positions of a tile.
    """
    where = labels != IGNORED
    targets = labels[where]
    rows = rows if repeatable(head) else max(1, len(targets))
    values = at_once(head, hidden[where], lambda head, states: picked(head, states, targets, rows))
    return torch.zeros(labels.shape, dtype=values.dtype, device=hidden.device).masked_scatter(where, values)


def picked(head: Head, states: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """log p(target) of each state, [n]: `states` [n, h], `targets` int64 [n]; see `token_logprobs`."""
    if len(targets) <= rows:
        return _logprobs(head, states, targets)
    return torch.cat(
        [
            checkpoint(_logprobs, head, s, t, use_reentrant=False)
            for s, t in zip(states.split(rows), targets.split(rows), strict=True)
        ]
    )


def _logprobs(head: Head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(states)
    return _Pick.apply(logits.to(wide(logits.dtype)), targets)


class _Pick(torch.autograd.Function):
    """log softmax(logits)[target] of each row, whose backward pass turns what it kept into the gradient in place.

    `cross_entropy` makes two more tensors of the size of the logits in its backward pass; the same steps take 1.08
    times as long with it, and 1.13 times the memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits [n, v] and targets [n] to values [n]."""
        logprobs = log_softmax(logits, dim=-1)
        ctx.save_for_backward(logprobs, targets)
        return logprobs.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """(one_hot(target) - softmax) x grad; autograd itself refuses a second pass over what was overwritten."""
        logprobs, targets = ctx.saved_tensors
        made = logprobs.exp_().mul_(-grad[:, None])
        made.scatter_add_(1, targets[:, None], grad[:, None])
        return made, None
