"""Embeddings to figures: retrieval on a collection, similarity on graded pairs, at each of several dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ptrain import DataError
from ptrain_embed import metrics
from ptrain_embed.search import dimensions, search, shortened

if TYPE_CHECKING:
    import torch

    from ptrain_embed.collection import Collection
    from ptrain_embed.encoder import Encoder

CUTS = (1, 10, 100)
SHOWN = {"ndcg": (10,), "mrr": (10,), "map": (100,), "recall": (1, 10, 100)}
"""The measures of retrieval, and where each is cut."""


def retrieval(
    asked: Mapping[str, torch.Tensor], documents: torch.Tensor, collection: Collection, sizes: Sequence[int] | None,
    normalise: bool = True,
) -> tuple[dict[str, float], int]:  # fmt: skip
    """The sum of each measure over some queries, and how many they are; `ndcg@10/256` is at the first 256 dimensions.

    Args:
        asked: embedding [d] by the id of the query.
        documents: embeddings [n, d], in the order of `collection.documents`.
        sizes: dimensions to measure at besides all of them.
        normalise: whether embeddings have length 1, at each of these sizes.

    Raises:
        DataError: the model has fewer dimensions.
    """
    import torch

    sums: dict[str, float] = {}
    names, full = list(collection.documents), documents.shape[1]
    sizes = dimensions(sizes, full)
    if not asked:
        return {f"{name}{_at(size, full)}": 0.0 for size in sizes for name in _measured([], {})}, 0
    queries = torch.stack(list(asked.values()))
    for size in sizes:
        cut_queries, cut_documents = (shortened(vectors, size, normalise) for vectors in (queries, documents))
        # One more: what has the id of the query itself is no answer, unless it is judged.
        scores, numbers = search(cut_queries, cut_documents, min(max(CUTS) + 1, len(names)), device=_device())
        for query, found, near in zip(asked, numbers.tolist(), scores.tolist(), strict=True):
            grades = collection.qrels[query]
            left_out = query if query not in grades else None
            run = {names[at]: score for at, score in zip(found, near, strict=True) if names[at] != left_out}
            for name, value in _measured(metrics.ranked(run), grades).items():
                key = f"{name}{_at(size, full)}"
                sums[key] = sums.get(key, 0.0) + value
    return sums, len(asked)


def similarity(
    first: torch.Tensor, second: torch.Tensor, grades: Sequence[float], sizes: Sequence[int] | None
) -> dict[str, float]:
    """Spearman's and Pearson's correlation of cosines with grades; `spearman/256` is at the first 256 dimensions.

    Args:
        first, second: embeddings [n, d] of both sentences of each pair.

    Raises:
        DataError: the grades or the cosines are all the same, or the model has fewer dimensions.
    """
    from torch.nn.functional import cosine_similarity

    found, full = {}, first.shape[1]
    for size in dimensions(sizes, full):
        cosines = cosine_similarity(first[:, :size].double(), second[:, :size].double()).tolist()
        for name, measure in (("spearman", metrics.spearman), ("pearson", metrics.pearson)):
            found[f"{name}{_at(size, full)}"] = measure(cosines, grades)
    return found


def measure_collection(
    encoder: Encoder, path: str, split: str, titles: bool, sizes: Sequence[int] | None
) -> dict[str, float]:
    """The mean of each measure over the queries of a folder.

    Raises:
        DataError: of the data; or a dimension is larger than the model's.
    """
    from ptrain.data.progress import progress
    from ptrain_embed.collection import read_collection

    collection = read_collection(path, split, titles=titles)
    dimensions(sizes, encoder.dimension)
    with progress("embedding", len(collection.documents) + len(collection.queries)) as advance:
        documents = encoder.encode(list(collection.documents.values()), "document", progress=advance)
        queries = encoder.encode(list(collection.queries.values()), "query", progress=advance)
    asked = dict(zip(collection.queries, queries, strict=True))
    sums, count = retrieval(asked, documents, collection, sizes, encoder.normalised)
    return {name: value / count for name, value in sums.items()}


def measure_pairs(encoder: Encoder, path: str, sizes: Sequence[int] | None) -> dict[str, float]:
    """The correlations of cosines with the grades of the pairs in a file.

    Raises:
        DataError: of the data; or a dimension is larger than the model's.
    """
    first, second, grades = read_pairs(path)
    dimensions(sizes, encoder.dimension)
    embedded = encoder.encode([*first, *second])
    return similarity(embedded[: len(first)], embedded[len(first) :], grades, sizes)


def read_pairs(path: str) -> tuple[list[str], list[str], list[float]]:
    """Both sentences and the grade of each pair in a file.

    Raises:
        DataError: a row has no partner or no score, or all scores are the same.
    """
    from ptrain_embed.collection import read_table
    from ptrain_embed.rows import read_row

    first, second, grades = [], [], []
    for raw in read_table(path):
        name = raw["origin"]
        row = read_row(raw, name)
        if len(row.documents) != 1 or len(row.scores) != 1:
            raise DataError(f"{name}: it is no graded pair", expected="`sentence1`, `sentence2` and `score`")
        first.append(row.query)
        second.append(row.documents[0])
        grades.append(row.scores[0])
    if len(set(grades)) < 2:
        raise DataError(f"the scores of all pairs in `{path}` are the same", expected="at least two different ones")
    return first, second, grades


def _measured(ranking: Sequence[str], grades: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for name, cuts in SHOWN.items():
        found |= metrics.retrieval(ranking, grades, cuts, [name])
    return found


def _at(size: int, full: int) -> str:
    return "" if size == full else f"/{size}"


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
