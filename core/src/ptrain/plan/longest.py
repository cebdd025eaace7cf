"""The longest rows that fit: a search over the plan's own memory."""

from __future__ import annotations

from collections.abc import Callable

LEAP = 16
"""No length is tried that is more times as long as one that fits."""
CLOSE = 200
"""The answer is near enough when a better one would be longer by less than this part of it."""
Point = tuple[int, float]


def longest(share: Callable[[int], float], step: int, start: int, most: float) -> int:
    """The greatest multiple of `step`, to within half a hundredth, whose `share` is at most `most`; 0 where none is.

    The memory of rows is a maximum of straight lines over their length, so the line through two lengths that fit says
    from where on none does, and the line from one that fits to one that does not says up to where all do. Finding out
    what a length takes is slow, so these are tried before the middle.

    Args:
        share: what rows of a length need, as a share of what there is; never less for a longer one.
        start: the first length to try, of a usual size.
    """
    before: Point | None = None
    high: Point | None = None
    low = (step, share(step))
    if low[1] > most:
        return 0
    at = max(start // step * step, 2 * step)
    while True:
        found = (at, share(at))
        if found[1] <= most:
            before, low = low, found
        else:
            high = found
        near = max(step, low[0] // CLOSE)
        limit = min(_crossing(before, low, most), high[0] - step if high else LEAP * low[0])
        if limit - low[0] < near:
            return low[0]
        at = limit if high is None else int(_crossing(low, high, most))
        at = max(low[0] + step, (at if at - low[0] >= near else (low[0] + limit) // 2) // step * step)


def _crossing(one: Point | None, other: Point, most: float) -> int:
    """Where the straight line through two lengths and what they need reaches `most`."""
    if one is None or other[1] <= one[1]:
        return LEAP * other[0]
    return int(one[0] + (most - one[1]) * (other[0] - one[0]) / (other[1] - one[1]))
