"""How many drafted tokens a base takes: from hits of heads, and of drafters that need no training, to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

Context = tuple[int, ...]


def accepted(hits: torch.Tensor) -> torch.Tensor:
    """How many drafts of a chain are taken: the hits before the first miss, int64 [...], of `hits`, bool [..., heads].

    A hit says that a head names the token that really follows, when it is given the tokens that really come before.
    That is no easier than drafting: what a head was given differs from the drafts only after a miss.
    """
    return hits.long().cumprod(-1).sum(-1)


def acceptance_length(hits: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`(sum, count)` of the tokens that a forward pass of the base yields, its own next token among them.

    Over all positions of `hits`, bool [..., heads], each of which counts the same. Leave out positions where some head
    has no target.
    """
    found = accepted(hits)
    return (found + 1).sum(), float(found.numel())


class Drafter(Protocol):
    """Whatever proposes the tokens that come next."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens to follow `tokens`."""
        ...


@dataclass(frozen=True)
class NGram:
    """A drafter that names what most often followed the last tokens in some text, and backs off to fewer of them.

    Attributes:
        order: the longest n-gram; 2 is a bigram.
        table: the likeliest next token by context, of `order - 1` tokens and fewer.
    """

    order: int
    table: Mapping[Context, int]

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]], order: int = 3) -> NGram:
        """Counted in `texts`; of two equally frequent tokens, the smaller one."""
        counts: dict[Context, Counter[int]] = {}
        for text in texts:
            for at, token in enumerate(text):
                for length in range(min(order - 1, at) + 1):
                    counts.setdefault(tuple(text[at - length : at]), Counter())[token] += 1
        table = {context: min(found, key=lambda t: (-found[t], t)) for context, found in counts.items()}
        return cls(order, table)

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """The likeliest next token, `count` times."""
        seen = list(tokens)
        for _ in range(count):
            token = next((self.table[c] for c in self._contexts(seen) if c in self.table), None)
            if token is None:
                break
            seen.append(token)
        return seen[len(tokens) :]

    def _contexts(self, tokens: Sequence[int]) -> Iterable[Context]:
        for length in range(min(self.order - 1, len(tokens)), -1, -1):
            yield tuple(tokens[len(tokens) - length :])


@dataclass(frozen=True)
class PromptLookup:
    """A drafter that copies what followed the last tokens where they stood before, in the same text.

    Attributes:
        longest: how many of the last tokens are looked for at first; then fewer, down to one.
    """

    longest: int = 3

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the newest such place; nothing where there is none."""
        tokens = list(tokens)
        for length in range(min(self.longest, len(tokens) - 1), 0, -1):
            wanted = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start : start + length] == wanted:
                    return tokens[start + length : start + length + count]
        return []


def taken(drafter: Drafter, text: Sequence[int], known: int, count: int) -> int:
    """How many of `count` drafts after the first `known` tokens are those of the text."""
    found = 0
    for drafted, real in zip(drafter.draft(text[:known], count), text[known:], strict=False):
        if drafted != real:
            break
        found += 1
    return found


def drafts_taken(drafter: Drafter, text: Sequence[int], heads: int) -> list[int]:
    """How many drafts would be taken at each position t of a text, given tokens 0 to t + 1: as with a speculator.

    The last position is the last one at which all of `heads` drafts have a token to be compared with.
    """
    return [taken(drafter, text, known, heads) for known in range(2, len(text) - heads + 1)]


def passes(drafter: Drafter, prompt: Sequence[int], written: Sequence[int], count: int) -> int:
    """The forward passes, that over the prompt among them, in which a base writes `written` with `count` drafts."""
    text, known, found = [*prompt, *written], len(prompt) + 1, 1
    while known < len(text):
        known, found = known + taken(drafter, text, known, count) + 1, found + 1
    return found


def baseline(drafter: Drafter, texts: Iterable[Sequence[int]], heads: int) -> float:
    """The acceptance length of a drafter on texts: the mean over their positions; compare with `acceptance_length`."""
    found = [one for text in texts for one in drafts_taken(drafter, text, heads)]
    return 1 + sum(found) / len(found) if found else 1.0
