"""The rows of an arrow table, as encoding needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptrain.data.encode import IGNORED, Tokens
from ptrain.data.rows import ORIGIN, TOOLS, BadRow, canonical_messages, canonical_tools, conversations, message_type
from ptrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MOST = 2**31
"""Token ids are below: they are kept as int32."""


def row_names(table: pa.Table, first: int) -> list[str]:
    """What each row is called in messages."""
    if ORIGIN in table.column_names:
        return table[ORIGIN].to_pylist()
    return [f"row {first + at + 1}" for at in range(len(table))]


def given_tokens(table: pa.Table, names: list[str]) -> list[Tokens | None]:
    """Documents of rows that hold tokens already, None for the others."""
    if "input_ids" not in table.column_names:
        return [None] * len(table)
    labels = table["labels"].to_pylist() if "labels" in table.column_names else [None] * len(table)
    return [
        None if ids is None else _tokens(ids, wanted, name)
        for ids, wanted, name in zip(table["input_ids"].to_pylist(), labels, names, strict=True)
    ]


def _tokens(ids: Any, labels: Any, name: str) -> Tokens:
    for field, value in (("input_ids", ids), ("labels", labels)):
        if not isinstance(value, list) or not value or not all(isinstance(one, int) for one in value):
            raise DataError(f"{name}: `{field}` is no list of token ids", expected="`input_ids` and `labels` as lists")
    if len(ids) != len(labels):
        raise DataError(f"{name}: there are {len(ids)} `input_ids`, but {len(labels)} `labels`")
    for field, value in (("input_ids", ids), ("labels", [one for one in labels if one != IGNORED])):
        wrong = next((one for one in value if not 0 <= one < MOST), None)
        if wrong is not None:
            raise DataError(f"{name}: `{field}` holds {wrong}", expected="token ids, and -100 for labels not to learn")
    return Tokens(_int32(ids), _int32(labels))


def _int32(values: list[int]) -> np.ndarray:
    import numpy as np

    return np.array(values, dtype=np.int32)


def conversation_rows(table: pa.Table, names: list[str]) -> Iterator[tuple[list[dict[str, Any]], Any, str]]:
    """`(messages, tools, name)` of each row."""
    if "messages" not in table.column_names:
        raise DataError(f"{names[0]}: the row has no `messages`")
    column = table["messages"]
    ready = column.type == message_type()
    found = conversations(column) if ready else column.to_pylist()
    tools = table[TOOLS].to_pylist() if TOOLS in table.column_names else [None] * len(found)
    for messages, schemas, name in zip(found, tools, names, strict=True):
        if messages is None:
            raise DataError(f"{name}: the row has no `messages`")
        try:
            said = messages if ready else canonical_messages(messages)
            yield said, json.loads(schemas if ready else canonical_tools(schemas)) if schemas else None, name
        except BadRow as error:
            raise DataError(f"{name}: {error}", expected=error.expected, fix=error.fix) from error
