"""What the labels of all rows reveal about any two of them: which documents are positives of which query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


@dataclass(frozen=True)
class Labels:
    """The positives of every query of a data set, whichever row labels them.

    Attributes:
        groups: of each row, int64 [rows]: rows of one group share a query or a positive, or are linked by rows that do.
        queries, documents: keys of the labelled pairs, each pair once, in the order of the queries, int64 [pairs].
    """

    groups: np.ndarray
    queries: np.ndarray
    documents: np.ndarray

    def positives(self, query: int) -> np.ndarray:
        """The keys of all documents that some row labels a positive of this query, int64 [n]."""
        first, last = (self.queries.searchsorted(query, side) for side in ("left", "right"))
        return self.documents[first:last]


def labels_of(dataset: Dataset) -> Labels:
    """The labels of rows as they are loaded."""
    import numpy as np

    queries, owners, positives = _pairs(dataset)
    order = np.lexsort((positives, queries[owners]))
    pairs = np.stack([queries[owners], positives])[:, order]
    pairs = pairs[:, np.diff(pairs, axis=1, prepend=pairs[:, :1] - 1).any(axis=0)]
    rows = np.concatenate([np.arange(len(queries)), owners])
    keys = np.concatenate([queries, positives])
    return Labels(components(rows, keys, len(queries)), *pairs)


def components(rows: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """The group of each of `count` rows, int64 [count]: that of the first row with which it shares a key.

    Also where they share it through other rows. `rows` and `keys` say which row has which key, int64 [n].
    """
    import numpy as np

    unique, keys = np.unique(keys, return_inverse=True)
    found = np.arange(count)
    while True:
        lowest = np.full(len(unique), count)
        np.minimum.at(lowest, keys, found[rows])
        lower = found.copy()
        np.minimum.at(lower, rows, lowest[keys])
        lower = lower[lower]
        if (lower == found).all():
            return found
        found = lower


def _pairs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The key of each row's query, and of each positive with the number of its row."""
    import numpy as np

    from ptrain_embed.rows import POSITIVE

    queries, owners, positives, first = [], [], [], 0
    table: Any
    for table in dataset.select_columns(["query_key", "document_keys", "relations"]).with_format("arrow").iter(10_000):
        keys, relations = (table[name].combine_chunks() for name in ("document_keys", "relations"))
        chosen = relations.flatten().to_numpy() == POSITIVE
        queries.append(table["query_key"].to_numpy())
        owners.append(np.repeat(np.arange(first, first + len(table)), keys.value_lengths().to_numpy())[chosen])
        positives.append(keys.flatten().to_numpy()[chosen])
        first += len(table)
    return np.concatenate(queries), np.concatenate(owners), np.concatenate(positives)
