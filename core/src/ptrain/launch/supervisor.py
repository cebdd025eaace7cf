"""Several workers on this machine: started together, watched over, stopped together."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptrain.launch import failure, guard, hang
from ptrain.launch.cpu import cores
from ptrain.launch.environment import Topology, accelerators
from ptrain.launch.failure import ERROR_DIR, Failure
from ptrain.launch.output import Output
from ptrain.launch.report import show_failure
from ptrain.launch.signals import STOPPED, handled_by, notify

POLL = 0.05
"""Seconds between two looks at the workers."""
LINGER = 1.0
"""Seconds that the children of a worker have to end after it."""
ATTEMPTS = 3
"""Starts until a port is given up that is free when chosen and taken when used."""


@dataclass(frozen=True)
class Job:
    """What is to be run, and how.

    Attributes:
        command: one worker.
        workers: how many.
        output: where their output goes.
        error_dir: the folder where they leave why they failed.
        spare: another one, for when that one can't be written to.
        env: their environment, to which the variables of each worker are added.
        port: of rank 0, where the user chose one; otherwise each start takes a free one.
        cores: the CPU cores of each worker, where they are bound to some.
        grace: seconds between SIGTERM and SIGKILL for the workers that are left when one has failed.
        debug: show the traceback of a failure.
        launcher: where the one process is a launcher, its name; it tells its own workers of each other.
    """

    command: Sequence[str]
    workers: int
    output: Output
    error_dir: Path
    env: Mapping[str, str]
    spare: Path | None = None
    port: int | None = None
    cores: Sequence[Sequence[int]] = ()
    grace: float = 5.0
    debug: bool = False
    launcher: str = ""


def supervise(job: Job) -> int:
    """Run the workers of a job to their end and return the exit code of the whole.

    0: all are done. 75: they stopped on request, having saved. Otherwise the code of the failure that came
    first, which is the last thing printed; 128 + n where it was signal n.
    """
    # A name alone: a worker makes the folder when it needs it, so that a supervisor that is killed leaves none.
    spare = Path(tempfile.gettempdir()) / f"ptrain-{uuid.uuid4().hex}"
    try:
        return _supervise(replace(job, spare=spare))
    finally:
        shutil.rmtree(spare, ignore_errors=True)


def _supervise(job: Job) -> int:
    code = 1
    for attempt in range(1, ATTEMPTS + 1):
        for folder in _folders(job):
            failure.clear(folder)
        code, cause = _attempt(job)
        if cause is None:
            return code
        if attempt < ATTEMPTS and job.port is None and not job.launcher and _port_taken(cause):
            continue
        log, told = job.output.log(cause.rank), job.error_dir / f"rank-{cause.rank}.json"
        show_failure(
            cause,
            ranks=job.workers > 1 or (bool(job.launcher) and bool(cause.kind)),
            debug=job.debug,
            traceback=told if told.is_file() else None,
            log=log if log is not None and log.is_file() else None,
        )
        break
    return code


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _port_taken(cause: Failure) -> bool:
    text = cause.message.lower()
    return "eaddrinuse" in text or "address already in use" in text


def _attempt(job: Job) -> tuple[int, Failure | None]:
    """Start the workers and wait for their end: the exit code and, if they failed, what came first."""
    requests: list[int] = []
    with handled_by(requests.append), _started(job) as workers:
        forwarded = False
        while any(worker.running for worker in workers):
            if len(requests) > 1:
                return 128 + requests[1], None
            if requests and not forwarded:
                notify()
                _send(workers, requests[0])
                forwarded = True
            ended = [worker for worker in workers if worker.failed]
            if ended:
                return _failed(job, workers, ended, requests)
            time.sleep(POLL)
        ended = [worker for worker in workers if worker.failed]
        if ended:
            return _failed(job, workers, ended, requests)
        return (STOPPED if any(w.process.returncode == STOPPED for w in workers) else 0), None


def _failed(job: Job, workers: list[Worker], ended: list[Worker], requests: list[int]) -> tuple[int, Failure | None]:
    """Stop the workers that are left, and find out why the run failed."""
    left = [worker for worker in workers if worker.running]
    if requests and all(worker.process.returncode == -requests[0] for worker in ended):
        _stop(left, job.grace)  # asked to stop before they could listen
        return 128 + requests[0], None
    who = job.launcher or "the process"
    silent = {w.rank: Failure.of_exit(w.process.returncode, w.rank, who) for w in ended}
    _stop(left, job.grace)
    told = {found.rank: found for folder in _folders(job) for found in failure.read(folder)}
    cause = failure.first((told if told and job.launcher else {**silent, **told}).values())
    return cause.exit_code or 1, hang.with_others(cause, told.values(), () if job.launcher else range(job.workers))


class Worker:
    """One worker process, the leader of a process group of its own."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], copy: threading.Thread | None) -> None:
        self.rank = rank
        self.process = process
        self.copy = copy

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than done or stopped on request."""
        return self.process.poll() not in (None, 0, STOPPED)


@contextlib.contextmanager
def _started(job: Job) -> Iterator[list[Worker]]:
    """The workers; on leaving, whatever is left of them and of their children is killed."""
    watch = guard.Watch()
    workers: list[Worker] = []
    try:
        port = job.port or free_port()
        for rank in range(job.workers):
            workers.append(_start(job, rank, port))
            watch.add(workers[-1].process.pid)
        yield workers
    finally:
        _clean_up(workers, watch)


def _start(job: Job, rank: int, port: int) -> Worker:
    """Start one worker."""
    stdout = job.output.open(rank)
    process = subprocess.Popen(
        guard.guarded(job.command),
        env=_environment(job, rank, port),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=None if stdout is None else subprocess.STDOUT,
        start_new_session=True,  # its signals and its children are its own
    )
    if job.cores and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, job.cores[rank])
    if not isinstance(stdout, int) and stdout is not None:
        stdout.close()  # the worker has it now
    copy = job.output.follow(rank, process.stdout) if process.stdout is not None else None
    return Worker(rank, process, copy)


def _environment(job: Job, rank: int, port: int) -> dict[str, str]:
    """The environment of one worker."""
    if job.launcher:
        return {**job.env, ERROR_DIR: str(job.error_dir.absolute())}
    folders = "\n".join(str(folder.absolute()) for folder in _folders(job))
    place = Topology(rank, job.workers, rank, job.workers, "127.0.0.1", port, "environment")
    env = {**job.env, **place.environment(), ERROR_DIR: folders}
    if job.cores:
        env.setdefault("OMP_NUM_THREADS", str(len(job.cores[rank])))
    elif job.workers > 1 and accelerators(job.env) == 0:
        # More threads than cores make each step many times slower.
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // job.workers)))
    if Path("/sys/class/net/lo").exists():
        # All workers are here; the address of this machine's own name may not work, or not resolve.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def _folders(job: Job) -> list[Path]:
    """Where workers leave why they failed."""
    return [job.error_dir, job.spare] if job.spare is not None else [job.error_dir]


def _send(workers: list[Worker], number: int) -> None:
    for worker in workers:
        if worker.running:
            worker.process.send_signal(number)


def _stop(workers: list[Worker], grace: float) -> None:
    """Ask workers to end, and kill those that haven't after `grace` seconds."""
    _send(workers, signal.SIGTERM)
    _wait(workers, grace)
    _send(workers, signal.SIGKILL)
    _wait(workers, grace)


def _wait(workers: list[Worker], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(worker.running for worker in workers) and time.monotonic() < end:
        time.sleep(POLL)


def _clean_up(workers: list[Worker], watch: guard.Watch) -> None:
    """Kill the workers, give their children a moment to end by themselves, and kill those as well."""
    for worker in workers:
        if worker.running:
            worker.process.kill()
            worker.process.wait()
    left = {worker.process.pid for worker in workers}
    end = time.monotonic() + LINGER
    while left and time.monotonic() < end:
        for group in [group for group in left if not guard.kill_group(group, 0)]:
            left.discard(group)
            watch.discard(group)
        if left:
            time.sleep(POLL)
    watch.close()
    for worker in workers:
        if worker.copy is not None:
            worker.copy.join(timeout=LINGER)
