"""Micro-batches: shifted labels, positions and documents agree with the rows, padding is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptrain.data.collate import IGNORED, PADDING, collate, filler

documents = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4
)


def row(parts: list[list[tuple[int, bool]]]) -> dict[str, Any]:
    """A token row of some documents."""
    flat = [token for part in parts for token in part]
    return {
        "input_ids": np.array([token for token, _ in flat]),
        "labels": np.array([token if learnt else IGNORED for token, learnt in flat]),
        "document_lengths": np.array([len(part) for part in parts]),
    }


@given(st.lists(documents, min_size=1, max_size=4), st.integers(1, 8), st.booleans())
def test_every_label_is_predicted_within_its_document(
    rows: list[list[list[tuple[int, bool]]]], multiple: int, fixed: bool
) -> None:
    """Token t predicts token t + 1 of the same document if that is a label, and nothing else is predicted."""
    length = 40 if fixed else None
    batch = collate([row(parts) for parts in rows], pad_id=7, multiple=multiple, length=length)
    longest = max(sum(len(part) for part in parts) for parts in rows)
    size = batch["input_ids"].shape[1]
    assert size == 40 if fixed else size % multiple == 0 and longest <= size < longest + multiple
    assert set(batch) == {"input_ids", "shift_labels", "position_ids", "document_ids", "document_lengths", "rows"}
    for name in ("input_ids", "shift_labels", "position_ids", "document_ids"):
        assert batch[name].dtype == torch.int64 and batch[name].shape == (len(rows), size)
    assert batch["rows"] == len(rows)
    for at, parts in enumerate(rows):
        assert batch["document_lengths"][at] == [len(part) for part in parts]
        ids, labels, positions, numbers = [], [], [], []
        for number, part in enumerate(parts):
            for place, (token, _) in enumerate(part):
                following = part[place + 1] if place + 1 < len(part) else (0, False)
                ids.append(token)
                labels.append(following[0] if following[1] else IGNORED)
                positions.append(place)
                numbers.append(number)
        end = len(ids)
        assert batch["input_ids"][at].tolist() == ids + [7] * (size - end)
        assert batch["shift_labels"][at].tolist() == labels + [IGNORED] * (size - end)
        most = max(len(part) for parts in rows for part in parts)
        assert batch["position_ids"][at].tolist() == positions + [place % most for place in range(size - end)]
        assert batch["document_ids"][at].tolist() == numbers + [PADDING] * (size - end)


def test_a_label_that_equals_the_padding_is_kept() -> None:
    """Padding is known by its place, not by its id."""
    batch = collate([row([[(1, False), (7, True)]])], pad_id=7, multiple=4)
    assert batch["shift_labels"].tolist() == [[7, IGNORED, IGNORED, IGNORED]]


def test_filler_counts_nothing() -> None:
    """One token without a label, no rows."""
    batch = filler(row([[(5, True), (6, True)]]), pad_id=0)
    assert batch["rows"] == 0 and (batch["shift_labels"] == IGNORED).all()
    assert batch["document_lengths"] == [[1]] and batch["input_ids"].tolist() == [[5]]


def test_further_columns_travel_along() -> None:
    """As plain values, one for each row; a batch without rows has them too."""
    rows = [
        {**row([[(1, False)]]), "keys": np.array([7, 8]), "set": np.int32(3), "named": "a"},
        {**row([[(2, False)]]), "keys": np.array([], dtype=np.int64), "set": np.int32(4), "named": "b"},
    ]
    batch = collate(rows, pad_id=0)
    assert [batch[name] for name in ("keys", "set", "named")] == [[[7, 8], []], [3, 4], ["a", "b"]]
    assert all(type(one) is int for one in (*batch["keys"][0], *batch["set"]))
    empty = filler(rows[0], pad_id=0)
    assert [empty[name] for name in ("keys", "set", "named")] == [[], [], []]
