"""Which documents found for a query are hard negatives of it: near to it, but not so near that they may be right.

A document that nobody has labelled may well answer the query. The nearer it is beside a known positive, the likelier
that is, so what is nearer than a share of the lowest positive's score is thrown out (Moreira et al. 2024, NV-Retriever;
Merrick et al. 2024, Arctic-Embed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

import ptrain

if TYPE_CHECKING:
    import numpy as np

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]

NO_POSITIVE = "no positive among the documents found"
TOO_FEW = "too few negatives left"
LABELLED = "labelled positives"
SAME_TEXT = "the query's own text"
TOO_NEAR = "too near beside the positives"
RANK = "outside `ranks`"
SCORE = "outside `scores`"
SURPLUS = "more than `negatives`"
LEFT_OUT = "of queries that were left out"


class Mining(ptrain.Config):
    """The `mine` section: how `ptrain embed mine` finds hard negatives for the rows of `data.sources`."""

    output: str
    """The data set to write, for `data.sources` of the next recipe: a file that ends in .jsonl or .parquet."""
    model: str | None = None
    """What embeds queries and documents: a folder, or a name on the hub; by default `model.name_or_path`."""
    corpus: list[str] = []
    """Where further documents are that negatives may come from: folders with a `corpus` as in BEIR, or files with the
    column `text`. Those of the rows themselves are always among them."""
    top_k: Positive = 1000
    """How many of the nearest documents of a query are looked at."""
    positives: Positive | None = 3
    """The most positives of a query that are kept: the nearest of those found; `null` keeps all of them."""
    negatives: Positive = 10
    """How many negatives a query gets."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    """Throw out what has more than this share of the score of the lowest positive that is kept."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Throw out what has more than the score of the lowest positive that is kept, less this."""
    ranks: tuple[Count, Positive] | None = None
    """Take negatives from these places among the documents found alone: from the first, counted from 0, to before the
    second."""
    scores: tuple[float, float] | None = None
    """Take negatives with scores from the first to the second alone."""
    sampling: Literal["top", "random"] = "top"
    """Of what is left, take the nearest, or draw as many at random; a query's draw depends on `seed` and its text."""
    fewer: Literal["drop", "keep"] = "drop"
    """What becomes of a query with fewer than `negatives` of them. One without any is always left out."""
    engine: Literal["torch", "faiss"] = "torch"
    """What searches: torch, or faiss where that is installed. Both look at every document."""

    @model_validator(mode="after")
    def _ranges(self) -> Mining:
        for name in ("ranks", "scores"):
            limits = getattr(self, name)
            if limits is not None and limits[0] >= limits[1]:
                raise ValueError(f"`{name}` is empty: it goes from {limits[0]} to {limits[1]}")
        if self.ranks is not None and self.ranks[0] >= self.top_k:
            raise ValueError(
                f"`ranks` begins at {self.ranks[0]}, and only {self.top_k} documents are looked at (`top_k`)"
            )
        return self


@dataclass(frozen=True)
class Query:
    """What is known of a query.

    Attributes:
        key: of its text.
        text: the number of the document that has the same text, or -1.
        positives, negatives: numbers of the documents that some row labels so.
    """

    key: int
    text: int
    positives: Collection[int]
    negatives: Collection[int]


@dataclass(frozen=True)
class Chosen:
    """The documents of a query, by number and with their scores, best first."""

    positives: list[int]
    negatives: list[int]
    scores: list[float]


