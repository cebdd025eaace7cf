"""Questions and expected answers, read back from token rows: the prompts are exactly those of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
ROLES = {"system", "user", "assistant"}


@dataclass(frozen=True)
class Question:
    """The tokens before the last supervised turn of a document, and those of the turn with its end."""

    prompt: list[int]
    answer: list[int]

    def expected(self, tokenizer: Any) -> str:
        """The text of the answer."""
        return tokenizer.decode(self.answer, skip_special_tokens=True)

    def text(self, tokenizer: Any) -> str:
        """The prompt on one line, without special tokens and role names, for display."""
        lines = tokenizer.decode(self.prompt, skip_special_tokens=True).splitlines()
        return " ".join(line for line in lines if line.strip() and line.strip() not in ROLES)


def questions(rows: Dataset, count: int | None) -> list[Question]:
    """The first `count` questions of token rows (all by default); a document without one is left out."""
    found: list[Question] = []
    for row in rows:
        for ids, labels in documents(row):
            question = last_turn(ids, labels)
            if question is not None:
                found.append(question)
            if len(found) == count:
                return found
    return found


def documents(row: Any) -> Iterator[tuple[list[int], list[int]]]:
    """`(input_ids, labels)` of each document of a row."""
    start = 0
    for length in row["document_lengths"]:
        yield list(row["input_ids"][start : start + length]), list(row["labels"][start : start + length])
        start += length


def last_turn(ids: Sequence[int], labels: Sequence[int]) -> Question | None:
    """The question that the last supervised run of tokens answers, or None."""
    stop = len(labels)
    while stop and labels[stop - 1] == IGNORED:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return Question(list(ids[:start]), list(ids[start:stop])) if 0 < start < stop else None
