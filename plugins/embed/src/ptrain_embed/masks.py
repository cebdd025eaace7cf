"""Which document is a negative of which query, where texts come twice and labels say more than one row does.

A text counts once for a query, however many documents of a batch have it: as the query's own document where it came
with one, otherwise as the first that has it. A text that is labelled a positive of the query is no negative of it,
wherever in the batch it is.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ptrain_embed.labels import Labels


class Negatives:
    """The negatives of every query of a batch, and of every positive document among the queries.

    Args:
        labels: of the batch.
        in_batch: whether documents without a label, above all those of other queries, are negatives.
    """

    def __init__(self, labels: Labels, in_batch: bool) -> None:
        self._labels, self._in_batch = labels, in_batch
        self._texts, self._first = distinct(labels.document_keys)
        self._size = max(len(self._first), 1)
        own = labels.owners * self._size + self._texts
        self._positive = self._positive_codes(own)
        self._hidden = torch.unique(torch.cat([own, self._positive]))
        labelled = (labels.relations < 0) | ((labels.relations == 0) & in_batch)
        kept = (labelled & ~torch.isin(own, self._positive)).nonzero()[:, 0]
        self._own = torch.zeros_like(labelled)
        self._own[kept[_is_first(own[kept])]] = True

    def _positive_codes(self, own: torch.Tensor) -> torch.Tensor:
        """Sorted codes of pairs of a query and a text that is no negative of it, as far as a document has the text."""
        labels = self._labels
        keys = labels.document_keys[self._first]
        queries, texts = labels.no_negatives.unbind(1)
        at, found = _lookup(texts.contiguous(), keys)
        told = queries[found] * self._size + at[found]
        return torch.unique(torch.cat([own[labels.relations == 1], told]))

    def of_queries(self, rows: range) -> torch.Tensor:
        """bool [rows, m]: whether a document is a negative of a query."""
        labels, device = self._labels, self._labels.owners.device
        found = torch.zeros(len(rows), labels.documents, dtype=torch.bool, device=device)
        if self._in_batch:
            found[:, self._first] = True
            first, last = torch.searchsorted(self._hidden, _bounds(self._hidden, rows, self._size)).tolist()
            codes = self._hidden[first:last]
            found[codes // self._size - rows.start, self._first[codes % self._size]] = False
        own = labels.of_rows(rows)
        kept = torch.arange(own.start, own.stop, device=device)[self._own[own]]
        found[labels.owners[kept] - rows.start, kept] = True
        return found

    def of_documents(self, documents: torch.Tensor) -> torch.Tensor:
        """bool [p, n]: whether a query is a negative of one of these positive documents, int64 [p].

        It is where the document is no positive of it. Of queries with the same text the first one counts.
        """
        device = self._labels.owners.device
        found = torch.zeros(len(documents), self._labels.queries, dtype=torch.bool, device=device)
        found[:, self._query_texts[1]] = True
        of, queries = self._queries_by_text
        wanted = self._texts[documents]
        begins, ends = torch.searchsorted(of, wanted), torch.searchsorted(of, wanted, right=True)
        lengths = ends - begins
        rows = torch.repeat_interleave(torch.arange(len(documents), device=device), lengths)
        within = torch.arange(len(rows), device=device) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        found[rows, queries[begins[rows] + within]] = False
        return found

    @cached_property
    def _query_texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return distinct(self._labels.query_keys)

    @cached_property
    def _queries_by_text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By text of a document, sorted: the queries that it is no negative of; of the same texts the first."""
        texts, first = self._query_texts
        of, queries = self._positive % self._size, first[texts[self._positive // self._size]]
        order = torch.argsort(of, stable=True)
        return of[order], queries[order]


def distinct(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(texts [n], first [t])`: by key the number of its text, from 0, and by text the first that has it."""
    _, texts = torch.unique(keys, return_inverse=True)
    size = int(texts.max()) + 1 if len(texts) else 0
    at = torch.arange(len(keys), device=keys.device)
    return texts, torch.full((size,), len(keys), device=keys.device).scatter_reduce(0, texts, at, "amin")


def _is_first(codes: torch.Tensor) -> torch.Tensor:
    """bool [m]: whether no code before it is the same."""
    texts, first = distinct(codes)
    return first[texts] == torch.arange(len(codes), device=codes.device)


def _lookup(keys: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(at, found)`: the place of each key among those of the texts, which are sorted, and whether it is there."""
    if not len(texts):
        return torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
    at = torch.searchsorted(texts, keys).clamp_max(len(texts) - 1)
    return at, texts[at] == keys


def _bounds(codes: torch.Tensor, rows: range, size: int) -> torch.Tensor:
    return codes.new_tensor([rows.start * size, rows.stop * size])
