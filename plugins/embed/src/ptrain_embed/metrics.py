"""The measures of retrieval and of similarity: as trec_eval and scipy define them, on numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

NAMES = ("ndcg", "mrr", "recall", "precision", "map")


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Documents by falling score; of equal scores, as trec_eval does, the one whose id is larger comes first.

    Scores are compared as fp32, and ids as UTF-8 bytes.
    """
    import numpy as np

    return sorted(scores, key=lambda name: (np.float32(scores[name]), name.encode()), reverse=True)


def retrieval(
    ranking: Sequence[str], grades: Mapping[str, float], cuts: Iterable[int], names: Iterable[str] = NAMES
) -> dict[str, float]:
    """The measures of one query by name, such as `ndcg@10`.

    A document is relevant where its grade is above 0; what has no grade is not. The gain of nDCG is the grade itself,
    its discount log2(rank + 1), and the ideal ranking is that of all graded documents. MAP divides by all relevant
    documents.

    Args:
        ranking: ids of documents, best first.
        grades: of the documents that were judged for this query; below 0 they count as 0.
        cuts: how many of the first documents count.
        names: of `NAMES`.
    """
    import numpy as np

    gains = np.array([max(grades.get(name, 0), 0) for name in ranking], dtype=np.float64)
    ideal = np.array(sorted((grade for grade in grades.values() if grade > 0), reverse=True), dtype=np.float64)
    measures = {name: MEASURES[name] for name in names}
    return {f"{name}@{k}": float(measure(gains, ideal, k)) for name, measure in measures.items() for k in cuts}


def ndcg(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """Gain of the first k, each divided by log2(rank + 1), over that of the ideal ranking."""
    best = _discounted(ideal[:k])
    return _discounted(gains[:k]) / best if best else 0.0


def mrr(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """1 / rank of the first relevant document among the first k; 0 where there is none."""
    hits = gains[:k].nonzero()[0]
    return 1.0 / (hits[0] + 1) if len(hits) else 0.0


def recall(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """The share of the relevant documents that are among the first k."""
    return (gains[:k] > 0).sum() / len(ideal) if len(ideal) else 0.0


def precision(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """The share of the first k places that hold a relevant document; a ranking that is shorter has empty places."""
    return (gains[:k] > 0).sum() / k


def average_precision(gains: np.ndarray, ideal: np.ndarray, k: int) -> float:
    """The precision at the rank of each relevant document, 0 where it is not among the first k; their mean."""
    hits = gains[:k].nonzero()[0]
    found = sum((number + 1) / (rank + 1) for number, rank in enumerate(hits))
    return float(found) / len(ideal) if len(ideal) else 0.0


MEASURES = {"ndcg": ndcg, "mrr": mrr, "recall": recall, "precision": precision, "map": average_precision}


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """The linear correlation of two series; NaN where one of them is constant or shorter than 2."""
    import numpy as np

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    a, b = _centred(a), _centred(b)
    return float(np.clip(a @ b, -1.0, 1.0))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """The correlation of the ranks of two series, where equal values share the mean of their ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(x: ArrayLike) -> np.ndarray:
    """The rank of each value, from 1; equal values share the mean of theirs."""
    import numpy as np

    _, which, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


def _discounted(gains: np.ndarray) -> float:
    import numpy as np

    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def _centred(x: np.ndarray) -> np.ndarray:
    """`x` without its mean and of length 1; scaled first, so that no square is lost to underflow."""
    import numpy as np

    moved = x - x.mean()
    moved = moved / np.abs(moved).max()
    return moved / np.linalg.norm(moved)
