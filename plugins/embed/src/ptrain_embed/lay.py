"""A block of loaded rows to token rows: which documents are kept, their tokens, and what was cut."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

from ptrain import DataError
from ptrain_embed.rows import NEGATIVE, POSITIVE
from ptrain_embed.texts import IGNORED, given, shortened, tokenise

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pyarrow as pa

    from ptrain import Run
    from ptrain.data.report import Report
    from ptrain_embed.data import EmbedData
    from ptrain_embed.keys import Labels
    from ptrain_embed.texts import Cut

CONTRADICTED = "negatives that are a positive of the same query"
REPEATED = "documents that their row has twice"
EMPTY = "without a document that is left"
COUNTS = b"counts"
LISTS = ("relations", "scores", "documents", "document_keys")
Loaded = dict[str, Any]


class Laying:
    """Lays queries and their documents end to end, a block of rows at a time.

    A finished block is a file named after its content: a preparation that was killed finds it again.

    Attributes:
        labels: of all rows of the split.
        report: gets what was left out, and the tokens that were cut off.
        cut: how many queries and documents were longer than they may be.
    """

    def __init__(self, run: Run, labels: Labels, report: Report, folder: Path) -> None:
        from ptrain_embed.model import prompts

        self.labels, self.report, self.cut = labels, report, Counter[str]()
        self._folder = folder
        self._tokenizer = run.tokenizer
        self._data = cast("EmbedData", run.recipe.data)
        self._lengths = self._data.longest_query, self._data.longest_document
        self._prompts = prompts(run)
        # The rows of such a source hold places in its files instead of tokens.
        self._stored = [getattr(one.config, "stream", False) for one in (*run.parts.sources, *run.parts.eval_sources)]
        self._known = hashlib.blake2b(digest_size=12)
        for values in (labels.groups, labels.queries, labels.documents):
            self._known.update(values.tobytes())

    def batches(self, table: pa.Table, first: int) -> list[pa.RecordBatch]:
        """The token rows of some rows, of which the first has the number `first`.

        Raises:
            DataError: names the row with a text that has no tokens.
        """
        from ptrain.data.arrow import mapped, write_batches
        from ptrain.data.report import Report

        path = self._folder / f"{first:09d}-{self._digest(table)}.arrow"
        if not path.exists():
            own = copy(self)
            own.report, own.cut = Report(), Counter[str]()
            batch = own._batch(table, first)
            counts = json.dumps([own.report.json(), own.cut]).encode()
            write_batches([batch], batch.schema.with_metadata({COUNTS: counts}), path)
        found = mapped(path)
        report, cut = json.loads(found.schema.metadata[COUNTS])
        self.report.add(Report.of(report))
        self.cut.update(cut)
        return found.replace_schema_metadata().to_batches()

    def _digest(self, table: pa.Table) -> str:
        import pyarrow as pa

        table, sink = table.replace_schema_metadata().combine_chunks(), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest = self._known.copy()
        digest.update(memoryview(sink.getvalue()))
        return digest.hexdigest()

    def _batch(self, table: pa.Table, first: int) -> pa.RecordBatch:
        import pyarrow as pa

        from ptrain.data.documents import token_batch
        from ptrain_embed.data import columns

        rows: list[Loaded] = []
        for at, row in enumerate(table.to_pylist(), first):
            found = self._chosen(row)
            if found["relations"]:
                rows.append({**found, "group": int(self.labels.groups[at])})
            else:
                self.report.drop(EMPTY, row["origin"])
        tokens = token_batch(self._laid(rows))
        extra = pa.RecordBatch.from_pylist([{name: row[name] for name in columns().names} for row in rows], columns())
        return pa.RecordBatch.from_arrays([*tokens.columns, *extra.columns], schema=_joined(tokens, extra))

    def note_cuts(self) -> None:
        """Say in the report what was cut."""
        for what, length in zip(("queries", "documents"), self._lengths, strict=True):
            if count := self.cut[what]:
                self.report.note(f"{count:,} {what} were longer than {length} tokens, and are cut")

    def _chosen(self, row: Loaded) -> Loaded:
        """The row with the documents that are used: none twice, no negative that is a positive, not too many."""
        positive = self.labels.positives(row["query_key"])
        left = {POSITIVE: self._data.positives, NEGATIVE: self._data.negatives}
        known, seen = set(positive.tolist()), set[int]()
        kept: list[int] = []
        for at, (key, relation) in enumerate(zip(row["document_keys"], row["relations"], strict=True)):
            room = left.get(relation)
            if relation == NEGATIVE and key in known:
                self.report.drop(CONTRADICTED, row["origin"])
            elif key in seen:
                self.report.drop(REPEATED, row["origin"])
            elif room != 0:
                seen.add(key)
                kept.append(at)
                left[relation] = None if room is None else room - 1
        chosen = {name: [row[name][at] for at in kept] for name in LISTS if row[name]}
        tokens = row["tokens"] and [row["tokens"][at] for at in (0, *(at + 1 for at in kept))]
        return {**row, **chosen, "tokens": tokens, "positive_keys": positive}

    def _laid(self, rows: Sequence[Loaded]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """`(ids, labels)` of the query and of each document of each row."""
        import numpy as np

        texts = [row for row in rows if row["tokens"] is None]
        queries = [self._prompted(row, 0, row["query"]) for row in texts]
        documents = [self._prompted(row, 1, one) for row in texts for one in row["documents"]]
        found = [
            tokenise(self._tokenizer, some, length) if some else {}
            for some, length in zip((queries, documents), self._lengths, strict=True)
        ]
        made = []
        for row in rows:
            cuts = self._cuts(row, *found)
            self._count(row, cuts)
            made.append([(cut.ids, np.full(len(cut.ids), IGNORED, dtype=np.int32)) for cut in cuts])
        return made

    def _cuts(self, row: Loaded, queries: Mapping[str, Cut], documents: Mapping[str, Cut]) -> list[Cut]:
        if row["tokens"] is None:
            query = queries[self._prompted(row, 0, row["query"])]
            return [query, *(documents[self._prompted(row, 1, one)] for one in row["documents"])]
        if self._stored[row["set"] % len(self._stored)]:
            return [shortened(place, 1) for place in row["tokens"]]
        return given(row["tokens"], *self._lengths, len(self._tokenizer), row["origin"])

    def _prompted(self, row: Loaded, which: int, text: str) -> str:
        return text if row["alike"] else self._prompts[which] + text

    def _count(self, row: Loaded, cuts: Sequence[Cut]) -> None:
        for at, cut in enumerate(cuts):
            if not len(cut.ids):
                raise DataError(
                    f"{row['origin']}: {f'document {at}' if at else 'the query'} has no token", expected="text"
                )
            if cut.lost:
                self.cut["documents" if at else "queries"] += 1
                self.report.lost_tokens += cut.lost


def _joined(*batches: pa.RecordBatch) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([field for batch in batches for field in batch.schema])
