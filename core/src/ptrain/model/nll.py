"""The summed loss of labels, with its gradient formed in the forward pass, a tile of logits at a time.

Tiles that are recomputed in the backward pass take four matrix products of the size of the logits; here there are
three, as with whole logits (Hsu et al., Liger Kernel, 2024). Nothing as large as the logits outlives its tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

from ptrain.model.head import OutputHead, at_once, layer_of, repeatable
from ptrain.model.logprobs import IGNORED, token_logprobs, wide

if TYPE_CHECKING:
    from ptrain.model.head import Head

PART_BYTES = 2**27
"""Of a part of what is kept in half precision, while it is added to or multiplied in fp32."""


def token_nll(head: Head, hidden: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:
    """The sum of -log p(label) over the positions with a label, a scalar: fp32, or fp64 where logits are.

    The gradients of hidden states and head are formed with it and multiplied in the backward pass, of which there can
    be one alone; until then they are kept. The head's is added up over the tiles in fp32. Without gradients, none is
    formed.

    Args:
        head: maps hidden states [n, h] to logits [n, v].
        hidden: the last hidden states, [b, s, h].
        labels: int64 [b, s], already shifted.
        rows: positions of a tile.
    """
    layer = layer_of(head)
    if not (isinstance(layer, nn.Module) and repeatable(head)):
        return -token_logprobs(head, hidden, labels, rows).sum()
    at = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    targets = labels.flatten()[at]
    return at_once(head, hidden.flatten(0, 1), lambda head, states: summed(head, layer, states, at, targets, rows))


def summed(
    head: Head, layer: nn.Module, states: torch.Tensor, at: torch.Tensor, targets: torch.Tensor, rows: int
) -> torch.Tensor:
    """The sum of -log p(target): of `states` [n, h] those at `at`, int64 [m], with `targets`, int64 [m].

    Args:
        layer: the output layer of `head`.
    """
    weights = [p for p in layer.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or weights):
        return _Formed.apply(_tile(head, layer, weights), rows, at, targets, states, *weights)
    with torch.no_grad():
        parts = zip(at.split(rows), targets.split(rows), strict=True)
        return _total([_picked(_logprobs(head(states[i])), t) for i, t in parts], states.dtype)


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    return log_softmax(logits, dim=-1, dtype=wide(logits.dtype))


def _picked(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Minus the sum of those of the targets, in fp64: a long sequence has a million of them."""
    return -logprobs.gather(1, targets[:, None]).sum(dtype=torch.float64)


def _total(values: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack(list(values)).sum().to(wide(dtype))


class _Formed(torch.autograd.Function):
    """The sum, whose gradients are made on the way."""

    @staticmethod
    def forward(
        ctx: Any, tile: _Tile, rows: int, at: torch.Tensor, targets: torch.Tensor, states: torch.Tensor,
        *weights: nn.Parameter,
    ) -> torch.Tensor:  # fmt: skip
        """States [n, h], and the positions `at` and labels `targets` of those that have one, to the sum."""
        made, values = torch.zeros_like(states) if ctx.needs_input_grad[4] else None, []
        for i, t in zip(at.split(rows), targets.split(rows), strict=True):
            value, gradient = tile(states[i], t)
            values.append(value)
            if made is not None:
                made[i] = gradient.to(made.dtype)
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.save_for_backward(made, *tile.sums)
        return _total(values, states.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch declares any number of gradients
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """What was made times `grad`, in place; autograd itself refuses a second pass over it."""
        made, *sums = ctx.saved_tensors
        gradients = [_scale(total, grad).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        return None, None, None, None, None if made is None else _scale(made, grad), *gradients


def _scale(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`values` [n, ...] times `factor` in place, in fp32: a factor rounded to bf16 would be wrong for all alike."""
    if values.dtype == factor.dtype:
        return values.mul_(factor)
    for part in values.split(_rows(values)):
        part.copy_(part.to(factor.dtype) * factor)
    return values


def _rows(values: torch.Tensor) -> int:
    """Rows of `values` that take `PART_BYTES`."""
    return max(1, PART_BYTES // (values[:1].numel() * values.element_size() or 1))


class _Tile(Protocol):
    sums: list[torch.Tensor]

    def __call__(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over some states [n, h], and their gradient; those of the weights are added to `sums`."""
        ...


def _tile(head: Head, layer: nn.Module, weights: Sequence[nn.Parameter]) -> _Tile:
    plain = not isinstance(head, OutputHead) or (head.factor == 1.0 and not head.cap)
    if plain and type(layer) is nn.Linear and not _autocast(layer.weight.device.type):
        return _OfLinear(layer, weights)
    return _OfAny(head, weights)


def _autocast(device: str) -> bool:
    # A plan goes through the loss on `meta`, of which autocast knows nothing.
    return device != "meta" and torch.is_autocast_enabled(device)


def _value_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over rows of logits [n, v], and softmax - one_hot(target)."""
    logprobs = _logprobs(logits)
    value, made = _picked(logprobs, targets), logprobs.exp_()
    made.scatter_add_(1, targets[:, None], made.new_full((len(targets), 1), -1.0))
    return value, made


class _OfLinear:
    """A tile of a plain output layer: the gradient of its weight is made where it is added up."""

    def __init__(self, layer: nn.Linear, weights: Sequence[nn.Parameter]) -> None:
        self._layer, self._weights = layer, weights
        self._bias: Any = next((w for w in weights if w is layer.bias), None)
        self.sums: list[torch.Tensor] = []

    def __call__(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, made = _value_and_gradient(linear(states, self._layer.weight, self._layer.bias), targets)
        bias = made.sum(0) if self._bias is not None else made
        made = made.to(states.dtype)
        if not self.sums:
            # Not before the first logits are gone. Of a single tile, no more is rounded than in autograd's own product.
            self.sums = [bias if weight is self._bias else made.T @ states for weight in self._weights]
        else:
            self.sums = [
                total + bias if weight is self._bias else _with_product(total, made, states)
                for total, weight in zip(self.sums, self._weights, strict=True)
            ]
        return value, made @ self._layer.weight


def _with_product(total: torch.Tensor, made: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`total` [v, h] and `made`^T `states` added up in place, in fp32 at least."""
    total = total.to(wide(total.dtype))
    if total.dtype == made.dtype:
        return total.addmm_(made.T, states)
    for part, columns in zip(total.split(_rows(total)), made.split(_rows(total), dim=1), strict=True):
        part += columns.T @ states
    return total


class _OfAny:
    """A tile of an output layer of any kind, by autograd."""

    def __init__(self, head: Head, weights: Sequence[nn.Parameter]) -> None:
        self._head, self._weights = head, weights
        self.sums: list[torch.Tensor] = []

    def __call__(self, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._head(leaf)
        value, made = _value_and_gradient(logits.detach(), targets)
        own, *found = torch.autograd.grad(
            logits, [leaf, *self._weights], made.to(logits.dtype), allow_unused=True, materialize_grads=True
        )
        if self.sums:
            # Gradients may share their memory: what is added to is a copy.
            self.sums = [total.to(wide(total.dtype)).add_(one) for total, one in zip(self.sums, found, strict=True)]
        else:
            self.sums = [one.clone(memory_format=torch.contiguous_format) for one in found]
        return value, own
