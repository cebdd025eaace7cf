"""Loads every entry point that the installed ptrain distributions declare; `python load_entry_points.py`.

It needs nothing but the distributions, so that `nox -s build` can run it beside the wheels.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, distribution
from importlib.util import find_spec

DISTRIBUTIONS = (
    "ptrain",
    "ptrain-core",
    "ptrain-dpo",
    "ptrain-sft",
    "ptrain-spec-decode",
    "ptrain-swiftkv",
    "ptrain-sequence-parallel",
    "ptrain-embed",
)


def declared() -> list[EntryPoint]:
    """Every entry point of the distributions."""
    return [point for name in DISTRIBUTIONS for point in distribution(name).entry_points]


def check(point: EntryPoint) -> None:
    """Load `point`; a part has to be of its kind.

    Raises:
        TypeError: what it names is no part of the kind that its group stands for.
    """
    from ptrain.parts import KINDS

    loaded = point.load()
    kind = KINDS.get(point.group.removeprefix("ptrain."))
    if kind is not None and not (isinstance(loaded, type) and issubclass(loaded, kind)):
        raise TypeError(f"{point.value} is no {kind.__name__}")


def main() -> None:
    """Load them all and say how many there are; those for pytest where it is installed."""
    points = [point for point in declared() if point.group != "pytest11" or find_spec("pytest")]
    for point in points:
        check(point)
    sys.stdout.write(f"{len(points)} entry points load\n")


if __name__ == "__main__":
    main()
