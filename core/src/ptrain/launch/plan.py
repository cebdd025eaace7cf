"""Where a run is to take place: in this process, in several on this machine, or on several hosts."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from ptrain.launch.cpu import share
from ptrain.launch.environment import LaunchError, Topology, accelerators, visible_devices
from ptrain.launch.hosts import Hosts, choose, is_here, parse_filter, read_hostfile

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks for a hostfile too."""

BACKENDS = {
    "pdsh": "pdsh",
    "openmpi": "mpirun",
    "mpich": "mpirun",
    "impi": "mpirun",
    "mvapich": "mpirun",
    "slurm": "srun",
}
"""What `--launcher` may say, and the program that it needs."""


@dataclass(frozen=True)
class Arguments:
    """The launcher's arguments as the user gave them; None, "" and False where they were not."""

    workers: int | None = None
    num_nodes: int | None = None
    hostfile: Path | None = None
    include: str = ""
    exclude: str = ""
    master_addr: str = ""
    master_port: int | None = None
    launcher: str = ""
    launcher_args: str = ""
    no_ssh: bool = False
    no_ssh_check: bool = False
    node_rank: int | None = None
    ssh_port: int | None = None
    venv_script: Path | None = None
    bind_cores_to_rank: bool = False
    bind_core_list: str = ""

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        return [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != f.default]


@dataclass(frozen=True)
class Plan:
    """Where the workers run.

    Attributes:
        topology: the place of this process, if it is itself a worker that a launcher started.
        workers: the number on this machine.
        devices: the value of CUDA_VISIBLE_DEVICES for them, where some were chosen.
        port: of rank 0, where one was chosen.
        cores: the CPU cores of each worker, where they are bound to some.
        hosts: the hosts and their slots, where DeepSpeed's launcher is to start the workers.
        arguments: what the user gave.
    """

    topology: Topology = field(default_factory=Topology)
    workers: int = 1
    devices: str | None = None
    port: int | None = None
    cores: tuple[tuple[int, ...], ...] = ()
    hosts: Hosts = field(default_factory=dict)
    arguments: Arguments = field(default_factory=Arguments)

    @property
    def world(self) -> int:
        """The number of workers of the run."""
        if self.topology.is_worker:
            return self.topology.world
        return sum(map(len, self.hosts.values())) or self.workers

    @property
    def meeting(self) -> Topology:
        """This process among those that were started apart and must agree on who prepares.

        They are the workers of another launcher, or, with `--no_ssh`, the processes that start workers.
        """
        given = self.arguments
        if not given.no_ssh:
            return self.topology
        return Topology(
            rank=given.node_rank or 0,
            world=len(self.hosts),
            local_world=1,
            master_addr=given.master_addr,
            master_port=given.master_port or 0,
        )


def make_plan(arguments: Arguments, environ: Mapping[str, str] | None = None) -> Plan:
    """Decide where the workers run, and check what can be checked before anything starts.

    Raises:
        LaunchError: the arguments contradict each other, the environment, or what there is.
    """
    environ = os.environ if environ is None else environ
    _check_alone(arguments)
    topology = Topology.from_environment(environ)
    if topology.is_worker:
        return _as_worker(arguments, topology)
    hosts = _hosts(arguments, environ)
    if len(hosts) > 1 or not is_here(next(iter(hosts))):
        return _on_hosts(arguments, hosts)
    return _here(arguments, next(iter(hosts.values())), environ)


def _check_alone(arguments: Arguments) -> None:
    """What can be said of the arguments without looking at anything else."""
    for name, low, high in (
        ("workers", 1, None),
        ("num_nodes", 1, None),
        ("node_rank", 0, None),
        ("master_port", 1, 65535),
        ("ssh_port", 1, 65535),
    ):
        value = getattr(arguments, name)
        if value is not None and (value < low or (high is not None and value > high)):
            expected = f"{low} to {high}" if high else f"{low} or more"
            raise LaunchError(f"--{name} {value}: that can't be", expected=expected)
    if arguments.launcher == "ray":
        raise LaunchError(
            "--launcher ray: ptrain starts no Ray workers itself",
            fix="call `ptrain.train` in the function that you give to Ray Train; its workers are recognised",
        )
    if arguments.launcher not in ("", "deepspeed", *BACKENDS):
        raise LaunchError(f"--launcher {arguments.launcher}: unknown", expected=", ".join(BACKENDS))
    if (arguments.num_nodes or arguments.workers) and (arguments.include or arguments.exclude):
        raise LaunchError(
            "--workers (--num_gpus) and --num_nodes exclude --include and --exclude",
            fix="give the one or the other",
        )


def _as_worker(arguments: Arguments, topology: Topology) -> Plan:
    given = arguments.given()
    if given:
        raise LaunchError(
            f"{', '.join(given)}: this process is already worker {topology.rank} of {topology.world}, "
            f"started by {topology.origin if topology.origin != 'environment' else 'another launcher'}",
            fix="give the number of workers to that launcher alone",
        )
    return Plan(topology=topology, workers=1, arguments=arguments)


