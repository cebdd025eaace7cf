"""What Slurm's environment variables say."""

from __future__ import annotations

import re
from collections.abc import Mapping

TASK_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID")
PORTS = range(20000, 30000)
"""Below the range from which systems hand out ports on their own."""


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` started.

    A batch script has the variables of a task as well, but only `srun` sets those of a step; and a lone task
    is no worker: it may start several itself.
    """
    if not all(name in environ for name in TASK_VARIABLES):
        return False
    if "SLURM_STEP_NUM_TASKS" not in environ and environ.get("ENVIRONMENT") == "BATCH":
        return False
    return environ.get(world_variable(environ), "1") != "1"


def world_variable(environ: Mapping[str, str]) -> str:
    """The name of the variable with the number of tasks: of this step, where it is known."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def node_list(environ: Mapping[str, str]) -> str:
    """The nodes of this step (or job) in Slurm's short form, e.g. `node[01-03,07]`."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return environ[name]
    raise ValueError("SLURM_JOB_NODELIST is missing")


def tasks_per_node(environ: Mapping[str, str], nodes: int) -> list[int] | None:
    """The number of tasks on each node, from Slurm's short form (`4(x2),3`); None where it is not given."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    name = next((name for name in names if environ.get(name)), None)
    if name is None:
        return None
    counts: list[int] = []
    for word in environ[name].split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", word)
        if match is None:
            raise ValueError(f"{name} is {environ[name]!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    if name == "SLURM_NTASKS_PER_NODE":
        counts *= nodes
    if len(counts) != nodes:
        raise ValueError(f"{name} is {environ[name]!r}, which is for {len(counts)} nodes instead of {nodes}")
    return counts


def port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on and other steps are unlikely to use."""
    digits = [re.sub(r"\D", "", environ.get(name, "")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return PORTS[sum(int(word or 0) for word in digits) % len(PORTS)]


def expand(hosts: str) -> list[str]:
    """The host names that Slurm's short form stands for.

    >>> expand("node[01-03,07],login")
    ['node01', 'node02', 'node03', 'node07', 'login']

    Raises:
        ValueError: it is not of that form.
    """
    words = re.findall(r"(?:[^\[\],\s]|\[[^\[\]]*\])+", hosts)
    if not words or ",".join(words) != hosts:
        raise ValueError(f"{hosts!r} is no list of nodes such as `node[01-03,07]`")
    return [name for word in words for name in _expand_word(word)]


def _expand_word(word: str) -> list[str]:
    names = [""]
    for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", word):
        endings = [literal] if literal else _expand_ranges(ranges, word)
        names = [name + ending for name in names for ending in endings]
    return names


def _expand_ranges(ranges: str, word: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"`[{ranges}]` in {word!r} is no list of numbers such as `[01-03,07]`")
        low, high = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers
