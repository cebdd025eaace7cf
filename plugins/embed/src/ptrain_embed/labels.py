"""What is known of the queries and documents of a contrastive batch besides their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ptrain import Batch

HEAD = 3
"""Numbers that a packed batch begins with: of queries, of documents, of `no_negatives`."""


@dataclass(frozen=True)
class Labels:
    """The labels of n queries and of the m documents that came with them, in the order of their queries.

    Attributes:
        owners: int64 [m], the query that each document came with.
        relations: int64 [m], what it is to that query: 1 positive, 0 unlabelled, -1 negative.
        scores: fp32 [m], a teacher's scores or grades, nan where there is none.
        query_keys: int64 [n], a hash of each query's text.
        document_keys: int64 [m], a hash of each document's text.
        no_negatives: int64 [k, 2], pairs of a query and the hash of a text that is no negative of it.
    """

    owners: torch.Tensor
    relations: torch.Tensor
    scores: torch.Tensor
    query_keys: torch.Tensor
    document_keys: torch.Tensor
    no_negatives: torch.Tensor

    @property
    def queries(self) -> int:
        """How many queries there are."""
        return len(self.query_keys)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_keys)

    def of_rows(self, rows: range) -> slice:
        """The documents that came with these queries."""
        first, last = torch.searchsorted(self.owners, self.owners.new_tensor([rows.start, rows.stop])).tolist()
        return slice(first, last)

    def query_positions(self) -> torch.Tensor:
        """int64 [n]: where the queries lie among n + m embeddings, each followed by its documents."""
        at = torch.arange(self.queries, device=self.owners.device)
        return at + torch.searchsorted(self.owners, at)

    def document_positions(self) -> torch.Tensor:
        """int64 [m]: where the documents lie."""
        return torch.arange(self.documents, device=self.owners.device) + self.owners + 1

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Labels:
        """Those of the rows of micro-batches, on the CPU.

        A query's own text and its positives, in whatever row of the data they are labelled, are no negatives of it.
        """
        rows = [(batch, at) for batch in batches for at in range(batch["rows"])]
        columns: dict[str, list[list[Any]]] = {
            name: [list(batch[name][at]) for batch, at in rows]
            for name in ("relations", "scores", "document_keys", "positive_keys")
        }
        queries = [int(batch["query_key"][at]) for batch, at in rows]
        sizes = [len(one) for one in columns["relations"]]
        nan = float("nan")
        scores = [own or [nan] * size for own, size in zip(columns["scores"], sizes, strict=True)]
        known = [
            (query, int(key))
            for query, keys in enumerate(columns["positive_keys"])
            for key in (queries[query], *keys)
        ]  # fmt: skip
        return cls(
            torch.repeat_interleave(torch.arange(len(rows)), _ints(sizes)), _ints(chain(*columns["relations"])),
            torch.tensor([float(score) for score in chain(*scores)], dtype=torch.float32), _ints(queries),
            _ints(chain(*columns["document_keys"])), torch.tensor(known, dtype=torch.int64).view(-1, 2),
        )  # fmt: skip

    def to(self, device: torch.device) -> Labels:
        """The same on a device."""
        return Labels(*(value.to(device) for value in vars(self).values()))

    def packed(self) -> torch.Tensor:
        """Everything in one int64 vector, so that workers exchange it at once."""
        sizes = torch.tensor([self.queries, self.documents, len(self.no_negatives)], device=self.owners.device)
        scores = self.scores.double().view(torch.int64)
        values = (self.query_keys, self.owners, self.relations, scores, self.document_keys, self.no_negatives.flatten())
        return torch.cat([sizes, *values])

    @classmethod
    def unpacked(cls, packed: Sequence[torch.Tensor]) -> Labels:
        """The labels of all workers as those of one batch: the queries of the first come first."""
        found: list[Labels] = []
        before = 0
        for one in packed:
            n, m, k = one[:HEAD].tolist()
            queries, owners, relations, scores, documents, pairs = one[HEAD:].split([n, m, m, m, m, 2 * k])
            pairs = pairs.view(-1, 2) + pairs.new_tensor([before, 0])
            found.append(cls(owners + before, relations, scores.view(torch.float64).float(), queries, documents, pairs))
            before += n
        return cls(*(torch.cat(values) for values in zip(*(vars(one).values() for one in found), strict=True)))


def _ints(values: Any) -> torch.Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
