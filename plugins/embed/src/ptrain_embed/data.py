"""Rows of texts to token rows: a row is a query and its documents laid end to end, which do not see each other.

Beside core's columns (`input_ids`, `labels`, all -100, and `document_lengths`, of which the first is the query's), a
token row has those of `columns()`. Batches carry them as lists under the same names, one entry for each row:
`relations[i]` has an entry for each document of row i, without the query. `document_lengths` of a batch has a list for
each line of its tensors, and a line may hold many rows: queries and documents come in the order of the rows anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

import ptrain

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from ptrain import Run
    from ptrain_embed.lay import Laying

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
BLOCK = 1000
"""Rows that are tokenised at a time."""


class EmbedData(ptrain.DataConfig):
    """The `data` section of `embed`."""

    not_prepared: ClassVar[frozenset[str]] = frozenset({"batch_from"})

    max_length: Positive = 512
    """The longest text, in tokens, with its prompt and special tokens; what is longer is cut at its end."""
    max_query_length: Positive | None = None
    """The same for queries; by default `max_length`."""
    max_document_length: Positive | None = None
    """The same for documents; by default `max_length`."""
    positives: Positive | None = None
    """At most so many positives of a row are used, the first; by default all."""
    negatives: Count | None = None
    """At most so many negatives of a row are used, the first; by default all."""
    columns: dict[Literal["query", "positive", "negative", "score"], str] = {}
    """The columns that hold queries, positives, negatives and scores, where their names do not say so."""
    batch_from: Literal["mixed", "one_source"] = "mixed"
    """What the rows of a batch come from: all sources (`mixed`), each as often as it has rows, or one source, which
    comes as often as it has batches. A `weight` of a source makes it come more or less often. Of `token-batches`, each
    stored batch counts as a source."""

    @property
    def longest_query(self) -> int:
        """The most tokens of a query."""
        return self.max_query_length or self.max_length

    @property
    def longest_document(self) -> int:
        """The most tokens of a document."""
        return self.max_document_length or self.max_length

    @property
    def longest_row(self) -> int:
        """The most tokens of a query with its documents, where `positives` and `negatives` say how many there are."""
        return self.longest_query + ((self.positives or 1) + (self.negatives or 0)) * self.longest_document

    @model_validator(mode="after")
    def _padding_of_rows(self) -> Any:
        if self.pad_to == "max_length":
            raise ValueError("`pad_to: max_length` is not for rows that hold a query and any number of documents")
        return self

    @model_validator(mode="after")
    def _batches_at_hand(self) -> Any:
        if self.batch_from == "mixed" and any(getattr(one, "stream", False) for one in self.sources):
            raise ValueError(
                "a source says `stream: true`, and `batch_from: mixed` mixes rows of all stored batches: write "
                "`batch_from: one_source`, or leave `stream` out"
            )
        return self


def columns() -> pa.Schema:
    """The columns of token rows that core does not know.

    relations: of each document 1 (a positive), 0 (unlabelled) or -1 (a negative).
    scores: of each document, or empty.
    query_key, document_keys: hashes of the texts.
    positive_keys: of all documents that any row of the data labels a positive of this query.
    set: the source, by its number among `sources` and `eval_sources`; each stored batch of tokens is a set of its own.
    group: rows of one group share a query or a positive, or are linked by rows that do.
    """
    import pyarrow as pa

    return pa.schema(
        {
            "relations": pa.list_(pa.int8()),
            "scores": pa.list_(pa.float32()),
            "query_key": pa.int64(),
            "document_keys": pa.list_(pa.int64()),
            "positive_keys": pa.list_(pa.int64()),
            "set": pa.int32(),
            "group": pa.int64(),
        }
    )


def process_rows(run: Run, split: str, dataset: Dataset) -> Dataset:
    """Token rows of rows that `canonical_rows` has given their shape; what was left out or cut is in the report.

    Raises:
        DataError: there is no room for a text, or a text has no tokens.
    """
    import pyarrow as pa

    from ptrain.data.arrow import open_arrow, write_batches
    from ptrain.data.documents import token_schema
    from ptrain.data.process import counted
    from ptrain.data.workspace import workspace
    from ptrain_embed.keys import labels_of
    from ptrain_embed.lay import Laying

    report = workspace().report(split)
    report.rows += len(dataset)
    folder = workspace().folder / f"laid-{split}"
    folder.mkdir(exist_ok=True)
    work = Laying(run, labels_of(dataset), report, folder)
    schema = pa.schema([*token_schema(), *columns()])
    found = open_arrow(write_batches(_laid(work, dataset), schema, workspace().path(f"{split}.arrow")))
    report.documents = len(found)
    work.note_cuts()
    return counted(found, report)


def _laid(work: Laying, dataset: Dataset) -> Iterator[pa.RecordBatch]:
    from ptrain.data.progress import progress

    tables: Any = dataset.with_format("arrow").iter(batch_size=BLOCK)
    with progress("preparing", len(dataset)) as done:
        for at, table in enumerate(tables):
            yield from work.batches(table, at * BLOCK)
            done(len(table))
