"""Rows that are made up, ragged, and the same each time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

WORDS = [
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "red", "green", "blue", "small",
    "large", "old", "new", "cat", "dog", "bird",
]  # fmt: skip
Rows = Iterator[dict[str, Any]]


def conversations(count: int, seed: int = 0, longest: int = 30) -> Rows:
    """Conversations of one or two turns, in `messages`; nothing that is said has more words than `longest`."""
    rng = random.Random(seed)
    for _ in range(count):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))})
        yield {"messages": messages}


def instructions(count: int, seed: int = 0) -> Rows:
    """A `prompt` and its `completion`, as text."""
    for row in conversations(count, seed):
        asked, answered = row["messages"][:2]
        yield {"prompt": asked["content"], "completion": answered["content"]}


def texts(count: int, seed: int = 0) -> Rows:
    """A document in `text`."""
    for row in conversations(count, seed):
        yield {"text": " ".join(message["content"] for message in row["messages"])}


def preferences(count: int, seed: int = 0) -> Rows:
    """A `prompt` with a `chosen` and a `rejected` answer, each a list of messages."""
    for better, worse in zip(conversations(count, seed), conversations(count, seed + 9), strict=True):
        yield {"prompt": better["messages"][:1], "chosen": better["messages"][1:2], "rejected": worse["messages"][1:2]}


def pairs(count: int, seed: int = 0) -> Rows:
    """A `query` and its `positive`, as text."""
    for row in conversations(count, seed):
        asked, answered = row["messages"][:2]
        yield {"query": asked["content"], "positive": answered["content"]}


SHAPES: Mapping[str, Callable[[int], Rows]] = {
    "conversations": conversations, "instructions": instructions, "text": texts, "preferences": preferences,
    "pairs": pairs,
}  # fmt: skip
"""The shapes of rows, in the order in which a trainer is tried with them."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
