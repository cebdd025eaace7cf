"""The CPU cores of this machine, and how workers share them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ptrain.launch.environment import LaunchError


def cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores that this process may use: its affinity, or a container's quota if that is smaller."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return max(1, min(available, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or a quota of "max"
        return available


def share(core_list: str, workers: int) -> tuple[tuple[int, ...], ...]:
    """The cores of each worker: equal shares of `core_list` ("" for all that are usable), in order.

    Raises:
        LaunchError: the system can't bind, the list is wrong, or there are fewer cores than workers.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise LaunchError("--bind_cores_to_rank: this system can't bind processes to cores", fix="leave it out")
    usable = sorted(os.sched_getaffinity(0))
    listed = parse_core_list(core_list) if core_list else usable
    if not set(listed) <= set(usable):
        raise LaunchError(f"--bind_core_list {core_list}: not all of them are usable", expected=_short(usable))
    size = len(listed) // workers
    if size == 0:
        raise LaunchError(f"--bind_cores_to_rank: {len(listed)} cores are too few for {workers} workers")
    return tuple(tuple(listed[rank * size : (rank + 1) * size]) for rank in range(workers))


def parse_core_list(text: str) -> list[int]:
    """The numbers of `1,3-5,7`.

    Raises:
        LaunchError: it is not of that form.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise LaunchError(f"--bind_core_list {text}: {part!r} is no core", expected="`0,2-5`, say")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)


def _short(numbers: Sequence[int]) -> str:
    consecutive = len(numbers) == numbers[-1] - numbers[0] + 1
    return f"{numbers[0]}-{numbers[-1]}" if consecutive else ",".join(map(str, numbers))
