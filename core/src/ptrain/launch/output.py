"""Where the output of each worker goes: the console, a log file, or both."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ptrain.launch.environment import LaunchError

Ranks = Collection[int] | Literal["*"]


@dataclass(frozen=True)
class Output:
    """Where the output of the workers goes.

    Attributes:
        folder: of the log files, `rank-N.log`.
        console: the workers whose output is shown. Rank 0, if it is one of them, gets the console itself (a
            live display needs the terminal); that of the others is prefixed with their rank.
        files: the workers that write a log file.
    """

    folder: Path
    console: Ranks = (0,)
    files: Ranks = "*"

    def log(self, rank: int) -> Path | None:
        """The log file of a worker, or None: its output goes straight to the console, or nowhere."""
        inherits = rank == 0 and _has(self.console, 0)
        return self.folder / f"rank-{rank}.log" if _has(self.files, rank) and not inherits else None

    def shown(self, rank: int) -> bool:
        """Whether the output of a worker is shown."""
        return _has(self.console, rank)

    def open(self, rank: int) -> IO[bytes] | int | None:
        """What `Popen` takes as the stdout of a worker; None is the console.

        Raises:
            LaunchError: the log file can't be written.
        """
        log = self.log(rank)
        if self.shown(rank):
            if log is not None:
                _append(log).close()  # so that a log that can't be written is said here
            return None if rank == 0 else subprocess.PIPE
        return subprocess.DEVNULL if log is None else _append(log)

    def follow(self, rank: int, stream: IO[bytes]) -> threading.Thread:
        """A thread, already running, that copies a worker's output to the console and to its log file."""
        thread = threading.Thread(target=self._copy, args=(rank, stream), daemon=True)
        thread.start()
        return thread

    def _copy(self, rank: int, stream: IO[bytes]) -> None:
        log = self.log(rank)
        file = None if log is None else _append(log)
        shown = True
        for line in stream:
            # A full disk or a console that is gone must not stop the worker, which waits until its output is read.
            if file is not None:
                try:
                    file.write(line)
                    file.flush()
                except OSError:
                    file = None
            if shown:
                try:
                    _print(f"[rank {rank}] {line.decode(errors='replace')}")
                except (OSError, ValueError):
                    shown = False
        if file is not None:
            file.close()


def _has(ranks: Ranks, rank: int) -> bool:
    return ranks == "*" or rank in ranks


def _print(text: str) -> None:
    """Write to the console, which may not know every letter."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _append(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise LaunchError(
            f"the log file {path} can't be written: {error.strerror}", fix="choose another `logger.output_dir`"
        ) from None
