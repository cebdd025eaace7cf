"""What a plan says of rows is what the loaders deal out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from ptrain.loaders import train_loader
from ptrain.plan.rows import largest_batch, padding
from ptrain.recipe.dump import dump
from ptrain.recipe.load import load_recipe
from ptrain.run import Run

ROWS = 53


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Rows of different lengths, a third of their tokens with a label."""
    drawn = np.random.default_rng(0)
    lengths = drawn.integers(1, 50, ROWS).tolist()
    labels = [[7 if at % 3 == 2 else -100 for at in range(length)] for length in lengths]
    return Dataset.from_dict(
        {
            "input_ids": [[1] * length for length in lengths],
            "labels": labels,
            "document_lengths": [[n] for n in lengths],
        }
    )


def run_of(rank: int, world: int, **data: Any) -> Run:
    """A run of a worker."""
    recipe = {
        "type": "sft", "model": {"name_or_path": "m"}, "micro_batch_size": 3, "gradient_accumulation_steps": 2,
        "data": {"sources": ["a/b"], "max_length": 64, **data},
    }  # fmt: skip
    run = Run(load_recipe(recipe), Path("nowhere"), rank=rank, world=world)
    run.data_rank, run.data_world = rank, world
    run.tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    return run


@pytest.mark.parametrize("data", [{}, {"div_length": 1}, {"pad_to": "max_length"}])
@pytest.mark.parametrize("world", [1, 2])
def test_padding_is_that_of_an_epoch(rows: Dataset, world: int, data: dict[str, Any]) -> None:
    """Of all workers together, batches without rows left out."""
    computed = tokens = largest = 0
    for rank in range(world):
        run = run_of(rank, world, **data)
        loader = train_loader(run, rows)
        stream = iter(loader)
        for _ in range(loader.steps_per_epoch * run.accumulation):
            batch = next(stream)
            if batch["rows"]:
                computed += batch["input_ids"].numel()
                tokens += sum(map(sum, batch["document_lengths"]))
                largest = max(largest, batch["input_ids"].numel())
    run = run_of(0, world, **data)
    assert padding(run, rows) == pytest.approx(1 - tokens / computed, abs=1e-9)
    found = largest_batch(run, rows, 3)
    assert found.samples == 3 and found.tokens >= largest and found.length == (64 if "pad_to" in data else found.length)


def test_padding_of_other_batches_is_not_known(rows: Dataset, tmp_path: Path) -> None:
    """Where something else than core's loader lays them out; a wrapper of that lays out nothing."""
    for wrapper, known in ((True, True), (False, False)):
        code = tmp_path / f"mine_{wrapper}.py"
        code.write_text(
            f"import ptrain\n@ptrain.hookimpl(wrapper={wrapper})\ndef create_dataloader(run, split, dataset):\n"
            f"    return {'(yield)' if wrapper else '[]'}\n"
        )
        run = run_of(0, 1)
        assert (padding(Run(load_recipe(dump(run.recipe), code=code), tmp_path), rows) is not None) is known


def test_labels_are_counted(rows: Dataset) -> None:
    counts = sorted(sum(label != -100 for label in row) for row in rows["labels"])
    assert largest_batch(run_of(0, 1), rows, 3).labels == sum(counts[-3:])
    assert largest_batch(run_of(0, 1), rows, 100).labels == sum(counts)


def test_without_rows_they_are_as_long_as_can_be() -> None:
    found = largest_batch(run_of(0, 1), None, 3)
    assert (found.samples, found.length, found.labels) == (3, 64, 192)
