"""The next token as two hidden states predict it, compared: logits only where there is a label, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from ptrain.model.head import at_once, frozen, gathered, repeatable

if TYPE_CHECKING:
    from ptrain.model.head import Head

IGNORED = -100
TILE_BYTES = 2**26
"""Logits of one tile, in fp32; a few tensors of this size are alive at a time."""


def token_kl(
    head: Head,
    hidden: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    vocabulary: int,
) -> torch.Tensor:
    """KL(teacher || student) at each position, [b, s] fp32, 0 where the label is -100 (Hinton et al., 2015).

    Of softmax(head(teacher) / temperature) against softmax(head(hidden) / temperature), without a factor.

    Args:
        head: maps hidden states [n, h] to logits [n, v].
        hidden: the student's hidden states, [b, s, h]; the gradient goes to them and to the head.
        teacher: the teacher's, [b, s, h]; they get none.
        labels: int64 [b, s], already shifted: only whether there is one counts.
        temperature: what logits are divided by.
        vocabulary: v, for the size of a tile.
    """
    where = labels != IGNORED
    student, teacher = hidden[where], teacher[where].detach()
    values = _frozen_kl(head, student, teacher, temperature, vocabulary) if frozen(head) else None
    if values is None:
        values = _kl_of_trained_head(head, student, teacher, temperature, vocabulary)
    return torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device).masked_scatter(where, values)


@torch.no_grad()
def token_argmax(head: Head, hidden: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The likeliest token at each position, int64 [b, s], -100 where the label is -100; arguments as in `token_kl`."""
    where = labels != IGNORED
    states, tiled = hidden[where], gathered(head)
    parts = tiles(states, vocabulary) if tiled is not None else [states]
    found = torch.cat([(tiled or head)(part).argmax(-1) for part in parts])
    return torch.full_like(labels, IGNORED).masked_scatter(where, found)


def tiles(states: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """`states` [n, h] in parts whose logits take `TILE_BYTES`; one empty part where there are none."""
    return states.split(max(1, TILE_BYTES // (4 * vocabulary)))


def _frozen_kl(
    head: Head, student: torch.Tensor, teacher: torch.Tensor, temperature: float, vocabulary: int
) -> torch.Tensor | None:
    """The divergences [n], with their gradients made in the same pass over the tiles; None if there can be no tiles."""
    tiled = gathered(head)
    if tiled is None:
        return None
    if not (torch.is_grad_enabled() and student.requires_grad):
        pairs = _pairs(student, teacher, vocabulary)
        return torch.cat([_kl(tiled(s), tiled(t), temperature) for s, t in pairs])
    return _FrozenKL.apply(student, teacher, tiled, temperature, vocabulary)


def _pairs(
    student: torch.Tensor, teacher: torch.Tensor, vocabulary: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(tiles(student, vocabulary), tiles(teacher, vocabulary), strict=True)


def _kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL of rows of logits, [n, v] each, to [n] fp32."""
    logp = log_softmax(teacher.float() / temperature, dim=-1)
    return (logp.exp() * (logp - log_softmax(student.float() / temperature, dim=-1))).sum(-1)


class _FrozenKL(torch.autograd.Function):
    """KL whose gradient is made on the way: logits are computed once, where recomputing tiles would take them twice.

    The value of a row depends on that row's state alone, so that a gradient of the values is a factor for each row.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: Head, temperature: float, vocabulary: int
    ) -> torch.Tensor:
        """States [n, h] to values [n] fp32."""
        parts = [_value_and_gradient(head, s, t, temperature) for s, t in _pairs(student, teacher, vocabulary)]
        values, gradients = zip(*parts, strict=True)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradient of each row by its factor."""
        (made,) = ctx.saved_tensors
        return made * grad[:, None].to(made.dtype), None, None, None, None


def _value_and_gradient(
    head: Head, student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [n] and their gradients [n, h]: of logits, (softmax(student) - softmax(teacher)) / temperature."""
    with torch.no_grad():
        logp = log_softmax(head(teacher).float() / temperature, dim=-1)
    leaf = student.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(leaf)
    logq = log_softmax(logits.detach().float() / temperature, dim=-1)
    probabilities = logp.exp()
    values = torch.linalg.vecdot(probabilities, logp.sub_(logq))
    made = logq.exp_().sub_(probabilities).div_(temperature)
    return values, torch.autograd.grad(logits, leaf, made.to(logits.dtype))[0]


def _kl_of_trained_head(
    head: Head, student: torch.Tensor, teacher: torch.Tensor, temperature: float, vocabulary: int
) -> torch.Tensor:
    """The divergences [n] by autograd, with the logits of each tile recomputed in the backward pass."""

    def one(head: Head, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = head(t)
        return _kl(head(s), expected, temperature)

    def several(head: Head, student: torch.Tensor) -> torch.Tensor:
        pairs = _pairs(student, teacher, vocabulary)
        return torch.cat([checkpoint(one, head, s, t, use_reentrant=False) for s, t in pairs])

    if not repeatable(head):
        return one(head, student, teacher)

    return at_once(head, student, several)
