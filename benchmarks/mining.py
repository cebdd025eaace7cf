"""The search for hard negatives: how much of the machine's matrix rate it reaches, over a corpus on disk.

    python benchmarks/mining.py [--documents 1000000] [--queries 10000] [--threads N]

`search` finds the 100 nearest of 1,000,000 vectors of 384 dimensions, in a file, for 10,000 queries. `rate` is its
number of multiplications and additions by the seconds that it takes, and by that of one matrix product, measured in the
same process right before and after: the products of all queries with all documents are what cannot be avoided. `faiss`
is the exact search of faiss in the same blocks, where that is installed. Seconds are those of the clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import harness

SIZE = 384
BLOCK = 50_000
"""Vectors that are drawn at a time."""
SECONDS = 2.0
"""How long the machine's rate is measured, before and after."""


def vectors(count: int, seed: int, path: Path) -> Path:
    """A file of vectors of length 1, fp32 [count, 384]."""
    import numpy as np

    drawn = np.random.default_rng(seed)
    made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, SIZE))
    for start in range(0, count, BLOCK):
        part = drawn.standard_normal((min(BLOCK, count - start), SIZE), dtype=np.float32)
        made[start : start + BLOCK] = part / np.linalg.norm(part, axis=1, keepdims=True)
    made.flush()
    return path


def matrix_rate(queries: int) -> float:
    """FLOP per second of the products of so many queries with a block of documents."""
    import torch

    one, other = torch.randn(queries, SIZE), torch.randn(4096, SIZE)
    out = torch.empty(queries, 4096)
    begin, times = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        torch.mm(one, other.T, out=out)
        times += 1
    return 2 * queries * 4096 * SIZE * times / (time.perf_counter() - begin)


def search(engine: str, options: argparse.Namespace) -> Mapping[str, float]:
    """Seconds, and the rate as a share of the machine's."""
    import numpy as np
    import torch

    from ptrain_embed.search import search

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = Path(tempfile.mkdtemp())
    documents = np.load(vectors(options.documents, 0, folder / "documents.npy"), mmap_mode="r")
    queries = np.load(vectors(options.queries, 1, folder / "queries.npy"))
    search(queries[:64], documents[:8192], options.k, engine=engine)
    before = matrix_rate(1024)
    begin = time.perf_counter()
    search(queries, documents, options.k, engine=engine)
    seconds = time.perf_counter() - begin
    machine = (before + matrix_rate(1024)) / 2
    rate = 2 * options.documents * options.queries * SIZE / seconds
    return {"seconds": seconds, "GFLOP/s": rate / 1e9, "machine GFLOP/s": machine / 1e9, "rate": rate / machine, "1": 1}


def cases() -> dict[str, harness.Case]:
    """With faiss where it is installed."""
    import importlib.util

    engines = ["torch", "faiss"] if importlib.util.find_spec("faiss") else ["torch"]
    return {"search" if engine == "torch" else engine: partial(search, engine) for engine in engines}


RATIOS = {"rate, search to the machine's matrix products": harness.Ratio("search.rate", "search.1", "more", 0.7)}


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--documents", type=int, default=1_000_000, help="vectors to search (default 1,000,000)")
    parser.add_argument("--queries", type=int, default=10_000, help="queries to search for (default 10,000)")
    parser.add_argument("--k", type=int, default=100, help="documents to find for each (default 100)")


if __name__ == "__main__":
    sys.exit(harness.main("mining", cases(), RATIOS, add, rounds=3))
