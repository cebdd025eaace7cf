"""What preparation counted: rows, tokens, supervised tokens, and what was dropped and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

NAMED = 10
"""So many rows are named for each reason; the rest are counted."""


@dataclass
class Report:
    """The counts of one split.

    Attributes:
        rows: rows that came in.
        documents: of these and their pieces, what was kept.
        samples: rows of the result (after packing).
        tokens: of all samples.
        supervised_tokens: tokens that are learnt.
        turns: assistant turns that are learnt.
        unended_turns: of these, turns without an end-of-turn token.
        lost_tokens: tokens that truncation and partial samples lost.
        fullness: of packed samples, tokens over samples x max_length.
        dropped: rows by reason.
        named: names of some of those rows, by reason.
        notes: what the user should know.
        largest_id, largest_in: of rows that came as tokens, the largest one that was kept (-1: none), and its row.
    """

    rows: int = 0
    documents: int = 0
    samples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    turns: int = 0
    unended_turns: int = 0
    lost_tokens: int = 0
    fullness: float | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    largest_id: int = -1
    largest_in: str = ""

    def drop(self, reason: str, name: str, count: int = 1) -> None:
        """Count (and name) a row that was dropped, cut or split, with the reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        names = self.named.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(name)

    def note(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def given(self, largest: int, name: str) -> None:
        """Keep the largest token of a row that came as tokens, if it is the largest so far."""
        if largest > self.largest_id:
            self.largest_id, self.largest_in = largest, name

    def add(self, other: Report) -> None:
        """Add the counts of another part of the same rows."""
        for key in ("rows", "documents", "samples", "tokens", "supervised_tokens", "turns", "unended_turns",
                    "lost_tokens"):  # fmt: skip
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for reason, count in other.dropped.items():
            names = other.named.get(reason, [])
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            self.named[reason] = (self.named.get(reason, []) + names)[:NAMED]
        for note in other.notes:
            self.note(note)
        self.given(other.largest_id, other.largest_in)

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Report:
        """From plain data."""
        return cls(**data)

    def lines(self) -> list[str]:
        """For people: what there is, what was dropped, what to know."""
        text = f"{self.rows:,} rows, {self.samples:,} samples, {self.tokens:,} tokens"
        if self.supervised_tokens:  # some trainers learn no tokens, but whole texts
            text += f", {self.supervised_tokens / self.tokens:.1%} supervised"
        if self.fullness is not None:
            text += f", {self.fullness:.1%} full"
        lines = [text]
        for reason, count in self.dropped.items():
            names = self.named.get(reason, [])
            more = ", ..." if count > len(names) else ""
            lines.append(f"{count:,} {reason}: {', '.join(names)}{more}")
        if self.lost_tokens:
            lines.append(f"{self.lost_tokens:,} tokens lost")
        if self.unended_turns:
            lines.append(f"{self.unended_turns:,} of {self.turns:,} turns have no end-of-turn token")
        return lines + self.notes
