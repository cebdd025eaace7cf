"""What is trained on, as text: prepared samples with the tokens that are learnt told apart from the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptrain.data.encode import IGNORED

if TYPE_CHECKING:
    from ptrain.data.cache import Prepared


@dataclass(frozen=True)
class Sample:
    """One sample of the prepared data.

    Attributes:
        number: of the sample in its split, from 1.
        tokens, supervised: how many tokens it has, and how many of them are learnt.
        documents: for each, `(text, learnt)` of its parts in order, special tokens written out.
    """

    number: int
    tokens: int
    supervised: int
    documents: list[list[tuple[str, bool]]]


def samples(prepared: Prepared, split: str, numbers: range) -> Iterator[Sample]:
    """The samples with these numbers, from 1, as far as there are so many."""
    tokenizer, rows = prepared.tokenizer(), getattr(prepared, split)
    for number in numbers:
        if not 1 <= number <= len(rows):
            return
        row: Any = rows[number - 1]
        documents, start = [], 0
        for length in row["document_lengths"]:
            ids, labels = (row[key][start : start + length] for key in ("input_ids", "labels"))
            documents.append([(tokenizer.decode(part), learnt) for part, learnt in _parts(ids, labels)])
            start += length
        learnt = sum(label != IGNORED for label in row["labels"])
        yield Sample(number, len(row["input_ids"]), learnt, documents)


def _parts(ids: list[int], labels: list[int]) -> Iterator[tuple[list[int], bool]]:
    """Runs of tokens that are all learnt, or all not."""
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or (labels[at] == IGNORED) != (labels[start] == IGNORED):
            yield ids[start:at], labels[start] != IGNORED
            start = at
