"""The loaders of `embed`: core's, over batches that are made for contrast, laid out without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ptrain import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from ptrain import Run
    from ptrain.data.loader import EvalLoader, TrainLoader
    from ptrain_embed.data import EmbedData
    from ptrain_embed.sampler import BatchSampler

MASKED = frozenset({"eager", "sdpa", "flex_attention"})
"""Implementations of attention that compute a mask over a whole line; the others go document by document."""


def create_loader(run: Run, split: str, dataset: Dataset) -> TrainLoader | EvalLoader:
    """The micro-batches of this worker: what a trainer returns for the stage `create_dataloader`.

    Raises:
        DataError: a batch has one row, and there is nothing to tell its document from.
    """
    from ptrain.data.loader import EvalLoader, TrainLoader
    from ptrain_embed.streamed import Streamed, streams

    recipe, rows = run.recipe, cast("Dataset", Streamed(run, dataset) if streams(run) else dataset)

    def collate(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return lay_out(run, chosen)

    workers, padding = recipe.data.dl_num_workers, pad_id(run)
    if split == "train":
        sampler = sampler_of(run, dataset)
        return TrainLoader(rows, sampler, collate, padding, lambda: run.progress.step, workers)
    size = recipe.eval_micro_batch_size or recipe.micro_batch_size
    return EvalLoader(rows, collate, padding, size, run.data_rank, run.data_world, workers)


def sampler_of(run: Run, dataset: Dataset) -> BatchSampler:
    """The sampler of this worker over training rows.

    Raises:
        DataError: a batch has one row, and there is nothing to tell its document from.
    """
    import numpy as np

    from ptrain_embed.sampler import BatchSampler
    from ptrain_embed.streamed import streams

    recipe, data = run.recipe, cast("EmbedData", run.recipe.data)
    table: Any = dataset.select_columns(["document_lengths", "group", "set"]).with_format("arrow")[:]
    documents = table["document_lengths"].combine_chunks()
    counts = documents.value_lengths().to_numpy()
    ends = np.cumsum(documents.flatten().to_numpy(), dtype=np.int64)[np.cumsum(counts) - 1]
    sets = table["set"].to_numpy() if data.batch_from == "one_source" else np.zeros(len(table), dtype=np.int32)
    sampler = BatchSampler(
        len(table), recipe.micro_batch_size, run.accumulation, run.data_rank, run.data_world, data.seed,
        fixed=recipe.overfit_first_batch, lengths=np.diff(ends, prepend=0), groups=table["group"].to_numpy(), sets=sets,
        in_turn=streams(run),
    )  # fmt: skip
    _refuse_lone_rows(run, sampler, counts - 1)
    return sampler


def _refuse_lone_rows(run: Run, sampler: BatchSampler, documents: Any) -> None:
    """Raise DataError where a batch has one row, with one document."""
    import numpy as np

    if sampler.global_batch == 1 and documents.min() < 2:
        raise DataError(
            f"a batch has 1 row (`micro_batch_size` x `gradient_accumulation_steps` x {run.data_world} workers), and "
            "there are rows with 1 document: it has nothing to be told from",
            expected="at least 2 rows in a batch",
            fix="raise `micro_batch_size`",
        )
    numbers, counts = np.unique(sampler.sets, return_counts=True)
    for number in numbers[counts == 1]:
        if documents[sampler.sets == number][0] < 2:
            raise DataError(
                f"{_called(run, int(number))} 1 training row, with 1 document: it has nothing to be told from",
                expected="at least 2 rows",
                fix="add rows" + ("" if sampler.sets.max() == 0 else ", or leave `data.batch_from: one_source` out"),
            )


def _called(run: Run, number: int) -> str:
    """What a set is called in messages, and that it has something."""
    data: Any = run.recipe.data
    if data.batch_from == "mixed":
        return "there is"
    batch, source = divmod(number, len(data.sources) + len(data.eval_sources))
    return f"source {source + 1} has" if not batch else f"batch {batch} of source {source + 1} has"


def lay_out(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A micro-batch: all rows in one line, where the attention goes document by document; otherwise a line for each.

    `document_lengths` has a list for each line, the further columns an entry for each row.
    """
    from ptrain.data.collate import KNOWN, collate, plain

    multiple, padding = run.recipe.data.div_length, pad_id(run)
    config = getattr(getattr(run, "model", None), "config", None)
    if getattr(config, "_attn_implementation", "eager") in MASKED:
        return collate(rows, pad_id=padding, multiple=multiple)
    batch = collate([_line(rows)], pad_id=padding, multiple=multiple)
    further = {name: [plain(row[name]) for row in rows] for name in rows[0] if name not in KNOWN}
    return {**batch, **further, "rows": len(rows)}


def _line(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import numpy as np

    return {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "labels", "document_lengths")}


def pad_id(run: Run) -> int:
    """The token of padding; any will do where the tokenizer has none, since nothing reads it."""
    found = run.tokenizer.pad_token_id
    return found if isinstance(found, int) else 0
