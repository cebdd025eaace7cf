"""How the tokens of a batch are laid out for attention: documents of like length side by side, a call for each group.

Many short documents are many small kernels, in every layer and both ways. Beside what the rest of a layer computes,
the attention of a short document is nothing, so that it may be filled up to the length of a longer one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SHORT, NEAR = 512, 0.75
"""Documents of so many tokens or fewer are computed in one call with those that are at least this share as long."""
SHORT_ON_CPU = 32
"""A call costs less there: with longer documents among them, each on its own is as fast, or up to a tenth faster."""


@dataclass(frozen=True)
class Group:
    """Documents that are computed in one call.

    Attributes:
        count: how many.
        length: of each, with what fills it up; 0 where it is padding of `count` tokens.
        inside: bool [count, length], what is of a document; None where all is.
    """

    count: int
    length: int
    inside: torch.Tensor | None = None


@dataclass(frozen=True)
class Moved:
    """Where tokens go: indices from one order into the other, both ways, and what fills up.

    Attributes:
        order: int64 [n], where each place of the layout takes its token from.
        places: int64 [t], the place of each token.
        filling: int64, the places that hold the token of another place once more.
    """

    order: torch.Tensor
    places: torch.Tensor
    filling: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """The groups of a batch, and where its tokens are in them.

    Attributes:
        groups: in the order of the layout.
        sizes: how many tokens each group takes.
        moved: None where the layout has the order of the batch.
    """

    groups: tuple[Group, ...]
    sizes: tuple[int, ...]
    moved: Moved | None = None

    def there(self, tokens: torch.Tensor) -> torch.Tensor:
        """[t, ...] tokens of the batch, its rows end to end, in the order of the layout."""
        return tokens if self.moved is None else _There.apply(tokens, self.moved)  # type: ignore[no-any-return]

    def back(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens in the order of the layout as they are in the batch, [t, ...]."""
        return tokens if self.moved is None else _Back.apply(tokens, self.moved)  # type: ignore[no-any-return]


class _There(torch.autograd.Function):
    """Its gradient takes, too: nothing is added up. Filling is seen by nobody, so that its own gradient is 0."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, moved: Moved) -> torch.Tensor:
        ctx.moved = moved
        return tokens.index_select(0, moved.order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].index_select(0, ctx.moved.places), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, moved: Moved) -> torch.Tensor:
        ctx.moved = moved
        return tokens.index_select(0, moved.places)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].index_select(0, ctx.moved.order).index_fill_(0, ctx.moved.filling, 0), None


@functools.lru_cache(maxsize=64)  # the layers of a model ask alike, and so does a second pass over the same batches
def layout(lengths: tuple[tuple[int, ...], ...], size: int, device: torch.device) -> Layout:
    """The layout for rows of `size` tokens that hold documents of these lengths."""
    documents: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    for row, counts in enumerate(lengths):
        at = row * size
        for length in counts:
            documents.append((length, at))
            at += length
        if at < (row + 1) * size:
            gaps.append(((row + 1) * size - at, at))
    one_by_one = device.type == "cpu" and max(documents)[0] > SHORT_ON_CPU
    groups = [] if one_by_one else alike(documents)
    return _grouped(groups, gaps, device) if 0 < len(groups) < len(documents) else _in_order(documents, gaps)


def alike(documents: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Documents, `(length, begin)`, in groups, the longest first: short ones with those that are nearly as long."""
    found: list[list[tuple[int, int]]] = []
    for document in sorted(documents, reverse=True):
        longest = found[-1][0][0] if found else 0
        if longest <= SHORT and document[0] >= NEAR * longest and found:
            found[-1].append(document)
        else:
            found.append([document])
    return found


def _in_order(documents: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> Layout:
    """Every document and every gap on its own, where it is."""
    pieces = [(begin, Group(1, length)) for length, begin in documents]
    pieces += [(begin, Group(count, 0)) for count, begin in gaps]
    groups = tuple(group for _, group in sorted(pieces, key=lambda piece: piece[0]))
    return Layout(groups, tuple(group.length or group.count for group in groups))


def _grouped(documents: list[list[tuple[int, int]]], gaps: list[tuple[int, int]], device: torch.device) -> Layout:
    """Groups of documents, each filled up with its first token to the length of the longest; at the end the gaps."""
    groups, order, real = [], [], []
    for group in documents:
        lengths, begins = (np.array(column)[:, None] for column in zip(*group, strict=True))
        steps = np.arange(group[0][0])
        inside = steps < lengths
        order.append((begins + np.where(inside, steps, 0)).ravel())
        real.append(inside.ravel())
        padded = None if inside.all() else torch.from_numpy(inside).to(device)
        groups.append(Group(len(group), group[0][0], padded))
    if gaps:
        order.append(np.concatenate([np.arange(begin, begin + count) for count, begin in gaps]))
        real.append(np.ones(len(order[-1]), dtype=bool))
        groups.append(Group(len(order[-1]), 0))
    taken, kept = np.concatenate(order), np.concatenate(real)
    places = np.empty(int(kept.sum()), dtype=np.int64)
    places[taken[kept]] = np.flatnonzero(kept)
    moved = Moved(*(torch.from_numpy(one).to(device) for one in (taken, places, np.flatnonzero(~kept))))
    return Layout(tuple(groups), tuple(len(one) for one in order), moved)
