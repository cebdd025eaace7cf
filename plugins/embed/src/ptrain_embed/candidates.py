"""What negatives are mined from: every text of the rows once, and which of them belongs to which query."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import DataError
from ptrain_embed.negatives import Query
from ptrain_embed.rows import NEGATIVE, POSITIVE, text_key

if TYPE_CHECKING:
    from datasets import Dataset

BLOCK = 10_000
"""Texts that are written at a time."""


class Candidates:
    """Documents in a file, each text once, and queries with the numbers of their documents.

    Attributes:
        queries: the text of each query.
        known: what is known of each, in the same order.
        documents: the texts of all documents, mapped from the file.
        digest: of all texts and labels.
    """

    def __init__(self, rows: Iterable[Dataset], further: Iterable[str], path: Path) -> None:
        """Gather the documents of rows, in the shape that every source is given, and further texts.

        Raises:
            DataError: rows hold tokens and no texts, or there is no query with a positive.
        """
        from ptrain.data.arrow import mapped

        self.queries: list[str] = []
        self._labelled: list[tuple[int, dict[int, set[int]]]] = []
        self._numbers: dict[int, int] = {}
        self._asked: dict[int, int] = {}
        self._digest = hashlib.blake2b(digest_size=16)
        _write(self._texts(rows, further), path)
        if not any(labelled[POSITIVE] for _, labelled in self._labelled):
            raise DataError("no query of `data.sources` has a positive", expected="rows with a query and a positive")
        self.documents: Any = mapped(path)["text"]
        self.known = [
            Query(key, self._numbers.get(key, -1), labelled[POSITIVE], labelled[NEGATIVE])
            for key, labelled in self._labelled
        ]
        for query in self.known:
            self._digest.update(repr((query.key, sorted(query.positives), sorted(query.negatives))).encode())
        self.digest = self._digest.hexdigest()

    def texts(self, numbers: list[int]) -> list[str]:
        """The documents of these numbers."""
        # Taking from a column of many gigabytes would join its blocks first.
        return [self.documents.chunk(at // BLOCK)[at % BLOCK].as_py() for at in numbers]

    def _texts(self, rows: Iterable[Dataset], further: Iterable[str]) -> Iterator[str]:
        """Each text that was not there before, in order."""
        for dataset in rows:
            table: Any
            for table in dataset.with_format("arrow").iter(batch_size=1000):
                for row in table.to_pylist():
                    yield from self._row(row)
        for text in further:
            if self._new(text_key(text), text):
                yield text

    def _row(self, row: dict[str, Any]) -> Iterator[str]:
        if row["tokens"] is not None:
            raise DataError(f"{row['origin']}: the row holds tokens", expected="texts, for another model to read")
        for key, text in zip(row["document_keys"], row["documents"], strict=True):
            if self._new(key, text):
                yield text
        at = self._asked.setdefault(row["query_key"], len(self.queries))
        if at == len(self.queries):
            self.queries.append(row["query"])
            self._labelled.append((row["query_key"], {POSITIVE: set(), NEGATIVE: set()}))
        labelled = self._labelled[at][1]
        for key, relation in zip(row["document_keys"], row["relations"], strict=True):
            if relation in labelled:
                labelled[relation].add(self._numbers[key])

    def _new(self, key: int, text: str) -> bool:
        if key in self._numbers:
            return False
        self._numbers[key] = len(self._numbers)
        self._digest.update(key.to_bytes(8, "big", signed=True))
        return True


def _write(texts: Iterable[str], path: Path) -> None:
    import pyarrow as pa

    from ptrain.data.arrow import blocks, write_batches

    schema = pa.schema({"text": pa.string()})
    write_batches((pa.RecordBatch.from_pydict({"text": block}, schema) for block in blocks(texts, BLOCK)), schema, path)
