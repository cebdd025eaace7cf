"""Stopping on request: the first signal asks, the second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPED = 75
"""Exit code of a run that finished its step, saved and stopped because it was asked to (EX_TEMPFAIL)."""


NOTICE = "stopping: this step is finished and saved first; once more ends at once"


class Stop:
    """Whether the run was asked to stop. The loop asks `stop.requested` after each step."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def receive(self, number: int, settle: float = 0.0) -> None:
        """Take note of a signal; called by its handler.

        A second one ends the process with 128 + its number, unless it comes within `settle` seconds: where a
        batch system signals every process and the launcher passes its own on, one request arrives twice.
        """
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = number, now
        elif now - self._since >= settle:
            os._exit(128 + number)


def requests() -> list[int]:
    """The signals that ask a run to stop.

    SIGUSR1 is the usual notice of a batch system; SIGHUP means that the terminal went (`nohup` hides it).
    """
    names = ["SIGINT", "SIGTERM", "SIGUSR1"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        names.append("SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextlib.contextmanager
def listening(settle: float = 0.0, announce: bool = False) -> Iterator[Stop]:
    """A context in which signals set the flag that it gives; afterwards the former handlers are back.

    Args:
        settle: see `Stop.receive`.
        announce: tell the user, who may have pressed Ctrl-C, what happens now.
    """
    stop = Stop()

    def receive(number: int) -> None:
        if announce and not stop.requested:
            notify()
        stop.receive(number, settle)

    with handled_by(receive):
        yield stop


def notify() -> None:
    """Tell the user that the run is about to stop."""
    with contextlib.suppress(OSError):
        os.write(2, f"{NOTICE}\n".encode())  # a handler may interrupt a write to sys.stderr


@contextlib.contextmanager
def handled_by(receive: Callable[[int], None]) -> Iterator[None]:
    """A context in which `receive` is called with each request to stop.

    Outside the main thread, where Python allows no handlers, it is never called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        receive(number)

    former = {number: signal.signal(number, handle) for number in requests()}
    try:
        yield
    finally:
        for number, handler in former.items():
            # None stands for a handler that was not set from Python and can't be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
