"""What the environment says of this process, and what this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptrain.launch import environment
from ptrain.launch.environment import LaunchError, Topology, accelerators, visible_devices

pytestmark = pytest.mark.torch_free

WORKER = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "42",
    "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip


def test_no_launcher_means_a_single_process() -> None:
    place = Topology.from_environment({"PATH": "/bin"})
    assert place == Topology() and not place.is_worker
    assert (place.rank, place.world, place.local_rank, place.local_world) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("more", "local_world", "origin"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 2, "torchrun"),
        ({"LOCAL_SIZE": "2", "CROSS_RANK": "1"}, 2, "environment"),
        ({"LOCAL_WORLD_SIZE": "2", "RAY_JOB_ID": "01000000"}, 2, "ray"),
        ({}, 4, "environment"),
        ({**SLURM, "LOCAL_WORLD_SIZE": "2"}, 2, "environment"),  # explicit variables win
    ],
)
def test_workers_of_launchers(more: dict[str, str], local_world: int, origin: str) -> None:
    assert Topology.from_environment({**WORKER, **more}) == Topology(3, 4, 1, local_world, "10.0.0.1", 29501, origin)


def test_a_topology_survives_its_environment() -> None:
    place = Topology(3, 4, 1, 2, "10.0.0.1", 29501, "environment")
    assert Topology.from_environment(place.environment()) == place


def test_a_lone_worker_needs_no_address() -> None:
    place = Topology.from_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert place.is_worker and place.world == 1


def test_slurm() -> None:
    place = Topology.from_environment(SLURM)
    assert place == Topology(5, 8, 1, 4, "gpu07", 20042, "slurm")
    chosen = Topology.from_environment({**SLURM, "MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "1234"})
    assert (chosen.master_addr, chosen.master_port) == ("ib-gpu07", 1234)


def test_slurm_prefers_the_step_to_the_job() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_NODELIST": "gpu[08,10]",
        "SLURM_STEP_TASKS_PER_NODE": "4,2",
    }
    place = Topology.from_environment({**SLURM, **step})
    assert (place.world, place.local_world, place.master_addr) == (6, 2, "gpu08")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "the environment has RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "but not LOCAL_RANK"),
        ({**WORKER, "WORLD_SIZE": "3"}, "says rank 3, but a world size of 3"),
        (
            {**WORKER, "LOCAL_WORLD_SIZE": "1"},
            "says local rank 1, but a number of workers on this machine of 1",
        ),
        ({**WORKER, "RANK": "one"}, "the environment variable RANK is 'one'"),
        ({**WORKER, "RANK": "-1"}, "the environment variable RANK is '-1'"),
        ({**WORKER, "MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({**WORKER, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        (
            {**SLURM, "SLURM_JOB_NODELIST": "gpu[07-"},
            "Slurm's environment can't be read: 'gpu[07-' is no list",
        ),
        ({**SLURM, "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is missing"),
        ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2, but gpu[07-08] names 2 nodes"),
        ({**SLURM, "SLURM_PROCID": "8"}, "says rank 8, but a world size of 8"),
    ],
)
def test_what_contradicts_itself_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        Topology.from_environment(environ)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device folder with two GPUs, and a torch that could use them."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "2.13.0+cu130")
    return tmp_path


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b,MIG-c"}, 3),
        ({"DS_ACCELERATOR": "cpu"}, 0),
    ],
)
def test_accelerators(two_gpus: Path, environ: dict[str, str], count: int) -> None:
    assert accelerators(environ, devices=two_gpus) == count


def test_a_torch_without_cuda_sees_none(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert accelerators({}, devices=two_gpus) == 0


def test_no_device_no_accelerator(tmp_path: Path) -> None:
    assert accelerators({"CUDA_VISIBLE_DEVICES": "0"}, devices=tmp_path) == 0


def test_visible_devices_in_order() -> None:
    assert visible_devices(" 3, GPU-abc ,1,,2") == ["3", "GPU-abc", "1"]
