"""Nothing outlives the process that started it, even where that is killed with SIGKILL.

Run as a script, with the standard library alone:
    guard.py exec PARENT COMMAND...    become COMMAND, which the kernel kills when PARENT dies (Linux)
    guard.py watch                     when stdin ends, kill the process groups that were written to it (`+7`,
                                       and `-7` to leave it alone again)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
ALONE = [sys.executable, "-I", "-S", __file__]
"""Runs this file quickly, whatever PYTHONPATH and the site's start-up code say."""


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies; does nothing where it is no Linux.

    With `parent`, the process ends at once where that has died in the meantime.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def guarded(command: Sequence[str]) -> list[str]:
    """`command` as a child of this process that dies with it."""
    return [*ALONE, "exec", str(os.getpid()), *command]


def kill_group(group: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a process group; whether there still was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, where only zombies are left
        return False
    return True


class Watch:
    """A tiny process that outlives this one and then kills the groups of its workers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [*ALONE, "watch"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def add(self, group: int) -> None:
        """Have `group` killed when this process ends."""
        self._write(f"+{group}\n")

    def discard(self, group: int) -> None:
        """Leave `group` alone: it is gone, and its number may be given to another one."""
        self._write(f"-{group}\n")

    def close(self) -> None:
        """Kill what is left of the groups now, and end the watch."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process.wait()

    def _write(self, line: str) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()


def _watch() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        kill_group(group)


def _main(arguments: list[str]) -> None:
    if arguments[0] == "watch":
        _watch()
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if it comes before the command is there
        die_with_parent(int(arguments[1]))
        os.execvp(arguments[2], arguments[2:])


if __name__ == "__main__":
    _main(sys.argv[1:])
