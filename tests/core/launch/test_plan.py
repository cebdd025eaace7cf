"""Where the workers run, decided before anything starts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ptrain.launch import plan
from ptrain.launch.environment import LaunchError
from ptrain.launch.plan import Arguments, Plan, make_plan

pytestmark = pytest.mark.torch_free

CPU: dict[str, str] = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, less what CUDA_VISIBLE_DEVICES hides."""

    def count(environ: dict[str, str]) -> int:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        return 4 if visible is None else len([word for word in visible.split(",") if word])

    monkeypatch.setattr(plan, "accelerators", count)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """A hostfile with two hosts of four and two slots."""
    path = tmp_path / "hosts"
    path.write_text("worker-0 slots=4\nworker-1 slots=2\n")
    return path


def refusal(arguments: Arguments, environ: dict[str, str] = CPU) -> str:
    """Why these arguments are refused."""
    with pytest.raises(LaunchError) as caught:
        make_plan(arguments, environ)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_cpu_means_one_worker() -> None:
    made = make_plan(Arguments(), CPU)
    assert made == Plan(workers=1) and made.world == 1


def test_any_number_of_workers_on_cpu() -> None:
    assert make_plan(Arguments(workers=3), CPU).workers == 3
    assert make_plan(Arguments(include="localhost:0,1"), CPU).workers == 2
    assert make_plan(Arguments(include="localhost:0,1"), CPU).devices is None


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("arguments", "visible", "workers", "devices"),
    [
        (Arguments(), None, 4, None),
        (Arguments(workers=2), None, 2, "0,1"),
        (Arguments(include="localhost:0,3"), None, 2, "0,3"),
        (Arguments(exclude="localhost:1"), None, 3, "0,2,3"),
        (Arguments(), "2,3", 2, None),
        (Arguments(workers=1), "2,3", 1, "2"),
        (Arguments(include="localhost:3"), "2,3", 1, "3"),
        (Arguments(workers=1), "GPU-a,GPU-b", 1, "GPU-a"),
        (Arguments(include="localhost:1"), "GPU-a,GPU-b", 1, "GPU-b"),
    ],
)
def test_gpus(arguments: Arguments, visible: str | None, workers: int, devices: str | None) -> None:
    made = make_plan(arguments, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert (made.workers, made.devices) == (workers, devices)


@pytest.mark.usefixtures("gpus")
def test_gpus_that_are_not_there() -> None:
    assert "5 workers: 4 accelerators are visible here" in refusal(Arguments(workers=5), {})
    assert "localhost has no slot 4" in refusal(Arguments(include="localhost:4"), {})
    assert "localhost has no slot 0" in refusal(Arguments(include="localhost:0"), {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert "2 workers: 1 accelerator is visible" in refusal(Arguments(workers=2), {"CUDA_VISIBLE_DEVICES": "2"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments(workers=0), "--workers 0: that can't be"),
        (Arguments(num_nodes=0), "--num_nodes 0"),
        (Arguments(master_port=0), "--master_port 0"),
        (Arguments(master_port=65536), "--master_port 65536"),
        (Arguments(ssh_port=-1), "--ssh_port -1"),
        (Arguments(workers=2, include="localhost"), "exclude --include and --exclude"),
        (Arguments(include="localhost", exclude="localhost:0"), "exclude each other"),
        (Arguments(num_nodes=2), "--num_nodes 2: there is only localhost"),
        (Arguments(launcher="ray"), "ptrain starts no Ray workers itself"),
        (Arguments(launcher="pdhs"), "--launcher pdhs: unknown"),
        (Arguments(hostfile=Path("/not/there")), "the hostfile /not/there can't be read: No such file"),
        (Arguments(no_ssh=True), "--no_ssh: only for several hosts"),
        (Arguments(node_rank=0), "--node_rank: only for several hosts"),
        (Arguments(bind_core_list="1-"), "'1-' is no core"),
        (Arguments(bind_core_list="100000"), "not all of them are usable"),
        (Arguments(workers=100000, bind_cores_to_rank=True), "too few for 100000 workers"),
    ],
)
def test_refused(arguments: Arguments, message: str) -> None:
    assert message in refusal(arguments)


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--master_port {port} can't be used: Address already in use" in refusal(Arguments(master_port=port))
    assert make_plan(Arguments(master_port=port), CPU).port == port


def test_cores_are_shared_out() -> None:
    usable = sorted(os.sched_getaffinity(0))
    made = make_plan(Arguments(workers=len(usable), bind_cores_to_rank=True), CPU)
    assert made.cores == tuple((core,) for core in usable)
    made = make_plan(Arguments(workers=1, bind_core_list=str(usable[0])), CPU)
    assert made.cores == ((usable[0],),)


WORKER = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_a_worker_of_another_launcher() -> None:
    made = make_plan(Arguments(), WORKER)
    assert made.topology.is_worker and made.world == 2
    torchrun = {**WORKER, "TORCHELASTIC_RUN_ID": "x"}
    message = refusal(Arguments(workers=2, include="a"[:0], bind_cores_to_rank=True), torchrun)
    assert "--workers, --bind_cores_to_rank: this process is already worker 1 of 2, started by torchrun" in message


def test_several_hosts(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.shutil, "which", lambda program: f"/bin/{program}")
    made = make_plan(Arguments(hostfile=hosts), CPU)
    assert made.hosts == {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1]} and made.world == 6
    assert make_plan(Arguments(hostfile=hosts, workers=2), CPU).hosts == {
        "worker-0": [0, 1],
        "worker-1": [0, 1],
    }
    assert make_plan(Arguments(hostfile=hosts, num_nodes=1), CPU).hosts == {"worker-0": [0, 1, 2, 3]}
    assert make_plan(Arguments(hostfile=hosts, include="worker-1:1"), CPU).hosts == {"worker-1": [1]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workers": 3}, "--workers 3: worker-1 has 2 slots"),
        ({"num_nodes": 3}, "--num_nodes 3: there is only worker-0, worker-1"),
        ({"node_rank": 1}, "--node_rank is only for --no_ssh"),
        ({"launcher_args": "'"}, "--launcher_args"),
        ({"no_ssh": True}, "--node_rank is missing"),
        ({"no_ssh": True, "node_rank": 2}, "--node_rank is 2"),
        ({"no_ssh": True, "node_rank": 1}, "--master_addr is missing"),
        ({"no_ssh": True, "node_rank": 1, "master_addr": "a"}, "--master_port is missing"),
    ],
)
def test_refused_for_several_hosts(
    hosts: Path, more: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.shutil, "which", lambda program: f"/bin/{program}")
    assert message in refusal(Arguments(hostfile=hosts, **more))  # type: ignore[arg-type]


def test_a_launcher_that_is_not_installed(hosts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "--launcher pdsh needs the program `pdsh`" in refusal(Arguments(hostfile=hosts))
    assert "--launcher slurm needs the program `srun`" in refusal(Arguments(hostfile=hosts, launcher="slurm"))


def test_a_hostfile_with_this_machine_alone(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("localhost slots=2\n")
    made = make_plan(Arguments(hostfile=path), CPU)
    assert (made.hosts, made.workers) == ({}, 2)
