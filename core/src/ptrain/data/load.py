"""The rows of all sources, joined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptrain.data.rows import CONVERSATIONS, ORIGIN, TOOLS, message_type
from ptrain.data.sources.base import checked
from ptrain.data.workspace import workspace
from ptrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from ptrain.run import Run

KNOWN = {*CONVERSATIONS, TOOLS, "text", "input_ids", "labels", ORIGIN}
"""Columns that are kept when only some sources have them."""


def load_rows(run: Run, sources: Sequence[Any], *, besides: Dataset | None = None) -> Dataset:
    """The rows of `besides` and of each source, one after another, through the stage `load`.

    Raises:
        DataError: of a source; or a source says `process: false` and has no tokens; or their columns do not fit.
    """
    parts = [besides] if besides is not None and len(besides) else []
    for source in sources:
        rows = run.call("load", source=source)
        if not source.config.process and not {"input_ids", "labels"} <= set(rows.column_names):
            raise DataError(
                f"a source of type `{source.config.type}` says `process: false`, and has the columns "
                f"{rows.column_names}",
                expected="`input_ids` and `labels`",
                fix="leave `process` out",
            )
        parts.append(canonical(rows, source.config.type))
    return joined(parts)


def canonical(rows: Dataset, name: str) -> Dataset:
    """`rows` with conversations of the type that they have in the sources of core, so that both can be joined.

    Those of a source that a plugin brings, or of a callback that makes rows anew, are often lists of other objects.

    Raises:
        DataError: a row is wrong; it is called by its `origin`, or else by `name` and its number.
    """
    from ptrain.data.arrow import write_rows

    schema = rows.features.arrow_schema
    wanted = {column: message_type() for column in CONVERSATIONS}
    lists = [one for one in schema if one.name in (*CONVERSATIONS, TOOLS) and hasattr(one.type, "value_type")]
    if all(one.type == wanted.get(one.name) for one in lists):
        return rows
    return write_rows(_named(rows, name), workspace().path("canonical.arrow"))


def _named(rows: Dataset, name: str) -> Iterator[dict[str, Any]]:
    """The checked rows, each with the origin that it has, or else its number."""
    row: Any
    for number, row in enumerate(rows, 1):
        for one in checked([(number, row)], name):
            yield {**one, ORIGIN: row.get(ORIGIN) or one[ORIGIN]}


def same_rows(dataset: Dataset) -> np.ndarray:
    """For each row a number from 0, the same for rows of the same origin, int64 [rows].

    Origins that end in no number, as a plugin may give them, are those of many rows.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    every = np.arange(len(dataset))
    if ORIGIN not in dataset.column_names or str(dataset.features.arrow_schema.field(ORIGIN).type) != "string":
        return every
    table: Any = dataset.select_columns([ORIGIN]).with_format("arrow")[:]
    names: Any = table[ORIGIN].cast(pa.large_string()).combine_chunks()  # of which there may be more than 2 GiB
    codes = names.dictionary_encode().indices.fill_null(-1).to_numpy()
    _, first, groups = np.unique(codes, return_index=True, return_inverse=True)
    if len(first) == len(dataset):
        return every
    numbered = pc.fill_null(pc.match_substring_regex(names, r":\d+$"), False)  # type: ignore[attr-defined]
    alone = np.where(numbered.to_numpy(zero_copy_only=False), first[groups], every)
    return np.unique(alone, return_inverse=True)[1]


def joined(parts: list[Dataset]) -> Dataset:
    """The rows of several data sets, one after another, with the columns that all have or that are known.

    Raises:
        DataError: their types do not fit.
    """
    from datasets import concatenate_datasets

    if len(parts) == 1:
        return parts[0]
    kept = KNOWN | set.intersection(*(set(part.column_names) for part in parts))
    chosen = [part.select_columns([name for name in part.column_names if name in kept]) for part in parts]
    try:
        return concatenate_datasets(chosen)
    except (ValueError, TypeError) as error:
        raise DataError(f"the rows of the sources do not fit together: {error}") from error
