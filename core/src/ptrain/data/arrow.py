"""Rows to arrow files and back as memory-mapped data sets: what is prepared need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptrain.data.rows import CONVERSATIONS, ORIGIN, TOOLS, message_type
from ptrain.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BLOCK = 1000
T = TypeVar("T")


def blocks(items: Iterable[T], size: int = BLOCK) -> Iterator[list[T]]:
    """`items` in lists of `size`."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def open_arrow(path: Path) -> Dataset:
    """The rows of an arrow file, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> Dataset:
    """Write record batches of one schema to `path`, in one step, and return the rows, memory-mapped."""
    import pyarrow as pa

    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    temporary.replace(path)
    return open_arrow(path)


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> Dataset:
    """Write canonical rows to arrow files beside `path` and return them, memory-mapped.

    Types of other columns are inferred by blocks of rows; where they differ, a new file is begun.

    Raises:
        DataError: a column has values of different types.
    """
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets

    parts: list[Dataset] = []
    pending: list[pa.RecordBatch] = []

    def finish() -> None:
        name = path.with_name(f"{path.stem}-{len(parts):03d}{path.suffix}")
        parts.append(write_batches(iter(pending), pending[0].schema, name))
        pending.clear()

    writer = _Segments(path)
    for block in blocks(rows):
        writer.add(_batch(block))
    files = writer.close()
    if not files:
        return Dataset.from_dict({})
    tables = [open_arrow(file) for file in files]
    if len(tables) == 1:
        return tables[0]
    schema = _unified([table.data.schema for table in tables])
    from datasets import Features

    features = Features.from_arrow_schema(schema)
    return concatenate_datasets([_widened(table, schema).cast(features) for table in tables])
