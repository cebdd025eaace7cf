"""What all sources share: checking rows, taking a part of them, content hashes of local files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain.data.rows import ORIGIN, BadRow, canonical_row
from ptrain.data.workspace import workspace
from ptrain.errors import DataError, Position

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain.recipe.sections import SourceConfig


def checked(rows: Iterable[tuple[int, Any]], file: str) -> Iterator[dict[str, Any]]:
    """Numbered rows in canonical form, each with its origin; a row that is a DataError could not be read.

    Raises:
        DataError: names file, row, field, what was found and what was expected. An audit collects them instead.
    """
    broken = workspace().broken
    for number, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            yield {**_canonical(row, file, number), ORIGIN: f"{file}:{number}"}
        except DataError as error:
            if broken is None:
                raise
            broken.append(error)


def _canonical(row: Any, file: str, number: int) -> dict[str, Any]:
    try:
        return canonical_row(row)
    except BadRow as error:
        where = Position(file, number, 1)
        raise DataError(str(error), where=where, expected=error.expected, fix=error.fix) from error


def stored(rows: Iterable[dict[str, Any]], config: SourceConfig) -> Dataset:
    """Rows as a memory-mapped Dataset, of which `sample_ratio` or `sample_count` draws a part.

    Raises:
        DataError: there are none.
    """
    from ptrain.data.arrow import write_rows

    return sampled(write_rows(rows, workspace().path("source.arrow")), config)


def sampled(dataset: Dataset, config: SourceConfig) -> Dataset:
    """The rows that `sample_ratio` or `sample_count` draws, in their own order; all without either.

    More than there are repeats them.

    Raises:
        DataError: there are no rows, or both are given.
    """
    import numpy as np

    if not len(dataset):
        raise DataError(f"a source of type `{config.type}` has no rows", expected="at least one")
    count = config.sample_count
    if count is not None and config.sample_ratio is not None:
        raise DataError("a source has both `sample_ratio` and `sample_count`", expected="one of them")
    if count is None and config.sample_ratio is not None:
        count = max(1, round(len(dataset) * config.sample_ratio))
    if count is None or count == len(dataset):
        return dataset
    whole, rest = divmod(count, len(dataset))
    order = np.random.default_rng(config.sample_seed).permutation(len(dataset))
    return dataset.select(np.concatenate([np.arange(len(dataset))] * whole + [np.sort(order[:rest])]))


def matching(pattern: str) -> list[Path]:
    """The files that a path or a pattern names, in the order of their names."""
    whole = Path(pattern).expanduser()
    root = Path(whole.anchor)
    found = [whole] if whole.is_file() else sorted(root.glob(str(whole.relative_to(root))))
    return [one for one in found if one.is_file()]


def content_hashes(paths: Iterable[Path]) -> list[list[Any]]:
    """`[name, size, sha256]` of each file."""
    found: list[list[Any]] = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found.append([path.name, path.stat().st_size, digest.hexdigest()])
    return found
