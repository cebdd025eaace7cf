"""What there is to train on, and how much of what is computed is padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain.errors import MissingData, MissingModel

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

    from ptrain.data.cache import Prepared
    from ptrain.run import Run

COUNTED = 200_000_000
"""Labels of more tokens are not counted one by one: every position is taken to have one."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    Attributes:
        rows: that came in.
        samples: that are trained on (after packing, say).
        tokens, supervised: of all samples; those that are learnt.
        dropped: rows by reason.
        fullness: of packed samples, tokens over samples x max_length.
    """

    rows: int
    samples: int
    tokens: int
    supervised: int
    dropped: dict[str, int]
    fullness: float | None


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch that a worker can meet.

    Attributes:
        samples: its rows.
        length: tokens of each, with padding.
        labels: positions at which something is learnt.
    """

    samples: int
    length: int
    labels: int

    @property
    def tokens(self) -> int:
        """Positions that are computed."""
        return self.samples * self.length


def splits(prepared: Prepared) -> dict[str, Rows]:
    """The rows of each split that has some."""
    from ptrain.data.report import Report

    reports = {split: Report.of(found) for split, found in prepared.report.items()}
    return {
        split: Rows(one.rows, one.samples, one.tokens, one.supervised_tokens, dict(one.dropped), one.fullness)
        for split, one in reports.items()
        if one.samples
    }


def prepared_rows(run: Run, unknown: list[str]) -> Prepared | None:
    """The prepared data, from the cache or made now as a run makes it; None where data or tokenizer are not here.

    Args:
        unknown: gets a line that says what is missing.
    """
    from ptrain.data.cache import prepare

    try:
        return prepare(run)
    except (MissingData, MissingModel) as error:
        unknown.append(f"rows, tokens and what follows from them: {error.problems[0].message}")
        return None


def padding(run: Run, rows: Dataset) -> float | None:
    """The share of the positions computed in the first epoch that hold no token.

    None where a trainer or plugin lays out batches of its own.
    """
    import numpy as np

    from ptrain.data.sampler import StepSampler

    if sum(role == "answers" for _, role, _ in run.stack.order("create_dataloader")) > 1:
        return None
    recipe = run.recipe
    size = recipe.micro_batch_size
    sampler = StepSampler(len(rows), size, run.accumulation, 0, run.data_world, recipe.data.seed)
    lengths = row_lengths(rows)[sampler.order(0)]
    # Micro-batches are consecutive pieces of the order, whichever worker has them.
    whole = np.pad(lengths, (0, -len(lengths) % size)).reshape(-1, size)
    computed = padded(run, whole.max(axis=1)) * (whole > 0).sum(axis=1)
    return 1.0 - float(lengths.sum()) / float(computed.sum())


def padded(run: Run, longest: Any) -> Any:
    """The length of a micro-batch whose longest row has `longest` tokens (a number or an array)."""
    data = run.recipe.data
    if data.pad_to == "max_length":
        return longest * 0 + data.max_length
    return -(-longest // data.div_length) * data.div_length


def largest_batch(run: Run, rows: Dataset | None, samples: int) -> Batch:
    """The largest micro-batch of `samples` rows: those that are there, or rows as long as can be."""
    import numpy as np

    if rows is None:
        length = padded(run, run.recipe.data.longest_row)
        return Batch(samples, length, samples * length)
    lengths, samples = row_lengths(rows), min(samples, len(rows))
    length = int(padded(run, int(lengths.max())))
    if lengths.sum() > COUNTED:
        return Batch(samples, length, samples * length)
    labels = np.sort(np.concatenate(list(_labels(rows))))[-samples:]
    return Batch(samples, length, int(labels.sum()))


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, int64 [rows]."""
    import numpy as np

    tables: Any = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    chunks = (chunk for table in tables for chunk in table["input_ids"].chunks)
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).astype(np.int64)


def _labels(rows: Dataset) -> Iterator[np.ndarray]:
    """Labels of each row, a block of rows at a time."""
    import numpy as np

    table: Any
    for table in rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000):
        column = table["labels"].combine_chunks()
        ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))
        before = np.concatenate([[0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False) != -100)])
        yield before[ends] - before[np.concatenate([[0], ends[:-1]])]
