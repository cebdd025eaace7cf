"""Packing: every token once, no row too long, nothing lost but the last partial row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.data.pack import best_fit, slice_and_pack


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_best_fit_holds_each_document_once(lengths: list[int], size: int) -> None:
    """In rows that are never too long, at most twice as many as are needed, the same each time."""
    bins = best_fit(lengths, size)
    assert sorted(n for one in bins for n in one) == list(range(len(lengths)))
    filled = [sum(lengths[n] for n in one) for one in bins]
    assert all(0 < total <= size for total in filled)
    assert sum(total <= size / 2 for total in filled) <= 1
    assert bins == best_fit(np.array(lengths, dtype=np.int64), size)


@pytest.mark.parametrize("length", [0, 11])
def test_a_document_that_does_not_fit(length: int) -> None:
    """It is refused, not cut."""
    with pytest.raises(ValueError, match="document 1 has"):
        best_fit([3, length], 10)


@given(st.lists(st.integers(0, 200), max_size=40), st.integers(1, 64), st.randoms(use_true_random=False))
def test_slices_hold_every_token_once(lengths: list[int], size: int, random: object) -> None:
    """Rows of exactly `size` tokens; fewer than `size` tokens are left; pieces of a document stand in order."""
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = list(slice_and_pack(lengths, size, order))
    assert all(sum(stop - start for _, start, stop in row) == size for row in rows)
    pieces = [piece for row in rows for piece in row]
    taken = [(document, at) for document, start, stop in pieces for at in range(start, stop)]
    assert len(taken) == len(set(taken)) == sum(lengths) // size * size
    for document in order:
        own = [at for one, at in taken if one == document]
        assert own == sorted(own)


def test_small_known_case() -> None:
    """Two slices of the long document; what remains of it goes with the short ones."""
    assert list(slice_and_pack([5, 2, 1], 2, [0, 1, 2])) == [
        [(0, 0, 2)],
        [(0, 2, 4)],
        [(1, 0, 2)],
        [(0, 4, 5), (2, 0, 1)],
    ]
