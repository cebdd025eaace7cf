"""What a misspelt name was likely meant to be."""

from __future__ import annotations

from collections.abc import Iterable


def distance(left: str, right: str) -> int:
    """How many characters were left out, added, replaced or swapped with their neighbour between the two."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        above, row = row, [i]
        for j, b in enumerate(right, start=1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before = above
    return row[-1]


def closest(name: str, known: Iterable[str]) -> str | None:
    """The name among `known` that `name` was likely meant to be, or None.

    `-`, `_` and case do not count. A name of up to five characters may be off by one, a longer one by a third
    of its length. Of equally close ones the one of the same letters wins, then the longest common beginning.
    A beginning of at least three characters that only one name has means that name.
    """
    plain, known = _plain(name), sorted(known)
    best: tuple[int, bool, int, str] | None = None
    for candidate in known:
        allowed = 1 if len(candidate) <= 5 else min(3, len(candidate) // 3)
        if abs(len(plain) - len(candidate)) > allowed:
            continue
        off = distance(plain, _plain(candidate))
        rank = (
            off,
            sorted(plain) != sorted(_plain(candidate)),
            -_common(plain, _plain(candidate)),
            candidate,
        )
        if off <= allowed and (best is None or rank < best):
            best = rank
    if best:
        return best[3]
    begun = [candidate for candidate in known if len(plain) >= 3 and _plain(candidate).startswith(plain)]
    return begun[0] if len(begun) == 1 else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _common(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
