"""Where this process stands among all workers, as its environment says; and what this machine has."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptrain.errors import BAD_INPUT, PtrainError
from ptrain.launch import slurm

WORKER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(PtrainError):
    """The launcher's arguments, hosts or environment are wrong."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class Topology:
    """The place of one worker among all.

    Attributes:
        rank, world: of all workers of the run.
        local_rank, local_world: of those on this machine.
        master_addr, master_port: where rank 0 can be reached; port 0 while none is chosen.
        origin: who started this process: "" (nobody: it is no worker yet), "torchrun", "ray", "slurm", or
            "environment" (ptrain's supervisor, DeepSpeed's launcher, variables set by hand).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    origin: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Topology:
        """The place of this process: what torchrun, DeepSpeed, Ray or Slurm set, else that of a single one.

        Raises:
            LaunchError: variables are missing, are no numbers, or contradict each other.
        """
        if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
            return _checked(_explicit(environ))
        if slurm.is_task(environ):
            return _checked(_from_slurm(environ))
        return cls()

    @property
    def is_worker(self) -> bool:
        """Whether a launcher started this process as one worker of a run."""
        return bool(self.origin)

    def environment(self) -> dict[str, str]:
        """The variables by which `torch.distributed` and DeepSpeed find the other workers."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def _explicit(environ: Mapping[str, str]) -> Topology:
    given = [name for name in WORKER_VARIABLES if name in environ]
    needed = WORKER_VARIABLES[:3] if environ.get("WORLD_SIZE") == "1" else WORKER_VARIABLES
    missing = [name for name in needed if name not in environ]
    if missing:
        raise LaunchError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}",
            expected=f"all of {', '.join(WORKER_VARIABLES)} (torchrun sets them), or none",
            fix=f"set {missing[0]} too, or `unset {' '.join(given)}` to let ptrain start the workers",
        )
    world = _number(environ, "WORLD_SIZE")
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    return Topology(
        rank=_number(environ, "RANK"),
        world=world,
        local_rank=_number(environ, "LOCAL_RANK"),
        # Where the launcher does not say, all workers are taken to be on this machine.
        local_world=_number(environ, local) if local else world,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 0,
        origin=_origin(environ),
    )


def _origin(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "ray" if "RAY_JOB_ID" in environ or "RAY_RAYLET_PID" in environ else "environment"


def _from_slurm(environ: Mapping[str, str]) -> Topology:
    try:
        hosts = slurm.expand(slurm.node_list(environ))
        tasks = slurm.tasks_per_node(environ, len(hosts))
    except ValueError as error:
        raise LaunchError(f"Slurm's environment can't be read: {error}") from None
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    world = _number(environ, slurm.world_variable(environ))
    if node >= len(hosts):
        raise LaunchError(f"SLURM_NODEID is {node}, but {slurm.node_list(environ)} names {len(hosts)} nodes")
    return Topology(
        rank=_number(environ, "SLURM_PROCID"),
        world=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world=tasks[node] if tasks else math.ceil(world / len(hosts)),
        master_addr=environ.get("MASTER_ADDR") or hosts[0],
        master_port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else slurm.port(environ),
        origin="slurm",
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not re.fullmatch(r"[0-9]+", value):
        raise LaunchError(f"the environment variable {name} is {value!r}", expected="a number, 0 or more")
    return int(value)


def _checked(place: Topology) -> Topology:
    for what, size, rank in (
        ("world size", place.world, place.rank),
        ("number of workers on this machine", place.local_world, place.local_rank),
    ):
        if rank >= size:
            kind = "rank" if what == "world size" else "local rank"
            raise LaunchError(
                f"the environment says {kind} {rank}, but a {what} of {size}",
                expected=f"a {kind} from 0 to {size - 1}" if size else "at least one worker",
            )
    if place.master_port > 65535:
        raise LaunchError(f"the environment variable MASTER_PORT is {place.master_port}", expected="1 to 65535")
    return place


def accelerators(environ: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """The number of GPUs that a run may use here, found without importing torch; 0 means CPU.

    CUDA_VISIBLE_DEVICES counts as CUDA reads it: up to the first entry that is no device.
    """
    environ = os.environ if environ is None else environ
    if environ.get("DS_ACCELERATOR") == "cpu" or _cpu_build():
        return 0
    present = len([path for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    named = visible_devices(visible)
    # One GPU may be shared out under several names (MIG), but not under several numbers.
    return min(len(named), present) if all(name.isdigit() for name in named) else len(named)


def visible_devices(value: str) -> list[str]:
    """The devices that a value of CUDA_VISIBLE_DEVICES names, in order."""
    named: list[str] = []
    for entry in (word.strip() for word in value.split(",")):
        if not re.fullmatch(r"\d+|GPU-\S+|MIG-\S+", entry):
            break
        named.append(entry)
    return named


def _cpu_build() -> bool:
    """Whether the installed torch can't use a GPU at all."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
