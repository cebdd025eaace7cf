"""One worker: `python -m ptrain.launch.worker SPEC`, where SPEC is the file that the preparation left."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ptrain import garbage
from ptrain.launch import guard, hang
from ptrain.launch.environment import LaunchError, Topology
from ptrain.launch.failure import Failure, folders
from ptrain.launch.report import show_warnings
from ptrain.launch.signals import Stop, listening

PROFILES = ("tottime", "cumtime", "disable")
SETTLE = 1.0
"""Seconds in which a second signal counts as the first one again: batch systems and launchers both signal."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Train as one of several workers; the process ends with the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m ptrain.launch.worker")
    parser.add_argument("spec", type=Path, help="the file that the preparation left in the run directory")
    parser.add_argument("--python_profile", choices=PROFILES, default="disable")
    parser.add_argument("--traceback", action="store_true", help="print that of a failure on rank 0 too")
    given = parser.parse_args(arguments)
    garbage.look_seldom()
    guard.die_with_parent()
    show_warnings()
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Whole lines at once: several workers may write to one console.
            stream.reconfigure(line_buffering=True, write_through=False)

    def show(failure: Failure) -> None:
        # The supervisor shows what came first; rank 0 has the console, the others their log file.
        if given.traceback or failure.rank != 0:
            sys.stderr.write("\n".join(failure.traceback) + "\n")

    with listening(settle=SETTLE) as stop:
        code = recorded(lambda hung: train(given.spec, stop, given.python_profile, hung), show, folders())
    leave(code)


Told = Callable[[Failure], None]


def recorded(work: Callable[[Told], int], show: Told, places: Sequence[Path] = ()) -> int:
    """The exit code of `work`; if it fails, why is left in the first of `places` that takes it, and then shown.

    `work` is given a function that does so where it hangs, from another thread, and ends the process.
    """

    def hung(failure: Failure) -> None:
        try:
            failure.leave(places)
            time.sleep(hang.SPREAD)
            show(failure)
        finally:
            leave(failure.exit_code)

    try:
        return work(hung)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        failure = Failure.of(error, Topology.from_environment(os.environ).rank)
        failure.leave(places)
        show(failure)
        return failure.exit_code


def train(spec: Path, stop: Stop, python_profile: str = "disable", hung: Told | None = None) -> int:
    """Train from the file that the preparation left, and return the exit code.

    Args:
        spec: that file.
        stop: whether the run was asked to stop.
        python_profile: see `profiled`.
        hung: called where this worker hangs; see `ptrain.launch.hang`.

    Raises:
        LaunchError: it is not there: another host prepared, and this one does not see its files.
    """
    if not spec.is_file():
        raise LaunchError(
            f"{socket.gethostname()} doesn't see {spec}",
            fix="set `output_dir` and `data.cache_dir` to folders that all hosts share",
        )
    from ptrain.job import work

    return profiled(python_profile, lambda: work(spec, stop, hung))


def profiled(by: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; on local rank 0, Python's profile of it is printed, sorted `by` a column."""
    if by == "disable" or Topology.from_environment(os.environ).local_rank != 0:
        return work()
    with _profile(by):
        return work()


@contextlib.contextmanager
def _profile(by: str) -> Iterator[None]:
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        pstats.Stats(profile, stream=sys.stderr).sort_stats(by).print_stats(50)


def leave(code: int) -> NoReturn:
    """End the process at once: flushed, but without the second that tearing down the interpreter takes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
