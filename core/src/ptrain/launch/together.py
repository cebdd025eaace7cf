"""Processes that were started apart, before they are a process group: one prepares, the others wait.

They meet in the key-value store that `torch.distributed` uses to form the process group later. Unlike a
collective, waiting there has no timeout, however long the data takes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptrain.errors import PtrainError
from ptrain.launch.environment import LaunchError, Topology

ARRIVAL = datetime.timedelta(minutes=5)
"""How long workers may start after each other."""
PREPARED = "ptrain/{}/prepared"
SEEN = "ptrain/{}/seen-{}"
"""Keys in the store, by the number of the meeting, and the latter by rank too."""
POLL = 0.2
VISIBLE = 60.0
"""Seconds until a file that another host wrote must be seen; shared file systems cache."""


_meetings = itertools.count()


def prepare_together(topology: Topology, prepare: Callable[[], Path]) -> Path:
    """What `prepare` returns on rank 0, on every rank; each has to call it equally often.

    Raises:
        PtrainError: what `prepare` raises, on rank 0; or the workers can't meet, or don't see the same files.
        SystemExit: with the same exit code, on the others.
    """
    if topology.world == 1:
        return prepare()
    _check_address(topology)
    store, meeting = _store(topology), next(_meetings)
    if topology.rank == 0:
        return _lead(store, topology, meeting, prepare)
    return _follow(store, topology, meeting)


def _check_address(topology: Topology) -> None:
    """Refuse at once a host that doesn't exist: one that isn't ready yet is waited for."""
    try:
        socket.getaddrinfo(topology.master_addr, topology.master_port)
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR {topology.master_addr!r} is no host that {socket.gethostname()} knows: {error.strerror}",
            expected="the name or address of the host of rank 0",
        ) from None


@functools.cache  # rank 0 serves the store: it must last until the process group uses it
def _store(topology: Topology) -> Any:
    from torch.distributed.rendezvous import rendezvous

    try:
        host = f"[{topology.master_addr}]" if ":" in topology.master_addr else topology.master_addr
        url = f"tcp://{host}:{topology.master_port}"
        store, _, _ = next(rendezvous(url, topology.rank, topology.world, timeout=ARRIVAL))
    except (RuntimeError, ValueError) as error:  # torch's own kinds are subclasses of RuntimeError
        raise LaunchError(
            f"rank {topology.rank} can't meet the others at {topology.master_addr}:{topology.master_port}: "
            f"{str(error).splitlines()[0]}",
            expected=f"{topology.world} processes, started within {ARRIVAL} (h:mm:ss)",
            fix="see that MASTER_ADDR is the host of rank 0, reachable from this one, and that the port is free",
        ) from None
    return store


def _lead(store: Any, topology: Topology, meeting: int, prepare: Callable[[], Path]) -> Path:
    try:
        spec = prepare()
    except BaseException as error:
        code = error.exit_code if isinstance(error, PtrainError) else getattr(error, "code", 1)
        store.set(PREPARED.format(meeting), json.dumps({"exit_code": code if isinstance(code, int) else 1}))
        _wait_for_all(store, [SEEN.format(meeting, rank) for rank in range(1, topology.world)])
        raise
    store.set(PREPARED.format(meeting), json.dumps({"spec": str(spec)}))
    return spec


def _wait_for_all(store: Any, keys: list[str]) -> None:
    """Serve the store until the others know that there is nothing to do."""
    end = time.monotonic() + 10
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < end and not store.check(keys):
            time.sleep(POLL)


def _follow(store: Any, topology: Topology, meeting: int) -> Path:
    try:
        # Short looks instead of one long wait, in which no signal would be served.
        while not store.check([PREPARED.format(meeting)]):
            time.sleep(POLL)
        told = json.loads(store.get(PREPARED.format(meeting)))
        store.set(SEEN.format(meeting, topology.rank), "")
    except RuntimeError:
        raise SystemExit(1) from None  # rank 0 is gone, and its launcher shows why
    if "exit_code" in told:
        raise SystemExit(told["exit_code"])
    return _seen(Path(told["spec"]), topology)


def _seen(spec: Path, topology: Topology) -> Path:
    end = time.monotonic() + VISIBLE
    while not spec.exists():
        if time.monotonic() > end:
            raise LaunchError(
                f"rank {topology.rank} on {socket.gethostname()} doesn't see {spec}, which rank 0 wrote",
                fix="set `output_dir` and `data.cache_dir` to folders that all hosts share",
            )
        time.sleep(POLL)
    return spec
