"""Exact top-k of inner products over a corpus that may be larger than memory: one block of it after the other.

The products of a block of queries and a block of documents stay in the processor's cache. Of each, only those that
beat the k-th best so far of their query are looked at again, which after the first blocks are few: the search costs
little more than the matrix products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ptrain

if TYPE_CHECKING:
    import numpy as np
    import torch

QUERIES, DOCUMENTS = 1024, 4096
"""Rows of a block of products."""
BLOCK = 65536
"""Documents that are read from disk at a time."""
NOTHING = -(2**63)
"""The key of a place in a top-k that no document has taken."""
LEAST = 256
"""Better scores of a query that wait to be put among the kept ones, or as many as are kept."""
EIGHT = 8
"""Truth values in an int64."""
ENGINES = ("torch", "faiss")


class Vectors(Protocol):
    """Rows that can be read a slice at a time: an array in memory, or one that is mapped from a file."""

    @property
    def shape(self) -> Any:
        """[n, d]."""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """Those rows."""
        ...


def search(
    queries: Vectors,
    documents: Vectors,
    k: int,
    *,
    device: str | torch.device = "cpu",
    engine: str = "torch",
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents with the largest inner products with each query: scores fp32 and numbers int64, both [q, k].

    Best first; of equal scores the document with the lower number comes first. Where there are fewer than k documents,
    the last places have the score -inf and the number -1.

    Args:
        queries: [q, d] in memory.
        documents: [n, d], n below 2^32; only a block of it is in memory at a time.
        device: where products are computed.
        engine: "torch", or "faiss" where that is installed; both are exact.
        progress: is told how many documents were searched since the last call.

    Raises:
        DataError: k is below 1, both have other dimensions, a value is not finite, or faiss is asked for and missing.
    """
    _check(queries, documents, k, engine)
    if engine == "faiss":
        return _with_faiss(queries, documents, k, progress)
    import torch

    with torch.no_grad():
        asked = _matrix(queries[:], device)
        best = TopK(len(asked), k, asked.device)
        for start, block in blocks(documents, BLOCK):
            best.add(asked, _matrix(block, device), start)
            progress(len(block))
        scores, numbers = best.result()
    return scores.cpu().numpy(), numbers.cpu().numpy()


def blocks(vectors: Vectors, size: int) -> Iterator[tuple[int, Any]]:
    """Slices of `size` rows, each with the number of its first one."""
    for start in range(0, vectors.shape[0], size):
        yield start, vectors[start : start + size]


class TopK:
    """The best documents so far of some queries.

    A score and the number of its document are one int64, its key: comparing keys compares scores, and of equal ones the
    lower number is larger. So what is kept does not depend on how the corpus is cut into blocks.
    """

    def __init__(self, queries: int, k: int, device: torch.device) -> None:
        import torch

        self._keys = torch.full((queries, k), NOTHING, dtype=torch.int64, device=device)
        self._products = torch.empty(0, device=device)

    def add(self, queries: torch.Tensor, documents: torch.Tensor, start: int) -> None:
        """Look at documents [n, d], numbered from `start`; the queries [q, d] are the same in each call."""
        for top in range(0, len(queries), QUERIES):
            asked, found = queries[top : top + QUERIES], Better(self._keys[top : top + QUERIES])
            for left in range(0, len(documents), DOCUMENTS):
                part = documents[left : left + DOCUMENTS]
                found.note(self._multiply(asked, part), start + left)
            found.merge()

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and numbers [q, k], best first."""
        import torch

        keys = self._keys.sort(dim=1, descending=True).values
        taken = keys != NOTHING
        numbers = torch.where(taken, 0xFFFFFFFF - (keys & 0xFFFFFFFF), -1)
        return torch.where(taken, score_of(keys), -torch.inf), numbers

    def _multiply(self, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """The products [q, n], in memory that the next ones take again."""
        import torch

        size = len(queries) * len(documents)
        if self._products.numel() < size:
            self._products = queries.new_empty(size)
        out = self._products[:size].view(len(queries), len(documents))
        return torch.mm(queries, documents.T, out=out)


class Better:
    """Scores that beat the worst one that is kept of their query; they are put among the kept ones many at a time."""

    def __init__(self, keys: torch.Tensor) -> None:
        """Begin with what is kept, keys [q, k], which `merge` changes."""
        import torch

        self._keys = keys
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counts = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        self._look()

    def note(self, scores: torch.Tensor, start: int) -> None:
        """Keep in mind what is better of the scores [q, n] of documents that are numbered from `start`."""
        rows, columns = self._above(scores)
        # An equal score is not better: the one that is kept has the lower number.
        self._waiting.append((rows, keys_of(scores[rows, columns], columns + start)))
        self._counts += rows.bincount(minlength=len(scores))
        if int(self._counts.max()) > max(self._keys.shape[1], LEAST):
            self.merge()

    def merge(self) -> None:
        """Put what was noted among the keys."""
        import torch

        rows = torch.cat([rows for rows, _ in self._waiting])
        if len(rows):
            rows, order = rows.sort(stable=True)
            firsts = self._counts.cumsum(0) - self._counts
            places = torch.arange(len(rows), device=rows.device) - firsts[rows]
            shape = (len(self._keys), int(self._counts.max()))
            new = torch.full(shape, NOTHING, dtype=torch.int64, device=rows.device)
            new[rows, places] = torch.cat([keys for _, keys in self._waiting])[order]
            both = torch.cat([self._keys, new], dim=1)
            self._keys.copy_(both.topk(self._keys.shape[1], dim=1, sorted=False).values)
        self._waiting = [(rows[:0], rows[:0])]
        self._counts.zero_()
        self._look()

    def _look(self) -> None:
        """What a score of each query must be above: [q]."""
        import torch

        worst = self._keys.amin(dim=1)
        self._worst = torch.where(worst == NOTHING, -torch.inf, score_of(worst))

    def _above(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of each score that is above the worst one kept of its row, in order.

        They are few: eight answers are looked at in one go, as an int64.
        """
        import torch

        above, whole = scores > self._worst[:, None], scores.shape[1] // EIGHT * EIGHT
        if whole != scores.shape[1]:
            rows, columns = above.nonzero(as_tuple=True)
            return rows, columns
        rows, groups = above.view(torch.int64).nonzero(as_tuple=True)
        group, place = above.view(len(scores), -1, EIGHT)[rows, groups].nonzero(as_tuple=True)
        return rows[group], groups[group] * EIGHT + place