def _hosts(arguments: Arguments, environ: Mapping[str, str]) -> Hosts:
    """The hosts and slots that are chosen from the hostfile, or from this machine."""
    path = arguments.hostfile or (DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None)
    known = read_hostfile(path) if path else {"localhost": _slots_here(arguments, environ)}
    chosen = choose(known, arguments.include, arguments.exclude)
    if arguments.num_nodes and arguments.num_nodes > len(chosen):
        raise LaunchError(
            f"--num_nodes {arguments.num_nodes}: there is only {', '.join(chosen)}",
            fix=f"add hosts to {path}" if path else "name the others in a file and give it with --hostfile",
        )
    chosen = dict(list(chosen.items())[: arguments.num_nodes])
    if path and arguments.workers:
        for host, slots in chosen.items():
            if arguments.workers > len(slots):
                raise LaunchError(f"--workers {arguments.workers}: {host} has {len(slots)} slots in {path}")
        chosen = {host: slots[: arguments.workers] for host, slots in chosen.items()}
    return chosen


def _slots_here(arguments: Arguments, environ: Mapping[str, str]) -> list[int]:
    """The slots of this machine: its accelerators, or as many CPU workers as are asked for."""
    found = accelerators(environ)
    if not found:
        named = [slot for text in (arguments.include, arguments.exclude) if text for slot in _all_slots(text)]
        return list(range(max([arguments.workers or 1, *(slot + 1 for slot in named)])))
    visible = visible_devices(environ.get("CUDA_VISIBLE_DEVICES", ""))
    slots = [int(entry) for entry in visible] if visible and all(e.isdigit() for e in visible) else list(range(found))
    # Too many workers for these are refused later; here they must not be cut off silently.
    return slots[: arguments.workers] if (arguments.workers or 0) <= found else list(range(arguments.workers or 0))


def _all_slots(text: str) -> list[int]:
    return [slot for slots in parse_filter("--include", text).values() for slot in slots]


def _here(arguments: Arguments, slots: list[int], environ: Mapping[str, str]) -> Plan:
    """Workers on this machine, under ptrain's own supervisor."""
    only = [option for option in arguments.given() if option in ("--no_ssh", "--node_rank", "--venv_script")]
    if only:
        raise LaunchError(
            f"{', '.join(only)}: only for several hosts, and there is one",
            fix="give --hostfile with all of them",
        )
    found = accelerators(environ)
    if found and len(slots) > found:
        raise LaunchError(
            f"{len(slots)} workers: {found} accelerator{'s are' if found > 1 else ' is'} visible here",
            expected=f"1 to {found} (one worker each)",
        )
    if arguments.master_port is not None:
        _check_port(arguments.master_port)
    bound = arguments.bind_cores_to_rank or bool(arguments.bind_core_list)
    chosen = arguments.include or arguments.exclude or arguments.workers
    return Plan(
        workers=len(slots),
        devices=_devices(slots, environ) if chosen and found else None,
        port=arguments.master_port,
        cores=share(arguments.bind_core_list, len(slots)) if bound else (),
        arguments=arguments,
    )


def _devices(slots: list[int], environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES for these slots; those that were named by UUID stay so."""
    visible = visible_devices(environ.get("CUDA_VISIBLE_DEVICES", ""))
    by_name = bool(visible) and not all(entry.isdigit() for entry in visible)
    return ",".join(visible[slot] if by_name else str(slot) for slot in slots)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"--master_port {port} can't be used: {error.strerror}",
                fix="give another one, or leave it out: a free port is chosen then",
            ) from None


def _on_hosts(arguments: Arguments, hosts: Hosts) -> Plan:
    """Workers on several hosts (or on one that is not this one), under DeepSpeed's launcher."""
    if arguments.no_ssh:
        _check_no_ssh(arguments, hosts)
    else:
        if arguments.node_rank is not None:
            raise LaunchError("--node_rank is only for --no_ssh", fix="leave it out")
        backend = arguments.launcher if arguments.launcher not in ("", "deepspeed") else "pdsh"
        if shutil.which(BACKENDS[backend]) is None:
            raise LaunchError(
                f"--launcher {backend} needs the program `{BACKENDS[backend]}`, which is not installed here",
                fix="install it, choose another --launcher, or start ptrain on every host with --no_ssh",
            )
    try:
        shlex.split(arguments.launcher_args)
    except ValueError as error:
        raise LaunchError(f"--launcher_args {arguments.launcher_args!r}: {error}") from None
    return Plan(workers=max(map(len, hosts.values())), port=arguments.master_port, hosts=hosts, arguments=arguments)


def _check_no_ssh(arguments: Arguments, hosts: Hosts) -> None:
    count = len(hosts)
    if arguments.node_rank is None or arguments.node_rank >= count:
        found = "is missing" if arguments.node_rank is None else f"is {arguments.node_rank}"
        raise LaunchError(
            f"--no_ssh: --node_rank {found}",
            expected=f"0 to {count - 1}: the place of this host among {', '.join(hosts)}",
        )
    if not arguments.master_addr:
        raise LaunchError("--no_ssh: --master_addr is missing", expected=f"the address of {next(iter(hosts))}")
    if arguments.master_port is None:
        raise LaunchError("--no_ssh: --master_port is missing", expected="the same free port on every host")
    if arguments.node_rank == 0:
        _check_port(arguments.master_port)
