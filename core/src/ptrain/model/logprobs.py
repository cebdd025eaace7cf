"""Log-probabilities of labels, with logits only where there is a label and never all of them at once.

Packed steps of 512 tokens, half of them with a label, take 1.20 times as long with all logits (`benchmarks/tricks.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

IGNORED = -100
TILE_BYTES = 2**28
"""Logits of one tile, in fp32."""


def token_logprobs(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    *,
    tiled: bool = True,
) -> torch.Tensor:
    """log p(label) at each position, [b, s] fp32, 0 where the label is -100.

    Args:
        head: maps hidden states [n, h] to logits [n, v].
        hidden: the last hidden states, [b, s, h].
        labels: int64 [b, s], already shifted.
        vocabulary: v, for the size of a tile.
        tiled: recompute the logits of each tile in the backward pass, so that at most one tile of them is
            alive. False calls the head exactly once, which ZeRO-3 needs: its workers must gather the head
            equally often.
    """
    where = labels != IGNORED
    values = picked(head, hidden[where], labels[where], vocabulary, tiled=tiled)
    return torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device).masked_scatter(where, values)


def picked(
    head: Callable[[torch.Tensor], torch.Tensor],
    states: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    *,
    tiled: bool,
) -> torch.Tensor:
    """log p(target) of each state, fp32 [n]: `states` [n, h], `targets` int64 [n]; see `token_logprobs`."""
    rows = max(1, TILE_BYTES // (4 * vocabulary))
    if not tiled or len(targets) <= rows:
        return _logprobs(head, states, targets)
    return torch.cat(
        [
            checkpoint(_logprobs, head, s, t, use_reentrant=False)
            for s, t in zip(states.split(rows), targets.split(rows), strict=True)
        ]
    )


def _logprobs(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    return _Pick.apply(head(states).float(), targets)


class _Pick(torch.autograd.Function):
    """log softmax(logits)[target] of each row, whose backward pass turns what it kept into the gradient in place.

    `cross_entropy` makes two more tensors of the size of the logits in its backward pass; the same steps take 1.08
    times as long with it, and 1.13 times the memory.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits [n, v] fp32 and targets [n] to values [n]."""
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
