"""Prepared rows whose tokens are read from their stored batches when a step needs them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from ptrain_embed.texts import IGNORED, given

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run
    from ptrain_embed.token_batches import Stored

KEPT = 2
"""Stored batches that are kept in memory."""


def streams(run: Run) -> bool:
    """Whether a source leaves its tokens where they are stored."""
    return any(getattr(source.config, "stream", False) for source in (*run.parts.sources, *run.parts.eval_sources))


class Streamed:
    """Prepared rows, as a loader reads them: numbers of rows in, numpy columns out, with the tokens of the batches.

    A batch is read whole, once for all rows that are asked for while it is among the last.
    """

    def __init__(self, run: Run, dataset: Dataset) -> None:
        data: Any = run.recipe.data
        self._dataset = dataset.with_format("numpy")
        self._sources: list[Any] = [*run.parts.sources, *run.parts.eval_sources]
        self._limits = (data.longest_query, data.longest_document, len(run.tokenizer))
        self._batches: OrderedDict[int, Stored] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._dataset)

    def with_format(self, kind: str) -> Streamed:
        """Itself: its columns are numpy's anyway."""
        return self

    def __getitem__(self, numbers: int | list[int]) -> dict[str, Any]:
        if isinstance(numbers, int):
            return self._filled(self._dataset[numbers])
        columns: Any = self._dataset[numbers]
        rows = [self._filled(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in columns}

    def _filled(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with tokens in the place of where they are."""
        import numpy as np

        batch, source = divmod(int(row["set"]), len(self._sources))
        if not batch or not self._sources[source].config.stream:
            return row
        query, *documents = row["input_ids"].tolist()
        stored = self._stored(int(row["set"]))
        tokens = [stored.queries[query], *(stored.documents[one] for one in documents)]
        name = f"{self._sources[source].batches[batch - 1]}: query {stored.names[query]}"
        ids = [cut.ids for cut in given(tokens, *self._limits, name)]
        return {
            **row, "input_ids": np.concatenate(ids), "labels": np.full(sum(map(len, ids)), IGNORED),
            "document_lengths": np.array([len(one) for one in ids]),
        }  # fmt: skip

    def _stored(self, number: int) -> Stored:
        """The batch of the set `number`; threads that want the same one wait for it."""
        with self._lock:
            if number not in self._batches:
                batch, source = divmod(number, len(self._sources))
                self._batches[number] = self._sources[source].read(self._sources[source].batches[batch - 1])
            self._batches.move_to_end(number)
            while len(self._batches) > KEPT:
                self._batches.popitem(last=False)
            return self._batches[number]
