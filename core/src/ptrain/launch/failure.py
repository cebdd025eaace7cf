"""Why a worker failed: written by the worker, read by whoever started it, shown once."""

from __future__ import annotations

import json
import os
import re
import signal
import sysconfig
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ptrain.errors import PtrainError

ERROR_DIR = "PTRAIN_ERROR_DIR"
"""The variable with the folders, a line each, of which the first that can be written to is for a worker's failure."""

LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|closed by (remote )?peer|socket (closed|timeout)"
    r"|NCCL (communicator was aborted|error|watchdog)|remote process exited|wait timeout"
    r"|DistBackendError|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
"""What a worker says when another one went away: an effect, hardly ever the cause."""


@dataclass(frozen=True)
class Failure:
    """What went wrong in one worker.

    Attributes:
        rank: of the worker among all.
        time: when, in seconds since the epoch.
        kind: the type of the exception, or "" where the process ended without one.
        message: what it says.
        exit_code: what the worker's process ends with.
        place: `file:line, in function` of the innermost frame that is no library's.
        traceback: the whole of it, line by line.
        problems: where it is one of ptrain's own errors, what the user is told, one by one.
        unexpected: whether an error that is not ptrain's own is (behind) it, so that the traceback tells more.
        lost_peer: whether it only says that another worker went away.
    """

    rank: int
    time: float
    kind: str
    message: str
    exit_code: int = 1
    place: str = ""
    traceback: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    unexpected: bool = False
    lost_peer: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure that an exception stands for."""
        foreign = [e for e in _chain(error) if not isinstance(e, PtrainError)]
        return cls(
            rank=rank,
            time=time.time(),
            kind=type(error).__name__,
            message=str(error),
            exit_code=error.exit_code if isinstance(error, PtrainError) else 1,
            place=place_of(traceback.extract_tb(error.__traceback__)),
            traceback=tuple("".join(traceback.format_exception(error)).splitlines()),
            problems=tuple(map(str, error.problems)) if isinstance(error, PtrainError) else (),
            unexpected=bool(foreign),
            lost_peer=any(LOST_PEER.search(f"{type(e).__name__}: {e}") for e in foreign),
        )

    @classmethod
    def of_exit(cls, code: int, rank: int, who: str = "the process") -> Failure:
        """The failure of a process that ended without leaving an exception; `code` as `Popen` gives it."""
        if code >= 0:
            return cls(rank, time.time(), "", f"{who} ended with exit code {code} and left no exception", code)
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
        hint = {"SIGKILL": " (out of memory?)", "SIGSEGV": " (a crash in native code)"}.get(name, "")
        return cls(rank, time.time(), "", f"{who} was ended by {name}{hint}", 128 - code)

    def write(self, folder: Path) -> Path:
        """Leave the failure in `folder` as `rank-N.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank}.json"
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            staged.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
        return path

    def leave(self, folders: Iterable[Path]) -> None:
        """Write the failure into the first folder that takes it: the disk may be full, which may be the failure."""
        for folder in folders:
            try:
                self.write(folder)
                return
            except OSError:
                continue


def folders() -> list[Path]:
    """Where this worker may leave its failure."""
    return [Path(folder) for folder in os.environ.get(ERROR_DIR, "").splitlines()]


def place_of(frames: traceback.StackSummary) -> str:
    """Where it happened: deep inside a library is seldom where the mistake is."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = [f for f in frames if "ptrain" in f.filename or not f.filename.startswith(("<", *libraries))]
    at = (own or list(frames))[-1:]
    return "".join(f"{frame.filename}:{frame.lineno}, in {frame.name}" for frame in at)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def read(folder: Path) -> list[Failure]:
    """What the workers left in `folder`."""
    failures = []
    for path in sorted(folder.glob("rank-*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
            failures.append(Failure(**{**found, **lists}))
        except (OSError, ValueError, TypeError):
            continue  # not of this version, or the disk is full: the exit code still tells of the failure
    return failures


def clear(folder: Path, rank: int | None = None) -> None:
    """Remove what an earlier start left in `folder`: of one worker, or of all."""
    for path in folder.glob("rank-*.json" if rank is None else f"rank-{rank}.json"):
        path.unlink(missing_ok=True)


def first(failures: Iterable[Failure]) -> Failure:
    """The one that caused the others: the earliest that doesn't only say that another worker went away."""
    return min(failures, key=lambda failure: (failure.lost_peer, failure.time))
