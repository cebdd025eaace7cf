"""How errors are shown: what is wrong, where, what to do; a traceback only when asked for."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

from ptrain.launch.failure import Failure


def show(label: str, message: str, stream: TextIO | None = None) -> None:
    """Print `label: message` to stderr; the label is coloured on a terminal, unless NO_COLOR is set."""
    out = stream or sys.stderr
    colour = {"error": "31;1", "warning": "33;1"}.get(label)
    if colour and out.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\033[{colour}m{label}\033[0m"
    out.write(f"{label}: {message}\n")
    out.flush()


class Warnings(logging.Handler):
    """Shows what ptrain warns of as errors are shown: with a label."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called with each warning."""
        show(record.levelname.lower(), record.getMessage())


def show_warnings() -> None:
    """Called at the start of a process that belongs to ptrain; in others, logging is set up by their own code."""
    log = logging.getLogger("ptrain")
    log.handlers, log.propagate = [Warnings()], False


def show_failure(
    failure: Failure,
    *,
    ranks: bool = True,
    debug: bool = False,
    traceback: Path | None = None,
    log: Path | None = None,
) -> None:
    """Print a failure as the last thing that the user sees.

    Args:
        ranks: whether to say which rank failed.
        debug: show the whole traceback.
        traceback: the file that holds it.
        log: the file with the output of that worker, where it was not shown.
    """
    if debug and failure.traceback:
        sys.stderr.write("\n".join(failure.traceback) + "\n")
    for message in _messages(failure, f"rank {failure.rank}: " if ranks else "", log):
        show("error", message)
    if failure.unexpected and traceback is not None and not debug:
        sys.stderr.write(f"  traceback: {traceback}\n")


def _messages(failure: Failure, who: str, log: Path | None) -> list[str]:
    """What is wrong: every problem of one of ptrain's own errors, else the one exception or exit."""
    if failure.problems:
        return [who + problem for problem in failure.problems]
    lines = [who + (f"{failure.kind}: {failure.message}" if failure.kind else failure.message)]
    lines += [f"  at {failure.place}"] if failure.place else []
    if log is not None:
        lines += [] if failure.kind else [f"  | {line}" for line in _tail(log)]
        lines += [f"  output: {log}"]
    return ["\n".join(lines)]


def _tail(path: Path, lines: int = 10) -> list[str]:
    """The last lines of a log file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
