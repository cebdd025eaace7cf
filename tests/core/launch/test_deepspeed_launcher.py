"""Several hosts: the command for DeepSpeed's launcher, and that launcher at work on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptrain.launch.deepspeed_launcher import carried, command
from ptrain.launch.plan import Arguments, Plan

WORKER = ["ptrain.launch.worker", "run.json"]


def words(**given: object) -> list[str]:
    """The launcher's own arguments in the command for two hosts."""
    hosts = {"a": [0, 1], "b": [0]}
    made = command(Plan(hosts=hosts, arguments=Arguments(**given)), WORKER)  # type: ignore[arg-type]
    assert made[:3] == [sys.executable, "-m", "ptrain.launch.deepspeed_launcher"]
    assert made[-4:] == ["--module", "--no_local_rank", *WORKER]
    return made[3:-4]


QUIET = ["--log_level", "warning"]


@pytest.mark.torch_free
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, []),
        ({"hostfile": Path("hosts"), "workers": 2}, ["--hostfile=hosts", "--num_gpus=2"]),
        ({"num_nodes": 2, "launcher": "slurm"}, ["--num_nodes=2", "--launcher=slurm"]),
        ({"launcher": "deepspeed", "launcher_args": "-x y"}, ["--launcher_args=-x y"]),
        ({"include": "a:0@b"}, ["--include=a:0@b"]),
        ({"exclude": "a:0", "ssh_port": 2222}, ["--exclude=a:0", "--ssh_port=2222"]),
        (
            {"no_ssh": True, "node_rank": 0, "master_addr": "a", "master_port": 1234},
            ["--master_addr=a", "--master_port=1234", "--node_rank=0", "--no_ssh"],
        ),
        (
            {"bind_cores_to_rank": True, "bind_core_list": "0-3"},
            ["--bind_core_list=0-3", "--bind_cores_to_rank"],
        ),
        (
            {"venv_script": Path("activate"), "no_ssh_check": True},
            ["--venv_script=activate", "--no_ssh_check"],
        ),
    ],
)
def test_the_command(given: dict[str, object], expected: list[str]) -> None:
    assert words(**given) == [*QUIET, *expected]


@pytest.mark.torch_free
def test_one_host_elsewhere_is_still_another_host() -> None:
    made = command(Plan(hosts={"a": [0]}, arguments=Arguments(include="a")), WORKER)
    assert "--force_multi" in made


@pytest.mark.torch_free
def test_secrets_are_not_carried() -> None:
    environ = {"WANDB_MODE": "offline", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "HF_HOME": "h", "PATH": "p"}
    assert carried(environ) == ["WANDB_MODE", "HF_HOME"]


def test_deepspeed_accepts_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    arguments = Arguments(
        workers=2, num_nodes=2, hostfile=Path("hosts"), include="a", exclude="b", master_addr="a", master_port=1,
        launcher="slurm", launcher_args="-x", no_ssh=True, no_ssh_check=True, node_rank=0, ssh_port=22,
        venv_script=Path("v"), bind_cores_to_rank=True, bind_core_list="0",
    )  # fmt: skip
    made = command(Plan(hosts={"a": [0, 1], "b": [0]}, arguments=arguments), WORKER)
    parsed = runner.parse_args(made[3:])
    assert (parsed.user_script, parsed.user_args) == (WORKER[0], WORKER[1:])
    assert (parsed.num_gpus, parsed.launcher_args, parsed.module) == (2, "-x", True)
    assert len(arguments.given()) == len(vars(arguments)), "an argument is missing in this test"
