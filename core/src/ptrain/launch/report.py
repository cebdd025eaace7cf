"""How errors are shown: what is wrong, where, what to do; a traceback only when asked for."""

from __future__ import annotations

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
    who = f"rank {failure.rank}: " if ranks else ""
    for problem in failure.problems:
        show("error", who + problem)
    if failure.problems:
        return
    lines = [f"{who}{failure.kind}: {failure.message}" if failure.kind else f"{who}{failure.message}"]
    lines += [f"  at {failure.place}"] if failure.place else []
    if log is not None and not failure.kind:
        lines += [f"  | {line}" for line in _tail(log)]
    lines += [f"  output: {log}"] if log is not None else []
    lines += [f"  traceback: {traceback}"] if failure.traceback and traceback and not debug else []
    show("error", "\n".join(lines))


def _tail(path: Path, lines: int = 10) -> list[str]:
    """The last lines of a log file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
