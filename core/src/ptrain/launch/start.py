"""Start the workers of a prepared run where its plan says, and wait for their end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ptrain.launch import deepspeed_launcher, guard
from ptrain.launch.failure import Failure, clear, first, read
from ptrain.launch.output import Output
from ptrain.launch.plan import Plan
from ptrain.launch.report import show_failure
from ptrain.launch.signals import listening
from ptrain.launch.supervisor import Job, supervise
from ptrain.launch.worker import SETTLE, recorded, train
from ptrain.recipe.env import value_of

if TYPE_CHECKING:
    from ptrain.recipe.sections import LoggerConfig

WORKER = "ptrain.launch.worker"


def start(plan: Plan, spec: Path, logger: LoggerConfig, *, debug: bool = False, python_profile: str = "disable") -> int:
    """Train as planned and return the exit code: 0 done, 75 stopped on request and saved, else failed.

    A failure has been shown when this returns. One worker trains in this process.

    Args:
        spec: the file in the run directory that `ptrain.job.prepare_run` left for the workers.
        logger: that section of the recipe.
        debug: show tracebacks.
        python_profile: profile local rank 0 and print the result sorted by "tottime" or "cumtime".
    """
    error_dir = spec.parent / "errors"
    if plan.topology.is_worker or (plan.workers == 1 and not plan.hosts):
        return _here(plan, spec, error_dir, debug, python_profile)
    folder = value_of(logger.output_dir, "logger.output_dir") or spec.parent / "logs"
    output = Output(folder, logger.print_output_ranks, logger.file_output_ranks)
    arguments = [str(spec.absolute()), "--python_profile", python_profile]
    if plan.hosts:
        command = deepspeed_launcher.command(plan, [WORKER, *arguments, "--traceback"])
        launcher = "DeepSpeed's launcher"
    else:
        command, launcher = [sys.executable, "-m", WORKER, *arguments], ""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if plan.arguments.no_ssh:
        # `prepare_together` serves the store at that port already; the workers are to use it.
        env["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if plan.devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = plan.devices
    return supervise(
        Job(
            command=command,
            workers=1 if launcher else plan.workers,
            output=output,
            error_dir=error_dir,
            env=env,
            port=plan.port,
            cores=plan.cores,
            debug=debug,
            launcher=launcher,
        )
    )


def _here(plan: Plan, spec: Path, error_dir: Path, debug: bool, python_profile: str) -> int:
    """Train in this process: the only worker, or one that another launcher started."""
    if plan.devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = plan.devices
    if plan.port is not None:
        os.environ["MASTER_PORT"] = str(plan.port)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores[0])
    if plan.topology.is_worker:
        os.environ.update(plan.topology.environment())
    if plan.topology.origin == "torchrun":
        guard.die_with_parent()  # its agent doesn't see to that
    several = plan.topology.world > 1
    clear(error_dir, plan.topology.rank)

    def show(failure: Failure) -> None:
        if failure.lost_peer:
            time.sleep(1)  # the one that failed first is writing down why
            failure = first([failure, *read(error_dir)])
        path = error_dir / f"rank-{failure.rank}.json"
        show_failure(failure, ranks=several, debug=debug, traceback=path if path.is_file() else None)

    with listening(settle=SETTLE if several else 0.0, announce=plan.topology.rank == 0) as stop:
        return recorded(lambda hung: train(spec, stop, python_profile, hung), show, [error_dir])
