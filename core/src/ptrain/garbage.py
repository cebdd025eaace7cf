"""When Python looks for garbage: hardly ever while a process starts, as usual while it works."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
SELDOM = (100_000, 50, 100)


def look_seldom() -> None:
    """For a process that begins: what it imports stays, and looking through it takes a quarter of the time.

    `look_as_usual` has to follow before a model is made: tensors that are held by a cycle of references would take
    memory for too long.
    """
    gc.set_threshold(*SELDOM)


def look_as_usual() -> None:
    """After `look_seldom`; what is there now, half a million objects of libraries, is not looked through any more.

    A process that has not called that is left alone: it may have settings of its own.
    """
    if gc.get_threshold() == SELDOM:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*USUAL)
