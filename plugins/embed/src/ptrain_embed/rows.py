"""The shapes that rows come in, and the one that they are given: a query, its documents, what is known of each.

The rows of every source are brought into the shape of `schema()` as soon as they are loaded, so that sources of
different shapes can be joined.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptrain import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from ptrain import Run, Source

POSITIVE, UNLABELLED, NEGATIVE = 1, 0, -1
QUERIES = ("query", "anchor", "question", "sentence1")
POSITIVES = ("positive", "positives", "pos", "document", "answer", "response", "sentence2")
NEGATIVES = ("negative", "negatives", "neg")
NUMBERED = re.compile(r"negative_\d+")
SCORES = ("score", "scores")
FAMILIES: Mapping[str, Sequence[str]] = {
    "query": QUERIES, "positive": POSITIVES, "negative": NEGATIVES, "score": SCORES,
}  # fmt: skip
"""The names that columns go by, by what they hold."""
EXPECTED = (
    "a query (`query`, `anchor`, `question` or `sentence1`) and its documents (`positive`, `document`, `answer`, "
    "`response`, `sentence2` or a list in `positives`; `negative` or a list in `negatives`)"
)


@dataclass(frozen=True)
class Row:
    """A query and its documents.

    Attributes:
        query: its text.
        documents: theirs.
        relations: of each, 1 (a positive), 0 (unlabelled) or -1 (a negative).
        scores: of each, what a teacher or a person gave; empty where there are none.
        alike: query and documents are sentences of one kind: none of them gets a prompt.
    """

    query: str
    documents: list[str]
    relations: list[int]
    scores: list[float] = field(default_factory=list)
    alike: bool = False


def schema() -> pa.Schema:
    """The arrow schema of rows as they are loaded. Rows of tokens have `tokens`, those of the query first."""
    import pyarrow as pa

    return pa.schema(
        {
            "query": pa.string(),
            "documents": pa.list_(pa.string()),
            "tokens": pa.list_(pa.list_(pa.int32())),
            "relations": pa.list_(pa.int8()),
            "scores": pa.list_(pa.float32()),
            "alike": pa.bool_(),
            "query_key": pa.int64(),
            "document_keys": pa.list_(pa.int64()),
            "set": pa.int32(),
            "origin": pa.string(),
        }
    )


def canonical_rows(run: Run, source: Source, dataset: Dataset) -> Dataset:
    """The rows of a source in the shape of `schema()`: what a wrapper of the stage `load` makes of its result.

    Raises:
        DataError: names the row that has no query, no documents, or something else in their place.
    """
    from ptrain.data.arrow import blocks, open_arrow, write_batches
    from ptrain.data.workspace import workspace

    if set(schema().names) <= set(dataset.column_names):
        return dataset
    data: Any = run.recipe.data
    number = set_number(run, source)
    made = _batches(blocks(read_rows(dataset, data.columns)), number)
    found = open_arrow(write_batches(made, schema(), workspace().path(f"set-{number}.arrow")))
    if not len(found) and not workspace().broken:
        raise DataError(f"a source of type `{source.config.type}` has no rows", expected="at least one")
    return found


def set_number(run: Run, source: Source) -> int:
    """The number of a source among those of the recipe, `sources` first."""
    every = [*run.parts.sources, *run.parts.eval_sources]
    return next((at for at, one in enumerate(every) if one is source), len(every))


def read_rows(dataset: Dataset, columns: Mapping[str, str]) -> Iterator[tuple[Row, str]]:
    """Each row and what it is called in messages.

    Raises:
        DataError: of the first row that is wrong. An audit collects them instead.
    """
    from ptrain.data.reading import row_names
    from ptrain.data.workspace import workspace

    first, broken = 0, workspace().broken
    table: Any
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for row, name in zip(table.to_pylist(), row_names(table, first), strict=True):
            try:
                yield read_row(row, name, columns), name
            except DataError as error:
                if broken is None:
                    raise
                broken.append(error)
        first += len(table)


def read_row(row: Mapping[str, Any], name: str, columns: Mapping[str, str] | None = None) -> Row:
    """A row of any shape: a pair, a triplet, a query with its positives and negatives, a graded pair of sentences.

    Args:
        name: what it is called in messages.
        columns: names of columns by what they hold (`query`, `positive`, `negative`, `score`), where they are others.

    Raises:
        DataError: it has no query or no documents, is ambiguous, or holds something that is no text.
    """
    given = {key: value for key, value in row.items() if value is not None}
    columns = columns or {}
    query = _one(given, "query", columns, name)
    if query is None:
        raise DataError(f"{name}: there is no query (the row has {_listed(given)})", expected=EXPECTED)
    text = _text(given[query], query, name)
    if "documents" in given and ("relations" in given or given.get("scores")):
        return _ready(given, text, name)
    positive = _one(given, "positive", columns, name)
    score = _one(given, "score", columns, name)
    positives = _texts(given[positive], positive, name) if positive else []
    names = [columns["negative"]] if "negative" in columns else [key for key in given if _is_negative(key)]
    negatives = [text for key in names if key in given for text in _texts(given[key], key, name)]
    documents = positives + negatives
    if not documents:
        raise DataError(f"{name}: the query has no partner (the row has {_listed(given)})", expected=EXPECTED)
    scores = _scores(given[score], len(documents), score, name) if score else []
    relations = [POSITIVE] * len(positives) + [NEGATIVE] * len(negatives)
    alike = query == "sentence1" and positive == "sentence2"
    if alike and scores:
        relations = [UNLABELLED] * len(documents)  # the score says how near they are
    elif not positives and not scores:
        raise DataError(f"{name}: the query has negatives, and no positive", expected=EXPECTED)
    return Row(text, documents, relations, scores, alike)


def text_key(text: str) -> int:
    """A hash of a text, signed 64 bit: texts with one key are the same text."""
    return content_key(text.encode("utf-8", "surrogatepass"))


def content_key(content: bytes) -> int:
    """A hash of bytes, signed 64 bit."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _ready(given: Mapping[str, Any], query: str, name: str) -> Row:
    """A row that says of each of its `documents` what it is, or what a teacher makes of it."""
    documents = _texts(given["documents"], "documents", name)
    relations = given.get("relations", [UNLABELLED] * len(documents))
    if not isinstance(relations, list) or any(one not in (POSITIVE, UNLABELLED, NEGATIVE) for one in relations):
        raise DataError(f"{name}: `relations` is {_shown(relations)}", expected="a list of 1, 0 and -1")
    if not documents or len(relations) != len(documents):
        found = f"there are {len(documents)} `documents`, and {len(relations)} `relations`"
        raise DataError(f"{name}: {found}", expected="documents, and 1, 0 or -1 for each")
    scores = _scores(given["scores"], len(documents), "scores", name) if "scores" in given else []
    return Row(query, documents, [int(one) for one in relations], scores)


