"""Encoded documents on disk, and how they are put together to rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.data.arrow import mapped, open_arrow, write_batches
from ptrain.data.workspace import workspace

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    from ptrain.data.encode import Tokens
    from ptrain.data.pack import Piece

BATCH_TOKENS = 1 << 20
"""So many tokens are written at a time."""


def token_schema() -> pa.Schema:
    """The arrow schema of token rows."""
    import pyarrow as pa

    ints = pa.list_(pa.int32())
    return pa.schema([("input_ids", ints), ("labels", ints), ("document_lengths", ints)])


class Documents:
    """Documents in arrow files, memory-mapped: `lengths`, and the ids and labels of any part of one.

    Attributes:
        lengths: tokens of each document, int64 [documents].
    """

    def __init__(self, files: Sequence[Path]) -> None:
        import numpy as np

        self._parts = [_columns(batch) for file in files for batch in mapped(file).to_batches()]
        lengths = [np.diff(offsets) for offsets, _, _ in self._parts]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        self._firsts = np.cumsum([0, *(len(one) for one in lengths)])

    def __len__(self) -> int:
        return len(self.lengths)

    def piece(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, labels)` of a part of a document."""
        import numpy as np

        document, start, stop = piece
        part = int(np.searchsorted(self._firsts, document, side="right")) - 1
        offsets, ids, labels = self._parts[part]
        begin = offsets[document - self._firsts[part]]
        return ids[begin + start : begin + stop], labels[begin + start : begin + stop]

    def whole(self) -> Iterator[list[Piece]]:
        """Each document as a row of its own."""
        return ([(number, 0, int(length))] for number, length in enumerate(self.lengths))

    def bins(self, numbers: Iterable[Sequence[int]]) -> Iterator[list[Piece]]:
        """Whole documents together in rows."""
        return ([(number, 0, int(self.lengths[number])) for number in one] for one in numbers)

    def rows(self, rows: Iterable[Sequence[Piece]], name: str) -> Dataset:
        """Token rows of parts of documents, memory-mapped."""
        return open_arrow(write_batches(self._batches(rows), token_schema(), workspace().path(f"{name}.arrow")))

    def _batches(self, rows: Iterable[Sequence[Piece]]) -> Iterator[pa.RecordBatch]:
        found: list[list[tuple[np.ndarray, np.ndarray]]] = []
        held = 0
        for row in rows:
            found.append([self.piece(piece) for piece in row])
            held += sum(len(ids) for ids, _ in found[-1])
            if held >= BATCH_TOKENS:
                yield token_batch(found)
                found, held = [], 0
        if found:
            yield token_batch(found)


def token_batch(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]) -> pa.RecordBatch:
    """Token rows, each of the `(ids, labels)` of one or more documents."""
    import numpy as np
    import pyarrow as pa

    flat = [piece for row in rows for piece in row]
    lengths = [sum(len(ids) for ids, _ in row) for row in rows]
    columns = [
        _lists([ids for ids, _ in flat], lengths),
        _lists([labels for _, labels in flat], lengths),
        _lists([np.array([len(ids) for ids, _ in row], dtype=np.int32) for row in rows], [len(row) for row in rows]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=token_schema())


def _lists(values: list[np.ndarray], lengths: Sequence[int]) -> pa.ListArray:
    import numpy as np
    import pyarrow as pa

    flat = np.concatenate(values) if values else np.zeros(0, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(np.int32, copy=False)))


def document_batch(documents: Sequence[Tokens]) -> pa.RecordBatch:
    """Documents as token rows of one document each."""
    return token_batch([[(one.ids, one.labels)] for one in documents])


def _columns(batch: pa.RecordBatch) -> tuple[Any, Any, Any]:
    ids, labels = batch.column("input_ids"), batch.column("labels")
    return (ids.offsets.to_numpy(), ids.values.to_numpy(), labels.values.to_numpy())
