"""The devices that a plan can be made for, and how much memory each has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ptrain.launch.environment import LaunchError
from ptrain.recipe.suggest import closest

GB = 10**9
CPU = "cpu"
NOMINAL = {
    "a10-24gb": 24, "a100-40gb": 40, "a100-80gb": 80, "a40-48gb": 48, "b200-180gb": 180, "h100-80gb": 80,
    "h100-94gb": 94, "h200": 141, "l4-24gb": 24, "l40s-48gb": 48, "mi300x-192gb": 192, "rtx-3090-24gb": 24,
    "rtx-4090-24gb": 24, "rtx-5090-32gb": 32, "t4-16gb": 16, "v100-16gb": 16, "v100-32gb": 32,
}  # fmt: skip
"""Memory in GB (10^9 bytes) as the makers state it; what is left for a program is a little more or less."""
LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much memory a container may use."""


@dataclass(frozen=True)
class Device:
    """What a worker computes on.

    Attributes:
        name: as `--device` has it, or what the driver calls it.
        kind: "cuda" or "cpu".
        bytes: its memory; for "cpu" that of the machine, which all its workers share.
    """

    name: str
    kind: str
    bytes: int


def find(name: str | None) -> Device:
    """The device of this name; None is the GPU that is here, or else the CPU.

    Raises:
        LaunchError: there is no such name.
    """
    if name is None:
        return _gpu_here() or Device(CPU, CPU, memory_here())
    known = name.strip().lower()
    if known == CPU:
        return Device(CPU, CPU, memory_here())
    if known not in NOMINAL:
        begun = [one for one in NOMINAL if known and one.startswith(known)]
        guesses = begun or [guess for guess in [closest(known, [*NOMINAL, CPU])] if guess]
        raise LaunchError(
            f"--device {name}: unknown", expected=", ".join([*sorted(NOMINAL), CPU]),
            fix="write " + " or ".join(f"`{guess}`" for guess in guesses) if guesses else None,
        )  # fmt: skip
    return Device(known, "cuda", NOMINAL[known] * GB)


def _gpu_here() -> Device | None:
    from ptrain.launch.environment import accelerators

    if not accelerators():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Device(found.name, "cuda", found.total_memory)


def memory_here() -> int:
    """The bytes of memory that processes of this machine, or of this container, may use."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(LIMIT.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such file, or "max"
        return whole