def _one(given: Mapping[str, Any], what: str, columns: Mapping[str, str], name: str) -> str | None:
    """The column that holds it, if there is one.

    Raises:
        DataError: several might.
    """
    if what in columns:
        return columns[what] if columns[what] in given else None
    found = [key for key in FAMILIES[what] if key in given and given[key] != []]
    if len(found) > 1:
        raise DataError(
            f"{name}: the columns {_listed(found)} might each hold the {what}",
            expected="one of them",
            fix=f"say which, e.g. `data.columns: {{{what}: {found[0]}}}`",
        )
    return found[0] if found else None


def _is_negative(key: str) -> bool:
    return key in NEGATIVES or NUMBERED.fullmatch(key) is not None


def _text(value: Any, column: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name}: `{column}` is {_shown(value)}", expected="text")
    return value


def _texts(value: Any, column: str, name: str) -> list[str]:
    if not isinstance(value, list):
        return [_text(value, column, name)]
    return [_text(one, f"{column}[{at}]", name) for at, one in enumerate(value)]


def _scores(value: Any, count: int, column: str, name: str) -> list[float]:
    scores = value if isinstance(value, list) else [value]
    for one in scores:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not math.isfinite(one):
            raise DataError(f"{name}: `{column}` is {_shown(value)}", expected="a number for each document")
    if scores and len(scores) != count:
        raise DataError(
            f"{name}: there are {len(scores)} scores for {count} documents",
            expected="one for each: those of the positives, then those of the negatives",
        )
    return [float(one) for one in scores]


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names if name != "origin") or "no columns"


def _shown(value: Any) -> str:
    from ptrain.data.rows import shown

    if isinstance(value, str) and not value.strip():
        return "empty"
    return shown(value)


def _batches(blocks: Iterator[list[tuple[Row, str]]], number: int) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for block in blocks:
        rows, names = zip(*block, strict=True)
        columns = {
            "query": [row.query for row in rows],
            "documents": [row.documents for row in rows],
            "tokens": [None] * len(rows),
            "relations": [row.relations for row in rows],
            "scores": [row.scores for row in rows],
            "alike": [row.alike for row in rows],
            "query_key": [text_key(row.query) for row in rows],
            "document_keys": [[text_key(text) for text in row.documents] for row in rows],
            "set": [number] * len(rows),
            "origin": names,
        }
        yield pa.RecordBatch.from_pydict(columns, schema=schema())
