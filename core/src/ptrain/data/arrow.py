"""Rows to arrow files and back as memory-mapped data sets: what is prepared need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby, islice
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


def mapped(path: Path) -> pa.Table:
    """The table in an arrow file, memory-mapped."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def write_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema, path: Path) -> Path:
    """Write record batches of one schema to `path`, which is there with all of them or not at all."""
    import pyarrow as pa

    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return temporary.replace(path)


def write_dataset(dataset: Dataset, path: Path) -> Path:
    """Write the rows of a data set to `path`, a block at a time."""
    tables: Any = dataset.with_format("arrow").iter(batch_size=BLOCK)
    return _write_tables(tables, path)


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> Dataset:
    """Write canonical rows to `path` and return them, memory-mapped; only a block is in memory at a time.

    Conversations have a fixed type; those of other columns are inferred.

    Raises:
        DataError: a column has values of different types.
    """
    from datasets import Dataset

    files: list[Path] = []
    for _, tables in groupby((_table(block) for block in blocks(rows)), key=lambda table: table.schema):
        files.append(_write_tables(tables, path.with_name(f"{path.stem}-{len(files)}{path.suffix}")))
    if not files:
        return Dataset.from_dict({})
    return open_arrow(files[0].replace(path) if len(files) == 1 else _merge(files, path))


def _write_tables(tables: Iterator[pa.Table], path: Path) -> Path:
    first = next(tables)
    return write_batches(
        (batch for table in chain([first], tables) for batch in table.to_batches()), first.schema, path
    )


def _merge(files: list[Path], path: Path) -> Path:
    """Files of different columns or types as one."""
    import pyarrow as pa

    try:
        schema = pa.unify_schemas([mapped(file).schema for file in files], promote_options="permissive")
        return write_batches((batch for file in files for batch in _widened(mapped(file), schema)), schema, path)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"the rows do not all have the same columns: {error}") from error
    finally:
        for file in files:
            file.unlink()


def _widened(table: pa.Table, schema: pa.Schema) -> list[pa.RecordBatch]:
    import pyarrow as pa

    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema).to_batches()


def _table(block: list[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    columns = {}
    for name in dict.fromkeys(name for row in block for name in row):
        values = [row.get(name) for row in block]
        conversation = name == "messages" or (name in CONVERSATIONS and any(isinstance(v, list) for v in values))
        kind = message_type() if conversation else pa.string() if name == TOOLS else None
        try:
            columns[name] = pa.array(values, type=kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise DataError(_alone(name, values, block, kind) or _mixed(name, values, block, error)) from error
    return pa.table(columns)


def _alone(name: str, values: list[Any], block: list[Mapping[str, Any]], kind: Any) -> str | None:
    """The first value that has no place in any column: a number beyond 64 bits, half of a character (`\\ud83d`)."""
    import pyarrow as pa

    for value, row in zip(values, block, strict=True):
        try:
            pa.array([value], type=kind)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            return f"{row.get(ORIGIN, 'a row')}: the column `{name}` holds a value that can't be stored: {error}"
    return None


def _mixed(name: str, values: list[Any], block: list[Mapping[str, Any]], error: Exception) -> str:
    """Where the type of a column changes."""
    kinds = [(type(value).__name__, row.get(ORIGIN, "a row")) for value, row in zip(values, block, strict=True)]
    kinds = [(kind, origin) for kind, origin in kinds if kind != "NoneType"]
    other = next(((kind, origin) for kind, origin in kinds if kind != kinds[0][0]), None)
    if other is None:
        return f"{kinds[0][1]}: the column `{name}` holds values of different types: {error}"
    return f"{other[1]}: the column `{name}` holds a {other[0]}, but a {kinds[0][0]} in {kinds[0][1]}"