def keys_of(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 keys that order by score, and by falling number where scores are equal; NaN is above all."""
    import torch

    # -0.0 becomes 0.0. The bits of a float order like integers, once those of negative ones are turned round.
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (0xFFFFFFFF - numbers)


def score_of(keys: torch.Tensor) -> torch.Tensor:
    """The fp32 scores of keys."""
    import torch

    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _with_faiss(
    queries: Vectors, documents: Vectors, k: int, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """The same by faiss's exact search, block by block."""
    import faiss  # pyright: ignore[reportMissingImports]
    import numpy as np

    asked = np.ascontiguousarray(queries[:], dtype=np.float32)
    scores = np.full((len(asked), k), -np.inf, dtype=np.float32)
    numbers = np.full((len(asked), k), -1, dtype=np.int64)
    for start, block in blocks(documents, BLOCK):
        held = np.ascontiguousarray(block, dtype=np.float32)
        found, places = faiss.knn(asked, held, min(k, len(held)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([scores, found], axis=1)
        numbers = np.concatenate([numbers, places.astype(np.int64) + start], axis=1)
        order = np.lexsort((np.where(numbers < 0, np.iinfo(np.int64).max, numbers), -scores), axis=1)[:, :k]
        scores, numbers = np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)
        progress(len(held))
    return scores, numbers


def _matrix(rows: Any, device: str | torch.device) -> torch.Tensor:
    """Rows as an fp32 tensor on the device.

    Raises:
        DataError: a value is not finite.
    """
    import numpy as np
    import torch

    held = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))
    held = held.to(device, torch.float32)
    if not held.isfinite().all():
        raise ptrain.DataError("vectors hold values that are not finite", fix="look at the model that made them")
    return held


def _check(queries: Vectors, documents: Vectors, k: int, engine: str) -> None:
    import importlib.util

    if k < 1:
        raise ptrain.DataError(f"the {k} best documents were asked for", expected="at least 1")
    if queries.shape[1] != documents.shape[1]:
        raise ptrain.DataError(
            f"queries have {queries.shape[1]} dimensions and documents {documents.shape[1]}",
            fix="embed both with one model",
        )
    if engine not in ENGINES:
        raise ptrain.DataError(f"there is no search engine `{engine}`", expected=" or ".join(ENGINES))
    if engine == "faiss" and importlib.util.find_spec("faiss") is None:
        raise ptrain.DataError(
            "the search is to be done by faiss, which is not installed",
            fix="pip install faiss-cpu, or leave `engine` out: without it the search is exact too",
        )


def dimensions(wanted: Sequence[int] | None, full: int) -> list[int]:
    """The dimensions to measure at: the model's own, and those wanted below it.

    Raises:
        DataError: one is larger than the model's.
    """
    beyond = [size for size in wanted or () if size > full or size < 1]
    if beyond:
        raise ptrain.DataError(
            f"vectors of {beyond[0]} dimensions are asked for, and the model's have {full}",
            expected=f"dimensions from 1 to {full}",
        )
    return [full, *sorted({*(wanted or ())} - {full}, reverse=True)]


def shortened(vectors: torch.Tensor, size: int, normalise: bool) -> torch.Tensor:
    """The first `size` dimensions of vectors [n, d], as in training: scaled to length 1 again if all of them are."""
    import torch

    cut = vectors[:, :size]
    return torch.nn.functional.normalize(cut, dim=1) if normalise and size < vectors.shape[1] else cut
