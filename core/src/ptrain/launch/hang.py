"""Telling of a worker that hangs: which one, since when, at what, and where in the code.

Without that, the others wait for it until the communication library gives up, and what it says then names neither
the worker nor the reason.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

from ptrain.launch import failure
from ptrain.launch.failure import Failure

LIMIT = 1800
"""Seconds without progress after which one of several workers hangs: as long as torch waits for the others."""
SPREAD = 3.0
"""Seconds that a worker that hangs waits before it ends, so that others whose time is up can tell where they are."""
KIND = "Hang"
POLL = 1.0
WAITING = re.compile(r"/(torch/distributed|deepspeed/comm|deepspeed/runtime/comm)/")
"""Files in which a worker waits for the others."""
NEAR = 8
"""Innermost calls that are looked at for that."""

_last: tuple[float, str, int] = (0.0, "the start", 0)
"""When a worker last began something, what, and after how many steps."""


def limit(given: int | None, workers: int) -> int:
    """Seconds of the recipe's `hang_timeout`, 0 for none: nobody waits for a single worker."""
    return (LIMIT if workers > 1 else 0) if given is None else given


def beat(doing: str, step: int | None = None) -> None:
    """Say that this worker is getting on: it begins `doing`, after so many optimizer steps (None: as before)."""
    global _last
    _last = (time.time(), doing, _last[2] if step is None else step)


@contextlib.contextmanager
def watched(seconds: float, rank: int, report: Callable[[Failure], object]) -> Iterator[None]:
    """A context in which `report` is called, from another thread, once nothing has begun for so many seconds."""
    over = threading.Event()
    beat("the start")
    arguments = (seconds, rank, report, threading.current_thread(), over)
    threading.Thread(target=_watch, args=arguments, daemon=True, name="ptrain-hang").start()
    try:
        yield
    finally:
        over.set()


def _watch(
    seconds: float, rank: int, report: Callable[[Failure], object], main: threading.Thread, over: threading.Event
) -> None:
    poll = min(POLL, seconds / 10)
    seen, quiet, before = _last, 0.0, time.monotonic()
    while not over.wait(poll):
        now = time.monotonic()
        # Where the whole process stood still, such as a machine that slept, it has not hung.
        quiet += min(now - before, 2 * poll)
        before = now
        if _last is not seen:
            seen, quiet = _last, 0.0
        elif quiet >= seconds:
            report(_found(seconds, rank, main))
            return


def _found(seconds: float, rank: int, main: threading.Thread) -> Failure:
    """What this worker can tell of itself: where its main thread is, or the one that it waits for."""
    frames = sys._current_frames()
    stacks = {main.name: traceback.extract_stack(frames[main.ident or 0])}
    for thread in threading.enumerate():
        if thread not in (main, threading.current_thread()) and thread.ident in frames:
            stacks[thread.name] = traceback.extract_stack(frames[thread.ident])
    busy = next((stack for name, stack in stacks.items() if name.startswith("loader") and not _idle(stack)), None)
    stack = busy if busy is not None and "concurrent/futures" in stacks[main.name][-2].filename else stacks[main.name]
    waits = any(WAITING.search(frame.filename) for frame in stacks[main.name][-NEAR:])
    since, doing, step = _last
    what = "it has waited for the others" if waits else "no progress"
    message = f"{what} for {seconds:g} s, since {doing} of step {step + 1} began"
    lines = [line for name, one in stacks.items() for line in [f"{name}:\n", *one.format()]]
    return Failure(
        rank=rank,
        time=since,
        kind=KIND,
        message=f"{message}; if that may take longer, set `hang_timeout` higher",
        place=failure.place_of(stack),
        traceback=tuple("".join(lines).splitlines()),
        unexpected=True,
        lost_peer=waits,
    )


def _idle(stack: traceback.StackSummary) -> bool:
    """Whether a thread of a pool has nothing to do."""
    return stack[-1].filename.endswith(("concurrent/futures/thread.py", "threading.py"))


def with_others(cause: Failure, told: Collection[Failure], ranks: Iterable[int]) -> Failure:
    """A hang, with what the other workers told of themselves; those that told nothing are named as well."""
    if cause.kind != KIND:
        return cause
    others = [one for one in told if one.kind == KIND and one.rank != cause.rank]
    lines = [f"rank {one.rank}: {one.message.partition(';')[0]}\n  at {one.place}" for one in others]
    silent = sorted(set(ranks) - {cause.rank, *(one.rank for one in others)})
    if silent and cause.lost_peer:
        lines.append(f"rank {', '.join(map(str, silent))}: told nothing, so it may be what the others wait for")
    if not lines:
        return cause
    return replace(cause, message="\n".join([cause.message, f"  at {cause.place}", *lines]), place="")
