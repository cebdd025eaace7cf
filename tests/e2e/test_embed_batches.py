"""`embed` on stored batches of tokens: real runs that stream them learn what those that copy them do, resumed too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import losses, run_workers

from ptrain.testing.recipes import merged

QUERIES, NEGATIVES = 6, 4


def store(folder: Path, seed: int) -> None:
    """Write a batch of queries, each with a positive of its own and a negative that another has too."""
    rng = np.random.default_rng(seed)
    count = QUERIES + NEGATIVES
    queries, documents = (
        [rng.integers(5, 60, rng.integers(3, 20)).tolist() for _ in range(n)] for n in (QUERIES, count)
    )
    pairs = [(at, at, 1) for at in range(QUERIES)] + [(at, QUERIES + at % NEGATIVES, -1) for at in range(QUERIES)]
    folder.mkdir(parents=True)
    for name, columns in {
        "queries": {"BATCH_QUERY_ID": range(QUERIES), "QUERY_TOKEN_ID_LIST": queries},
        "documents": {"BATCH_DOCUMENT_ID": range(count), "DOCUMENT_TOKEN_ID_LIST": documents},
        "relations": dict(
            zip(("BATCH_QUERY_ID", "BATCH_DOCUMENT_ID", "RELEVANCE"), zip(*pairs, strict=True), strict=True)
        ),
    }.items():
        table = pa.table({key: pa.array(list(values)) for key, values in columns.items()})
        pq.write_table(table, folder / f"{name}.parquet")


def test_streamed_batches_train_as_copied_ones(recipes: Any, prepared: Any, tmp_path: Path) -> None:
    """On two workers, and where one goes on alone from the middle of an epoch."""
    for at in range(3):
        store(tmp_path / "batches" / f"batch_{at}", at)

    def recipe(stream: bool, **changes: Any) -> dict[str, Any]:
        source = {"type": "token-batches", "path": str(tmp_path / "batches"), "stream": stream}
        base = recipes(
            "embed", micro_batch_size=1, gradient_accumulation_steps=3, temperature=0.1, model={"pooling": "mean"},
            checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}],
        )  # fmt: skip
        data = {"sources": [source], "batch_from": "one_source", "dl_num_workers": int(stream)}
        return merged(base, {"data": data, **changes})

    copied, streamed = prepared(recipe(False)), prepared(recipe(True))
    cut = prepared(recipe(True, exit_iteration=4), "cut")
    run_workers([copied, streamed, cut], 2)
    run_workers([prepared(recipe(True), "cut", resume=True)], 1)
    assert len(losses(copied)) == 6
    for one in (streamed, cut):
        torch.testing.assert_close(losses(one), losses(copied), atol=1e-4, rtol=0)