@dataclass
class Report:
    """What came of mining.

    Attributes:
        queries: how many were asked.
        dropped: queries that were left out, by reason.
        found: documents found for all queries.
        thrown: documents that were found and are no negatives, by the first reason that held.
        positives, negatives: how many were taken.
    """

    queries: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    found: int = 0
    thrown: Counter[str] = field(default_factory=Counter)
    positives: int = 0
    negatives: int = 0

    def record(self) -> Mapping[str, object]:
        """The counts as JSON."""
        return {
            "queries": self.queries, "kept": self.queries - self.dropped.total(), "dropped": dict(self.dropped),
            "found": self.found, "thrown": dict(self.thrown), "positives": self.positives,
            "negatives": self.negatives,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The counts for people."""
        kept = self.queries - self.dropped.total()
        told = [f"{kept:,} of {self.queries:,} queries with {self.positives:,} positives, {self.negatives:,} negatives"]
        told += [f"  left out: {number:,} queries: {reason}" for reason, number in self.dropped.most_common()]
        told.append(f"  of {self.found:,} documents found for them, these are no negatives:")
        return told + [f"  {number:12,} {reason}" for reason, number in self.thrown.most_common() if number]


def choose(
    query: Query, numbers: np.ndarray, scores: np.ndarray, settings: Mining, seed: int, report: Report
) -> Chosen | None:
    """The positives and negatives of a query; None where it is left out.

    Args:
        numbers, scores: of the documents found, best first, [k]; -1 ends them.
        seed: of the recipe, for `sampling: random`.
        report: gets what was thrown out.
    """
    import numpy as np

    found = numbers >= 0
    numbers, scores = numbers[found], scores[found]
    report.queries += 1
    right = np.isin(numbers, np.fromiter(query.positives, np.int64))
    kept = np.flatnonzero(right)[: settings.positives]
    if not len(kept):
        report.dropped[NO_POSITIVE] += 1
        return None
    report.found += len(numbers)
    taken = np.zeros(len(numbers), dtype=bool)
    reasons = _reasons(query, numbers, scores, right, float(scores[kept].min()), settings)
    left = ~np.logical_or.reduce(list(reasons.values()))
    places = _sampled(np.flatnonzero(left), query, settings, seed)
    taken[places] = True
    _count(report, {**reasons, SURPLUS: left & ~taken})
    if not len(places) or (settings.fewer == "drop" and len(places) < settings.negatives):
        report.dropped[TOO_FEW] += 1
        report.thrown[LEFT_OUT] += len(places)
        return None
    report.positives += len(kept)
    report.negatives += len(places)
    both = [*kept, *places]
    return Chosen(numbers[kept].tolist(), numbers[places].tolist(), [float(scores[at]) for at in both])


def cutoff(lowest: float, settings: Mining) -> float:
    """The score that a negative may have at most, beside that of the lowest positive."""
    share = lowest if settings.threshold is None else lowest - (1 - settings.threshold) * abs(lowest)
    return min(share, lowest - settings.margin)


def _reasons(
    query: Query, numbers: np.ndarray, scores: np.ndarray, right: np.ndarray, lowest: float, settings: Mining
) -> dict[str, np.ndarray]:  # fmt: skip
    """By reason, which documents are no negatives for it, bool [n]."""
    import numpy as np

    # What people have labelled a negative is one, however near.
    wrong = np.isin(numbers, np.fromiter(query.negatives, np.int64))
    limited = settings.threshold is not None or settings.margin > 0
    first, last = settings.ranks or (0, settings.top_k)
    low, high = settings.scores or (-np.inf, np.inf)
    places = np.arange(len(numbers))
    return {
        LABELLED: right,
        SAME_TEXT: numbers == query.text,
        TOO_NEAR: ~wrong & (scores > cutoff(lowest, settings)) if limited else np.zeros(len(numbers), dtype=bool),
        RANK: (places < first) | (places >= last),
        SCORE: (scores < low) | (scores > high),
    }


def _sampled(places: np.ndarray, query: Query, settings: Mining, seed: int) -> np.ndarray:
    """At most as many of the places as there are to be negatives, best first."""
    import numpy as np

    if settings.sampling == "top" or len(places) <= settings.negatives:
        return places[: settings.negatives]
    drawn = np.random.default_rng([seed, query.key % 2**64])
    return np.sort(drawn.choice(places, settings.negatives, replace=False))


def _count(report: Report, reasons: Mapping[str, np.ndarray]) -> None:
    """Count every document that was not taken once: for the first reason that holds."""
    import numpy as np

    counted = np.zeros(len(next(iter(reasons.values()))), dtype=bool)
    for reason, holds in reasons.items():
        report.thrown[reason] += int((holds & ~counted).sum())
        counted |= holds
