"""`ptrain run`: train."""

from __future__ import annotations

import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ptrain_cli.options import AllowCode, Code, Debug, Overrides, Recipe, Settings

EXAMPLES = """[bold]Examples[/bold]

[dim]$[/dim] ptrain run recipe.yaml

[dim]$[/dim] ptrain run recipe.yaml -o optimizer.lr=2e-5 -o 'data.sources=\\[my.jsonl]'

[dim]$[/dim] ptrain run recipe.yaml --workers 2 --resume

[dim]$[/dim] ptrain run recipe.yaml --hostfile hosts --include worker-0@worker-1:0,2

[dim]$[/dim] srun ptrain run recipe.yaml

[dim]$[/dim] torchrun --nproc-per-node 8 -m ptrain_cli run recipe.yaml
"""
LAUNCHER = "Where the workers run"


class Profile(str, Enum):
    """How Python's profile is sorted."""

    tottime = "tottime"
    cumtime = "cumtime"
    disable = "disable"


def command(
    recipe: Recipe,
    override: Overrides = None,
    code: Code = None,
    allow_code: AllowCode = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run directory.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; an earlier run directory is renamed.")
    ] = False,
    python_profile: Annotated[
        Profile, typer.Option("--python_profile", help="Profile local rank 0 and print it at the end, sorted so.")
    ] = Profile.disable,
    debug: Debug = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", "-n", "--num_gpus", "--num_accelerators", metavar="N", rich_help_panel=LAUNCHER,
            help="Workers on each host; by default one for each accelerator, or one on CPU.",
        ),
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option("--num_nodes", metavar="N", rich_help_panel=LAUNCHER, help="Use the first N hosts.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            "--hostfile", "-H", metavar="FILE", rich_help_panel=LAUNCHER,
            help="The hosts, in lines such as `worker-0 slots=8`.",
        ),
    ] = None,
    include: Annotated[
        str,
        typer.Option(
            "--include", "-i", metavar="SPEC", rich_help_panel=LAUNCHER,
            help="Use only these hosts and slots, e.g. `worker-0@worker-1:0,2` or `localhost:0,1`.",
        ),
    ] = "",
    exclude: Annotated[
        str,
        typer.Option(
            "--exclude", "-e", metavar="SPEC", rich_help_panel=LAUNCHER, help="Leave these hosts and slots out."
        ),
    ] = "",
    master_addr: Annotated[
        str, typer.Option("--master_addr", metavar="ADDRESS", rich_help_panel=LAUNCHER, help="The address of rank 0.")
    ] = "",
    master_port: Annotated[
        int | None,
        typer.Option(
            "--master_port", metavar="PORT", rich_help_panel=LAUNCHER,
            help="The port of rank 0; by default a free one on one host, and 29500 on several.",
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            "--launcher", metavar="NAME", rich_help_panel=LAUNCHER,
            help="How DeepSpeed reaches the hosts: pdsh (the default), openmpi, mpich, impi, mvapich, slurm.",
        ),
    ] = "",
    launcher_args: Annotated[
        str,
        typer.Option("--launcher_args", metavar="ARGS", rich_help_panel=LAUNCHER, help="Arguments for that program."),
    ] = "",
    no_ssh: Annotated[
        bool,
        typer.Option(
            "--no_ssh", rich_help_panel=LAUNCHER,
            help="Start the workers of this host alone; the same command runs on every host.",
        ),
    ] = False,
    node_rank: Annotated[
        int | None,
        typer.Option(
            "--node_rank", metavar="N", rich_help_panel=LAUNCHER,
            help="With --no_ssh: the place of this host in the hostfile, from 0.",
        ),
    ] = None,
    no_ssh_check: Annotated[
        bool, typer.Option("--no_ssh_check", rich_help_panel=LAUNCHER, help="Don't try ssh first.")
    ] = False,
    ssh_port: Annotated[
        int | None, typer.Option("--ssh_port", metavar="PORT", rich_help_panel=LAUNCHER, help="The port of ssh.")
    ] = None,
    venv_script: Annotated[
        Path | None,
        typer.Option(
            "--venv_script", metavar="FILE", rich_help_panel=LAUNCHER,
            help="Sourced on each host first, to activate its environment.",
        ),
    ] = None,
    bind_cores_to_rank: Annotated[
        bool,
        typer.Option(
            "--bind_cores_to_rank", rich_help_panel=LAUNCHER, help="Give each worker CPU cores of its own."
        ),
    ] = False,
    bind_core_list: Annotated[
        str,
        typer.Option(
            "--bind_core_list", metavar="CORES", rich_help_panel=LAUNCHER, help="Bind to these cores, e.g. `0,2-5`."
        ),
    ] = "",
) -> int:  # fmt: skip
    """Train what a recipe says."""
    from ptrain.garbage import look_seldom

    look_seldom()
    from ptrain.job import prepare_run
    from ptrain.launch.plan import Arguments, make_plan
    from ptrain.launch.report import show_warnings
    from ptrain.launch.start import start
    from ptrain.launch.together import prepare_together
    from ptrain.launch.worker import leave
    from ptrain.recipe.load import load_recipe

    arguments = Arguments(
        workers=workers,
        num_nodes=num_nodes,
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        master_addr=master_addr,
        master_port=master_port,
        launcher=launcher,
        launcher_args=launcher_args,
        no_ssh=no_ssh,
        no_ssh_check=no_ssh_check,
        node_rank=node_rank,
        ssh_port=ssh_port,
        venv_script=venv_script,
        bind_cores_to_rank=bind_cores_to_rank,
        bind_core_list=bind_core_list,
    )
    show_warnings()
    loaded = load_recipe(recipe, override or [], code=code, allow_code=allow_code)
    plan = make_plan(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    typed = ["ptrain", *sys.argv[1:]]
    spec = prepare_together(
        plan.meeting,
        lambda: prepare_run(loaded, recipe, resume=resume, restart=restart, command=typed, workers=plan.world),
    )
    leave(start(plan, spec, loaded.recipe.logger, debug=Settings.debug, python_profile=python_profile.value))


def _terminated(number: int, _frame: object) -> None:
    """End the preparation by an exception, so that what it began is cleaned up."""
    raise SystemExit(128 + number)
