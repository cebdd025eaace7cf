"""The search in blocks finds what a sort of all scores finds, ties included, wherever it is cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain import DataError
from ptrain_embed import search as searching


def brute(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every score sorted; of equal ones the first document comes first."""
    scores = queries @ documents.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    best = np.take_along_axis(scores, order, 1)
    return np.pad(best, missing, constant_values=-np.inf), np.pad(order, missing, constant_values=-1)


@settings(max_examples=60)
@given(
    # Small whole numbers: products are exact in any order, and many are equal.
    seed=st.integers(0, 2**16), queries=st.integers(1, 9), documents=st.integers(1, 70), size=st.integers(1, 3),
    k=st.integers(1, 12), block=st.integers(1, 40), part=st.integers(1, 24),
)  # fmt: skip
def test_as_a_sort_of_all(
    seed: int, queries: int, documents: int, size: int, k: int, block: int, part: int
) -> None:  # fmt: skip
    drawn = np.random.default_rng(seed)
    asked = drawn.integers(-2, 3, (queries, size)).astype(np.float32)
    held = drawn.integers(-2, 3, (documents, size)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "BLOCK", block)
        patch.setattr(searching, "DOCUMENTS", part)
        patch.setattr(searching, "QUERIES", 4)
        patch.setattr(searching, "LEAST", 2)
        scores, numbers = searching.search(asked, held, k)
    wanted = brute(asked, held, k)
    assert np.array_equal(scores, wanted[0]) and np.array_equal(numbers, wanted[1])


@pytest.mark.parametrize("k", [1, 50])
def test_a_corpus_on_disk_is_read_a_block_at_a_time(k: int, tmp_path: Path) -> None:
    """At real block sizes, and with the vectors in half precision on disk."""
    drawn = np.random.default_rng(0)
    held = drawn.standard_normal((20_000, 24)).astype(np.float16)
    asked = drawn.standard_normal((33, 24)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", held)

    class Mapped:
        """The file, that notes how much of it was read at a time."""

        def __init__(self) -> None:
            self.file = np.load(tmp_path / "vectors.npy", mmap_mode="r")
            self.shape, self.most = self.file.shape, 0

        def __getitem__(self, rows: slice) -> Any:
            found = self.file[rows]
            self.most = max(self.most, len(found))
            return found

    mapped, told = Mapped(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "BLOCK", 4096 + 8)
        scores, numbers = searching.search(asked, mapped, k, progress=told.append)
    assert mapped.most == 4096 + 8 and sum(told) == 20_000
    exact = asked.astype(np.float64) @ held.astype(np.float64).T
    assert np.allclose(scores, np.take_along_axis(exact, numbers, 1), atol=1e-4)
    assert np.allclose(scores, -np.sort(-exact, axis=1)[:, :k], atol=1e-4)


def test_faiss_finds_the_same() -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    drawn = np.random.default_rng(0)
    asked, held = (drawn.standard_normal((n, 16)).astype(np.float32) for n in (9, 3000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "BLOCK", 700)
        found = [searching.search(asked, held, 20, engine=engine) for engine in searching.ENGINES]
    assert np.array_equal(found[0][1], found[1][1]) and np.allclose(found[0][0], found[1][0], atol=1e-5)


def test_faiss_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DataError, match="faiss, which is not installed"):
        searching.search(np.ones((1, 2)), np.ones((1, 2)), 1, engine="faiss")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 0}, "0 best"),
        ({"documents": np.ones((3, 5))}, "queries have 4 dimensions and documents 5"),
        ({"documents": np.full((3, 4), np.nan)}, "not finite"),
        ({"engine": "fais"}, "no search engine `fais`"),
    ],
)
def test_what_can_not_be_searched(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"queries": np.ones((2, 4)), "documents": np.ones((3, 4)), "k": 1, **change}
    with pytest.raises(DataError, match=says):
        searching.search(**arguments)


def test_dimensions_beyond_the_model() -> None:
    assert searching.dimensions([64, 128, 384], 384) == [384, 128, 64]
    assert searching.dimensions(None, 384) == [384]
    with pytest.raises(DataError, match="512 dimensions are asked for, and the model's have 384"):
        searching.dimensions([64, 512], 384)
