"""Loaders: the stream from any step on, every evaluation row once, torch's generator left alone."""

from __future__ import annotations

import threading
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from datasets import Dataset

from ptrain.data.collate import collate
from ptrain.data.loader import EvalLoader, TrainLoader
from ptrain.data.sampler import StepSampler


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Thirteen ragged rows; the first token of each is its number."""
    data = [[number] * (1 + number % 5) for number in range(13)]
    return Dataset.from_dict({"input_ids": data, "labels": data, "document_lengths": [[len(one)] for one in data]})


def train(rows: Dataset, start: int, workers: int = 0, rank: int = 0, world: int = 1) -> TrainLoader:
    sampler = StepSampler(len(rows), 2, 2, rank, world, 5)
    return TrainLoader(rows, sampler, partial(collate, pad_id=0, multiple=4), 0, lambda: start, workers)


def numbers(batch: dict[str, Any]) -> list[int]:
    """Which rows a batch holds."""
    return batch["input_ids"][:, 0].tolist() if batch["rows"] else []


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_where_it_stopped(rows: Dataset, workers: int) -> None:
    """Starting at step n gives what follows n steps, over the ends of epochs, with and without threads."""
    whole = [numbers(batch) for batch in islice(train(rows, 0), 20)]
    for start in (0, 1, 3, 4, 7):
        loader = train(rows, start, workers)
        assert [numbers(batch) for batch in islice(loader, 6)] == whole[2 * start : 2 * start + 6]
    assert train(rows, 0).steps_per_epoch == 4
    assert [train(rows, 0).samples_before(step) for step in range(5)] == [0, 4, 8, 12, 13]


def test_workers_stay_in_step(rows: Dataset) -> None:
    """On three workers the last step has fewer rows, and each still gets as many micro-batches."""
    streams = [list(islice(train(rows, 0, rank=rank, world=3), 4)) for rank in range(3)]
    seen = [number for stream in streams for batch in stream for number in numbers(batch)]
    assert sorted(seen) == list(range(13))
    assert all(int(batch["shift_labels"].ne(-100).sum()) == 0 for s in streams for batch in s if not batch["rows"])


@pytest.mark.parametrize(
    ("world", "size", "workers"), [*((w, s, 0) for w in (1, 2, 3) for s in (1, 2, 5, 13, 20)), (2, 5, 1)]
)
def test_every_evaluation_row_once(rows: Dataset, world: int, size: int, workers: int) -> None:
    """However many workers and however large the batches; equally many batches on each worker."""
    loaders = [EvalLoader(rows, partial(collate, pad_id=0), 0, size, rank, world, workers) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(one) for one in batches} == {len(loaders[0])}
    assert sorted(n for one in batches for batch in one for n in numbers(batch)) == list(range(13))


def test_the_global_generator_is_left_alone(rows: Dataset) -> None:
    """Dropout after loading is what it is without loading."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(islice(train(rows, 0, workers=1), 3))
    list(EvalLoader(rows, partial(collate, pad_id=0), 0, 2, 0, 1, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_are_gone_with_the_iterator(rows: Dataset) -> None:
    """Also where it is left in the middle; none of them keeps a run from ending."""
    before = threading.enumerate()
    stream = iter(train(rows, 0, workers=2))
    next(stream)
    threads = [one for one in threading.enumerate() if one.name.startswith("loader") and one not in before]
    assert 1 <= len(threads) <= 2
    del stream
    for one in threads:
        one.join(timeout=60)
    assert not any(one.is_alive() for one in threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_with_its_batch(rows: Dataset, workers: int) -> None:
    """Not before the batches that are whole, and not never."""

    def fails(batch: Any) -> dict[str, Any]:
        if batch[0]["input_ids"][0] == 4:
            raise OSError("the disk is gone")
        return collate(batch, pad_id=0)

    stream = iter(EvalLoader(rows, fails, 0, 2, 0, 1, workers))
    assert [numbers(batch) for batch in islice(stream, 2)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
