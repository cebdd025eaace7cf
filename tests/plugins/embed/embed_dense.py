"""Losses by their formulas, one pair at a time on the full matrix of similarities; and batches that are made up."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Query:
    """A query, as a row of the data has it: texts are numbers, whose hashes they are."""

    text: int
    documents: list[int]
    relations: list[int]
    scores: list[float]
    positives: list[int]


def queries(seed: int, count: int, texts: int = 9, scores: bool = False) -> list[Query]:
    """Ragged queries of few texts, so that many come twice: as documents, as positives, as queries, as a query and a document."""
    rng = random.Random(seed)
    known: dict[int, set[int]] = {}
    made = []
    for _ in range(count):
        size = rng.randint(1, 4)
        one = Query(
            text=texts - 4 + rng.randrange(count),
            documents=[rng.randrange(texts) for _ in range(size)],
            relations=[1, *(rng.choice([1, 0, 0, -1]) for _ in range(size - 1))],
            scores=[rng.uniform(0, 1) if rng.random() < 0.8 else float("nan") for _ in range(size)],
            positives=[],
        )
        if not scores or rng.random() < 0.2:
            one.scores = []
        known.setdefault(one.text, set()).update(d for d, r in zip(one.documents, one.relations, strict=True) if r == 1)
        made.append(one)
    for one in made:
        # Some are labelled in rows that are not in the batch.
        one.positives = sorted(known[one.text] | ({rng.randrange(texts)} if rng.random() < 0.3 else set()))
    return made


def batch(rows: list[Query], **more: Any) -> dict[str, Any]:
    """The columns that a micro-batch has besides core's."""
    return {
        "rows": len(rows),
        "relations": [row.relations for row in rows],
        "scores": [row.scores for row in rows],
        "query_key": [row.text for row in rows],
        "document_keys": [row.documents for row in rows],
        "positive_keys": [row.positives for row in rows],
        **more,
    }


def split(rows: list[Query], embeddings: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The queries [n, d], and the documents of each."""
    at, first, documents = 0, [], []
    for row in rows:
        first.append(embeddings[at])
        documents.append(embeddings[at + 1 : at + 1 + len(row.documents)])
        at += 1 + len(row.documents)
    return torch.stack(first), documents


def negatives_of(i: int, rows: list[Query], d: list[torch.Tensor], in_batch: bool) -> list[torch.Tensor]:
    """The documents that query `i` is to be told from, each text once."""
    row, found = rows[i], dict[int, torch.Tensor]()
    for k, (text, relation) in enumerate(zip(row.documents, row.relations, strict=True)):
        if relation == -1 or (relation == 0 and in_batch):
            found.setdefault(text, d[i][k])
    for other, one in enumerate(rows):
        for k, text in enumerate(one.documents):
            if in_batch and other != i:
                found.setdefault(text, d[other][k])
    return [vector for text, vector in found.items() if text not in {*row.positives, row.text}]


def infonce(rows: list[Query], embeddings: torch.Tensor, t: float, in_batch: bool, symmetric: bool) -> torch.Tensor:
    """The mean over all positive pairs of a batch."""
    q, d = split(rows, embeddings)
    losses, back = [], []
    for i, row in enumerate(rows):
        negatives = negatives_of(i, rows, d, in_batch)
        scores = [q[i] @ vector / t for vector in negatives]
        for k, relation in enumerate(row.relations):
            if relation == 1:
                own = q[i] @ d[i][k] / t
                losses.append(-own + torch.logsumexp(torch.stack([own, *scores]), 0))
                back.append(_backwards(rows, q, d[i][k], row.documents[k], i, t))
    found = torch.stack(losses)
    return (found.mean() + torch.stack(back).mean()) / 2 if symmetric else found.mean()


def _backwards(rows: list[Query], q: torch.Tensor, document: torch.Tensor, text: int, i: int, t: float) -> torch.Tensor:
    others: dict[int, torch.Tensor] = {}
    answered = {row.text for row in rows if text in {*row.positives, row.text}}
    for one, row in enumerate(rows):
        others.setdefault(row.text, q[one])
    scores = [vector @ document / t for asked, vector in others.items() if asked not in answered]
    own = q[i] @ document / t
    return -own + torch.logsumexp(torch.stack([own, *scores]), 0)


def margin_mse(rows: list[Query], embeddings: torch.Tensor, teacher: float) -> torch.Tensor:
    """The mean over all pairs of a positive and another document with scores."""
    q, d = split(rows, embeddings)
    errors = []
    for i, row in enumerate(rows):
        for j, a in enumerate(row.scores):
            for k, b in enumerate(row.scores):
                if row.relations[j] == 1 and row.relations[k] != 1 and a == a and b == b:
                    errors.append(((q[i] @ d[i][j] - q[i] @ d[i][k]) - (a - b) / teacher) ** 2)
    return torch.stack(errors).mean()


def kl(rows: list[Query], embeddings: torch.Tensor, t: float, teacher: float) -> torch.Tensor:
    """The mean over all queries with two scores or more."""
    q, d = split(rows, embeddings)
    found = []
    for i, row in enumerate(rows):
        kept = [k for k, score in enumerate(row.scores) if score == score]
        if len(kept) > 1:
            theirs = torch.softmax(torch.tensor([row.scores[k] for k in kept], dtype=q.dtype) / teacher, 0)
            ours = torch.softmax(torch.stack([q[i] @ d[i][k] / t for k in kept]), 0)
            found.append((theirs * (theirs / ours).log()).sum())
    return torch.stack(found).mean()


def cosent(rows: list[Query], embeddings: torch.Tensor, t: float) -> torch.Tensor:
    """The loss of the batch."""
    q, d = split(rows, embeddings)
    pairs = [
        (score, q[i] @ d[i][k] / t)
        for i, row in enumerate(rows)
        for k, score in enumerate(row.scores)
        if score == score
    ]
    terms = [low - high for grade, high in pairs for lower, low in pairs if grade > lower]
    return torch.log(1 + torch.stack(terms).exp().sum())


def loss(rows: list[Query], embeddings: torch.Tensor, keys: Mapping[str, Any]) -> torch.Tensor:
    """By the keys of a recipe of `embed`, of unit vectors; fp64."""
    full = embeddings.shape[1]
    dimensions = {full: 1.0, **(keys.get("matryoshka") or {})}
    teacher = keys.get("teacher_temperature", 1.0)
    t, kind = keys.get("temperature", 0.02), keys.get("loss", "infonce")
    found = 0.0 * embeddings.sum()
    for size, weight in dimensions.items():
        part = embeddings[:, :size]
        if size < full:
            part = part / part.norm(dim=1, keepdim=True)
        one = {
            "infonce": lambda p=part: infonce(
                rows, p, t, keys.get("in_batch_negatives", True), keys.get("symmetric", False)
            ),
            "margin_mse": lambda p=part: margin_mse(rows, p, teacher),
            "kl": lambda p=part: kl(rows, p, t, teacher),
            "cosent": lambda p=part: cosent(rows, p, t),
        }[kind]()
        found = found + weight / sum(dimensions.values()) * one
    return found


def accuracy(rows: list[Query], embeddings: torch.Tensor, in_batch: bool) -> float:
    """The share of positive pairs that are ahead of every negative, where no score comes twice."""
    q, d = split(rows, embeddings)
    right = []
    for i, row in enumerate(rows):
        negatives = negatives_of(i, rows, d, in_batch)
        best = max(((q[i] @ v).item() for v in negatives), default=-2.0)
        right += [(q[i] @ d[i][k]).item() > best for k, relation in enumerate(row.relations) if relation == 1]
    return sum(right) / len(right)
