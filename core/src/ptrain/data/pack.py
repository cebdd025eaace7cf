"""Packing: several documents in one row of at most `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Piece = tuple[int, int, int]
"""`(document, start, stop)`: a part of a document, in tokens."""


def best_fit(lengths: Sequence[int] | np.ndarray, max_length: int) -> list[list[int]]:
    """Bins of document numbers, by best-fit decreasing; no bin is longer than `max_length`.

    The longest documents first, each into the fullest bin that still takes it (Johnson 1974). Documents of a
    bin stand in their own order, bins in the order of their first document.

    Raises:
        ValueError: a document is longer than `max_length`, or empty.
    """
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}
    spaces: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = int(lengths[document])
        if not 0 < length <= max_length:
            raise ValueError(f"document {document} has {length} tokens, and a row holds 1 to {max_length}")
        at = bisect_left(spaces, length)
        if at == len(spaces):
            bins.append([])
            number, space = len(bins) - 1, max_length
        else:
            space = spaces[at]
            number = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space]
                spaces.pop(at)
        bins[number].append(document)
        left = space - length
        if left:
            if left not in open_bins:
                insort(spaces, left)
            open_bins.setdefault(left, []).append(number)
    return sorted(sorted(one) for one in bins)


def slice_and_pack(lengths: Sequence[int] | np.ndarray, max_length: int, order: Iterable[int]) -> Iterator[list[Piece]]:
    """Rows of exactly `max_length` tokens: documents in `order`, long ones sliced, what remains put together.

    Nothing is lost but the last partial row, which is not given.
    """
    waiting: deque[Piece] = deque()
    held = 0
    for document in map(int, order):
        start, length = 0, int(lengths[document])
        while length - start >= max_length:
            yield [(document, start, start + max_length)]
            start += max_length
        if start < length:
            waiting.append((document, start, length))
            held += length - start
        while held >= max_length:
            yield _fill(waiting, max_length)
            held -= max_length


def _fill(waiting: deque[Piece], size: int) -> list[Piece]:
    row: list[Piece] = []
    while size:
        document, start, stop = waiting.popleft()
        taken = min(stop - start, size)
        row.append((document, start, start + taken))
        size -= taken
        if start + taken < stop:
            waiting.appendleft((document, start + taken, stop))
    return row
