"""`ptrain run` as a worker of torchrun and of Slurm, and on several hosts under DeepSpeed's launcher."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FAULT = """
import ptrain

@ptrain.hookimpl(wrapper=True)
def step(run, batches):
    if run.progress.step == 1 and run.rank == 1:
        raise ValueError("on purpose")
    return (yield)
"""


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def together(recipe: Path, environ: dict[str, str]) -> Callable[..., list[tuple[int, str, str]]]:
    """Runs several commands at the same time: exit code, stdout and stderr of each."""

    def run(*commands: tuple[list[str], dict[str, str]]) -> list[tuple[int, str, str]]:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=recipe.parent,
                env={**environ, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command, env in commands
        ]
        outcomes = []
        for process in processes:
            out, err = process.communicate(timeout=300)
            outcomes.append((process.returncode, out, err))
        return outcomes

    return run


Together = Callable[..., list[tuple[int, str, str]]]
RUN = ["ptrain_cli", "run", "tiny.yaml"]
AGAIN = ["-o", "output_dir=runs/tiny/latest"]


def steps(folder: Path) -> int:
    """How many steps the run recorded."""
    return len((folder / "runs" / "tiny" / "latest" / "metrics.jsonl").read_text().splitlines())


def slurm(rank: int, job: int) -> dict[str, str]:
    """What Slurm tells one of two tasks on this machine."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": str(job),
    }  # fmt: skip


def test_torchrun(together: Together, recipe: Path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *RUN]
    [(code, out, err)] = together((torchrun, {}))
    assert code == 0, err
    assert "2 workers" in out and steps(recipe.parent) == 3
    [(code, _, err)] = together(([*torchrun, *AGAIN], {}))
    assert code != 0
    assert err.count("error: ") == 1 and "is not empty" in err  # said once, by the one that prepares


def test_slurm(together: Together, recipe: Path) -> None:
    job = free_port()
    outcomes = together((RUN, slurm(1, job)), (RUN, slurm(0, job)))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert steps(recipe.parent) == 3
    again = together(([*RUN, *AGAIN], slurm(0, job + 1)), ([*RUN, *AGAIN], slurm(1, job + 1)))
    assert [code for code, _, _ in again] == [2, 2]
    assert "is not empty" in again[0][2] and again[1][2] == ""


def test_workers_of_others_take_no_launcher_arguments(together: Together) -> None:
    [(code, _, err)] = together(([*RUN, "--workers", "2"], slurm(0, 1)))
    assert code == 2 and "--workers: this process is already worker 0 of 2, started by slurm" in err


def test_a_failing_worker_under_torchrun(together: Together, recipe: Path) -> None:
    """The last error that is shown before torchrun's own report is the cause."""
    (recipe.parent / "fault.py").write_text(FAULT)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *RUN, "--code", "fault.py"]
    [(code, _, err)] = together(([*torchrun, *AGAIN], {}))
    assert code != 0
    shown = [line for line in err.splitlines() if line.startswith("error: ")]
    assert shown and all(line.startswith("error: rank 1: ") and "on purpose" in line for line in shown)


def two_hosts(recipe: Path, *more: str) -> list[tuple[list[str], dict[str, str]]]:
    """The commands on two hosts, both of which are this machine."""
    (recipe.parent / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = str(free_port())
    common = ["--hostfile", "hosts", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, *more]
    return [([*RUN, *common, "--node_rank", str(rank)], {}) for rank in range(2)]


def test_two_hosts(together: Together, recipe: Path) -> None:
    outcomes = together(*two_hosts(recipe))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "2 workers" in outcomes[0][1] and steps(recipe.parent) == 3


def test_a_failing_worker_on_the_second_host(together: Together, recipe: Path) -> None:
    (recipe.parent / "fault.py").write_text(FAULT)
    outcomes = together(*two_hosts(recipe, "--code", "fault.py"))
    assert all(code not in (0, 75) for code, _, _ in outcomes)
    last = [[line for line in err.splitlines() if line.startswith("error: ")][-1] for _, _, err in outcomes]
    assert all("rank 1: " in line and "on purpose" in line for line in last)


def test_two_hosts_agree_on_what_is_wrong(together: Together, recipe: Path) -> None:
    outcomes = together(*two_hosts(recipe, "-o", "data.sources=[{type: jsonl, path: missing.jsonl}]"))
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "missing.jsonl" in outcomes[0][2] and outcomes[1][2] == ""
