"""Which token each head is given, and which it is to say, against a loop over documents."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptrain.data.collate import collate, filler
from ptrain_spec_decode.losses import measured
from ptrain_spec_decode.targets import with_targets

IGNORED = -100


def by_hand(documents: list[tuple[list[int], list[int]]], heads: int) -> dict[tuple[int, int], tuple[list[int], int]]:
    """By (position in the row, head): the tokens that lead from that position to the target, and the target."""
    found, start = {}, 0
    for ids, labels in documents:
        for t in range(len(ids)):
            for i in range(heads):
                target = t + 2 + i
                if target < len(ids) and labels[target] != IGNORED:
                    found[start + t, i] = (ids[t + 1 : target], labels[target])
        start += len(ids)
    return found


DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 90), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=4
)


@given(rows=st.lists(DOCUMENTS, min_size=1, max_size=3), heads=st.integers(1, 4), multiple=st.sampled_from([1, 8]))
def test_equals_a_loop_over_documents(rows: Any, heads: int, multiple: int) -> None:
    """Whatever the lengths, the packing, the mask and the padding: no head looks into another document."""
    packed = [[([t for t, _ in one], [t if on else IGNORED for t, on in one]) for one in row] for row in rows]
    batch = collate(
        [
            {
                "input_ids": [t for ids, _ in row for t in ids], "labels": [t for _, labels in row for t in labels],
                "document_lengths": [len(ids) for ids, _ in row],
            }
            for row in packed
        ], pad_id=99, multiple=multiple,
    )  # fmt: skip
    made = with_targets(batch, heads)
    tokens, labels = made["ahead_tokens"], made["ahead_labels"]
    assert tokens.shape == labels.shape == (*batch["input_ids"].shape, heads)
    for number, row in enumerate(packed):
        expected = by_hand(row, heads)
        for t in range(labels.shape[1]):
            for i in range(heads):
                given_tokens, target = expected.get((t, i), ([], IGNORED))
                assert labels[number, t, i] == target
                assert tokens[number, t, : len(given_tokens)].tolist() == given_tokens


def test_a_batch_without_rows_has_no_targets() -> None:
    made = with_targets(filler({"input_ids": [5, 6]}, pad_id=0), 3)
    assert made["ahead_labels"].shape == (1, 1, 3) and made["ahead_labels"].eq(IGNORED).all()


def test_what_is_measured() -> None:
    """Accuracies over the targets of a head; yields over positions at which every head has one."""
    labels = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 1, IGNORED], [1, 1, 1]]])
    hits = torch.tensor([[[True, True, False], [False, True, True], [True, True, True], [True, True, True]]])
    found = {name: (float(value), count) for name, (value, count) in measured(hits, labels).items()}
    assert found == {
        "accuracy/head1": (3, 4), "accuracy/head2": (4, 4), "accuracy/head3": (2, 3),
        "acceptance_length": (3 + 1 + 4, 3),
    }  # fmt: skip
