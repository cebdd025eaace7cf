"""Slurm's short forms, and when a process is one of its tasks."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptrain.launch import slurm

pytestmark = pytest.mark.torch_free

NAME = st.from_regex(r"[a-z][a-z0-9.-]{0,6}[a-z]", fullmatch=True)


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("node[9-11]", ["node9", "node10", "node11"]),
        ("node[098-101]", ["node098", "node099", "node100", "node101"]),
        ("a1,b[2,4]", ["a1", "b2", "b4"]),
        ("rack[1-2]n[0-1]", ["rack1n0", "rack1n1", "rack2n0", "rack2n1"]),
        ("gpu[1-2].cluster.org,login", ["gpu1.cluster.org", "gpu2.cluster.org", "login"]),
        ("n[5]", ["n5"]),
    ],
)
def test_expand(short: str, hosts: list[str]) -> None:
    assert slurm.expand(short) == hosts


@pytest.mark.parametrize(
    "wrong", ["", ",", "a,", "a,,b", "n[", "n]", "n[]", "n[a-b]", "n[3-1]", "n[1-2-3]", "a b", "n[[1]]"]
)
def test_expand_refuses(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"no list of"):
        slurm.expand(wrong)


@given(st.lists(NAME, min_size=1, max_size=5))
def test_plain_names_stay(names: list[str]) -> None:
    assert slurm.expand(",".join(names)) == names


@given(
    NAME,
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12)), min_size=1, max_size=4),
)
def test_ranges_are_all_numbers_between_in_the_width_of_the_first(
    name: str, width: int, ranges: list[tuple[int, int]]
) -> None:
    written = ",".join(f"{low:0{width}}-{low + more:0{width}}" for low, more in ranges)
    expected = [
        f"{name}{number:0{max(width, len(str(low)))}}" for low, more in ranges for number in range(low, low + more + 1)
    ]
    assert slurm.expand(f"{name}[{written}]") == expected


@given(st.text(alphabet="ab01[]-, ", max_size=12))
def test_any_text_is_expanded_or_refused(text: str) -> None:
    try:
        hosts = slurm.expand(text)
    except ValueError:
        return
    assert hosts and all(re.fullmatch(r"[ab01-]+", host) for host in hosts)


@pytest.mark.parametrize(
    ("environ", "nodes", "tasks"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 3, [4, 4, 3]),
        ({"SLURM_TASKS_PER_NODE": "8"}, 1, [8]),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 2, [8, 8]),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_TASKS_PER_NODE": "8"}, 1, [1]),
        ({}, 2, None),
    ],
)
def test_tasks_per_node(environ: dict[str, str], nodes: int, tasks: list[int] | None) -> None:
    assert slurm.tasks_per_node(environ, nodes) == tasks


@pytest.mark.parametrize("environ", [{"SLURM_TASKS_PER_NODE": "4(x2"}, {"SLURM_TASKS_PER_NODE": "4,4,4"}])
def test_tasks_per_node_refuses(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="SLURM_TASKS_PER_NODE"):
        slurm.tasks_per_node(environ, 2)


TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "is_task"),
    [
        (TASK, True),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "4", "ENVIRONMENT": "BATCH"}, True),
        ({**TASK, "ENVIRONMENT": "BATCH"}, False),  # the batch script itself
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, False),  # `srun --ntasks 1` in a larger job
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, False),  # a shell of `salloc`
        ({}, False),
    ],
)
def test_what_is_a_task(environ: dict[str, str], is_task: bool) -> None:
    assert slurm.is_task(environ) is is_task


def test_the_port_depends_on_job_and_step() -> None:
    steps = [{"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": str(step)} for step in range(3)]
    ports = [slurm.port(environ) for environ in steps]
    assert len(set(ports)) == 3
    assert all(port in slurm.PORTS for port in [*ports, slurm.port({})])
