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
    """Write canonical rows to `path` and return them, memory-mapped.

    Conversations have a fixed type; those of other columns are inferred.

    Raises:
        DataError: a column has values of different types.
    """
    import pyarrow as pa
    from datasets import Dataset

    tables = [_table(block) for block in blocks(rows, 10 * BLOCK)]
    if not tables:
        return Dataset.from_dict({})
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the rows do not all have the same columns: {error}") from error
    return write_batches(table.to_batches(), table.schema, path)


def _table(block: list[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in block for name in row):
        values = [row.get(name) for row in block]
        conversation = name == "messages" or (name in CONVERSATIONS and any(isinstance(v, list) for v in values))
        kind = message_type() if conversation else pa.string() if name == TOOLS else None
        try:
            columns[name] = pa.array(values, type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"{block[0].get(ORIGIN, 'row')}: the column `{name}` holds values of different types: {error}"
            ) from error
    return pa.table(columns)
