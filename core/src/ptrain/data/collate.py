"""Token rows to a micro-batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = -100
PADDING = -1
"""The document id of padding."""
KNOWN = frozenset({"input_ids", "labels", "document_lengths"})
"""The columns of token rows that become tensors; others travel as they are."""


def collate(
    rows: Sequence[Mapping[str, Any]], *, pad_id: int, multiple: int = 1, length: int | None = None
) -> dict[str, Any]:
    """A micro-batch: int64 [b, s] tensors, and the document lengths of each row.

    `shift_labels[t]` is the label of token t + 1, and -100 at the last token of each document, so that nothing is
    predicted across documents. `position_ids` restart with each document and over padding, where none is beyond the
    longest document; `document_ids` count documents from 0, padding is -1. There is no attention mask: right padding
    is never attended to by a causal model, and documents are kept apart by their lengths. `rows` counts the real rows.
    Further columns of the rows are lists of plain values, one for each row.

    Args:
        rows: `input_ids`, `labels` (not shifted) and `document_lengths` of each.
        pad_id: the token of padding.
        multiple: s is a multiple of it.
        length: s itself, instead of the longest row rounded up.
    """
    import numpy as np
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    most = max(int(count) for row in rows for count in row["document_lengths"])
    size = length if length is not None else -(-longest // multiple) * multiple
    shape = (len(rows), size)
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, PADDING, dtype=np.int64)
    for at, row in enumerate(rows):
        end = len(row["input_ids"])
        ids[at, :end] = row["input_ids"]
        labels[at, : end - 1] = row["labels"][1:]
        start = 0
        for number, count in enumerate(row["document_lengths"]):
            stop = start + count
            labels[at, stop - 1] = IGNORED
            positions[at, start:stop] = np.arange(count)
            documents[at, start:stop] = number
            start = stop
        # Learnt positions end somewhere, and padding may be longer than any document.
        positions[at, end:] = np.arange(size - end) % most
    tensors = {"input_ids": ids, "shift_labels": labels, "position_ids": positions, "document_ids": documents}
    return {
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
        "document_lengths": [[int(n) for n in row["document_lengths"]] for row in rows],
        "rows": len(rows),
        **{name: [plain(row[name]) for row in rows] for name in rows[0] if name not in KNOWN},
    }


def plain(value: Any) -> Any:
    """`value` without numpy: a number, a text, or lists of them."""
    return value.tolist() if hasattr(value, "tolist") else value


def filler(row: Mapping[str, Any], *, pad_id: int) -> dict[str, Any]:
    """A micro-batch without rows: one token, which is padding. It keeps workers in step where one has no rows left."""
    batch = collate([{"input_ids": [row["input_ids"][0]], "labels": [IGNORED], "document_lengths": [1]}], pad_id=pad_id)
    batch["document_ids"].fill_(PADDING)
    return {**batch, "rows": 0, **{name: [] for name in row if name not in KNOWN}}
