"""Losses of queries and documents, from their embeddings and labels.

Each is the sum of a loss over what it counts: positive pairs, pairs of documents, queries. It is given the embeddings
of a whole batch and makes the losses of some of its queries, so that a large batch is gone through in blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch.nn.functional import log_softmax, softplus

if TYPE_CHECKING:
    from ptrain_embed.labels import Labels
    from ptrain_embed.masks import Negatives

POSITIVE = 1


@dataclass(frozen=True)
class Found:
    """What a loss makes of b queries.

    Attributes:
        losses: fp32 [b], with a gradient: the sum over what each of them counts.
        metrics: by name, fp32 [b] without a gradient, sums over the same.
    """

    losses: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss of the queries of a batch.

    Attributes:
        blocks: whether a query is scored against the documents of all queries, so that memory is a matter.
    """

    blocks: ClassVar[bool]

    def count(self, relations: Sequence[int], scores: Sequence[float]) -> int:
        """How much the loss of a query with these documents is a sum over; `scores` may be empty."""
        ...

    def __call__(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """The losses of the queries `rows`.

        Args:
            queries: fp32 [n, d], of the whole batch.
            documents: fp32 [m, d].
        """
        ...


@dataclass(frozen=True)
class InfoNCE:
    """Each positive of a query is to be told from its negatives: -log(e^(s+/t) / (e^(s+/t) + the sum of e^(s-/t))).

    s are products of embeddings, t the temperature. Other positives of the query stand in no sum. With `symmetric`,
    the mean of this and of the same from the document's side: its query is to be told from those that it is no
    positive of. It counts positive pairs.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4.
    """

    temperature: float
    symmetric: bool = False
    blocks: ClassVar[bool] = True

    def count(self, relations: Sequence[int], scores: Sequence[float]) -> int:
        """Its positives."""
        return sum(relation == POSITIVE for relation in relations)

    def __call__(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """Of each query, the sum over its positives; and how many of those are ahead of all negatives."""
        own = labels.of_rows(rows)
        positive = (labels.relations[own] == POSITIVE).nonzero()[:, 0] + own.start
        at = labels.owners[positive] - rows.start
        scores = (queries[rows.start : rows.stop] / self.temperature) @ documents.T
        others = kept(scores, negatives.of_queries(rows))
        wanted = scores[at, positive]
        losses = softplus(others.logsumexp(1)[at] - wanted)
        ahead = (wanted.detach() > others.detach().amax(1)[at]).float()
        if self.symmetric:
            back = (documents[positive] / self.temperature) @ queries.T
            others = kept(back, negatives.of_documents(positive))
            losses = (losses + softplus(others.logsumexp(1) - wanted)) / 2
        return Found(_sums(losses, at, len(rows)), {"accuracy": _sums(ahead, at, len(rows))})


@dataclass(frozen=True)
class MarginMSE:
    """The margin by which a positive is ahead of another document of its query is to be the teacher's.

    (s+ - s- - (t+ - t-) / T)^2, T the teacher's temperature; it counts such pairs of documents.

    Source: Hofstätter et al. 2020, "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", eq. 3.
    """

    teacher_temperature: float = 1.0
    blocks: ClassVar[bool] = False

    def count(self, relations: Sequence[int], scores: Sequence[float]) -> int:
        """Pairs of a positive and another document, both with a score."""
        scored = [relation for relation, score in zip(relations, scores, strict=False) if score == score]
        positives = scored.count(POSITIVE)
        return positives * (len(scored) - positives)

    def __call__(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """Of each query, the sum over its pairs of documents."""
        wide = Wide(labels, rows)
        ours = wide.of(own_scores(queries, documents, labels, rows))
        ours = ours - wide.of(labels.scores[labels.of_rows(rows)]).nan_to_num() / self.teacher_temperature
        positive = wide.scored & (wide.relations == POSITIVE)
        other = wide.scored & (wide.relations != POSITIVE)
        pairs = positive[:, :, None] & other[:, None, :]
        errors = torch.where(pairs, ours[:, :, None] - ours[:, None, :], 0.0)
        return Found((errors**2).sum((1, 2)))


@dataclass(frozen=True)
class KL:
    """A query's documents are to be as likely as the teacher has them: KL(softmax(t / T) || softmax(s / temperature)).

    It counts queries with at least two scores.
    """

    temperature: float
    teacher_temperature: float = 1.0
    blocks: ClassVar[bool] = False

    def count(self, relations: Sequence[int], scores: Sequence[float]) -> int:
        """1 where there is anything to compare."""
        return int(sum(score == score for score in scores) > 1)

    def __call__(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """The divergence of each query."""
        wide = Wide(labels, rows)
        ours = wide.of(own_scores(queries, documents, labels, rows)) / self.temperature
        theirs = wide.of(labels.scores[labels.of_rows(rows)]) / self.teacher_temperature
        ours, theirs = (log_softmax(kept(one, wide.scored), 1) for one in (ours, theirs))
        each = torch.where(wide.scored, theirs.exp() * (theirs - ours), 0.0)
        return Found(each.sum(1) * (wide.scored.sum(1) > 1))


@dataclass(frozen=True)
class CoSENT:
    """Graded pairs are to be in the order of their grades: log(1 + the sum of e^((s_j - s_i) / t) where i is graded
    higher than j), over all pairs of a batch.

    It counts graded pairs, each with the loss of the batch, so that the mean over them is that of a batch.

    Source: Su 2022, "CoSENT: a more effective sentence embedding scheme than Sentence-BERT".
    """

    temperature: float
    blocks: ClassVar[bool] = False

    def count(self, relations: Sequence[int], scores: Sequence[float]) -> int:
        """Its grades."""
        return sum(score == score for score in scores)

    def __call__(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range, negatives: Negatives
    ) -> Found:
        """The loss of the batch, times the grades of each query."""
        graded = (~labels.scores.isnan()).nonzero()[:, 0]
        owners = labels.owners[graded]
        scores = (queries[owners] * documents[graded]).sum(1) / self.temperature
        whole = ordered(scores, labels.scores[graded])
        numbers = torch.bincount(owners, minlength=labels.queries)[rows.start : rows.stop]
        return Found(whole * numbers)


def ordered(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """log(1 + the sum of e^(s_j - s_i) where grade i > grade j), of scores and grades [p], in p log p steps."""
    if not len(scores):
        return scores.sum()
    _, order = torch.sort(grades)
    # In double precision, which costs nothing here: differences of running sums would lose digits otherwise.
    kind, scores, grades = scores.dtype, scores[order].double(), grades[order]
    lower = torch.searchsorted(grades, grades)  # how many are graded lower
    below = scores.logcumsumexp(0)[(lower - 1).clamp_min(0)]
    terms = kept(below - scores, lower > 0)
    return softplus(terms.logsumexp(0)).to(kind)


def kept(scores: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """The scores, with those left out so small that they count for nothing; also where none is kept (not -inf)."""
    return scores.masked_fill(~which, torch.finfo(scores.dtype).min)


def own_scores(queries: torch.Tensor, documents: torch.Tensor, labels: Labels, rows: range) -> torch.Tensor:
    """fp32 [documents of these queries]: the product of each with its query."""
    own = labels.of_rows(rows)
    return (queries[labels.owners[own]] * documents[own]).sum(1)


class Wide:
    """Values of the documents of b queries as a table [b, w], where w is the most documents that one of them has.

    Attributes:
        relations: int64 [b, w], 0 in empty places.
        scored: bool [b, w], whether there is a document with a teacher's score.
    """

    def __init__(self, labels: Labels, rows: range) -> None:
        own = labels.of_rows(rows)
        self._at = labels.owners[own] - rows.start
        numbers = torch.bincount(self._at, minlength=len(rows))
        self._shape = (len(rows), int(numbers.max()) if len(rows) else 0)
        begins = numbers.cumsum(0) - numbers
        self._place = torch.arange(len(self._at), device=begins.device) - begins[self._at]
        self.relations = self.of(labels.relations[own])
        self.scored = self.of((~labels.scores[own].isnan()).long()) > 0

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The table of the values of the documents, 0 in empty places."""
        return values.new_zeros(self._shape).index_put((self._at, self._place), values)


def _sums(values: torch.Tensor, at: torch.Tensor, size: int) -> torch.Tensor:
    return values.new_zeros(size).index_add(0, at, values)
