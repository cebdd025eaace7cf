"""Several hosts: DeepSpeed's own launcher starts the workers.

Run as a module, it is that launcher with more variables carried to the other hosts.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from ptrain.launch.plan import Plan

CARRIED = ("PTRAIN_", "WANDB_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "GLOO_", "DS_ACCELERATOR")
"""Variables that the workers on other hosts get too, by the beginning of their names."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
"""They would be seen in the process lists of all hosts: log in there instead."""


def command(plan: Plan, worker: Sequence[str]) -> list[str]:
    """The command that starts `worker` (a module and its arguments) on every host of the plan."""
    given = plan.arguments
    words = [sys.executable, "-m", "ptrain.launch.deepspeed_launcher", "--log_level", "warning"]
    for name, value in (
        ("hostfile", given.hostfile),
        ("num_gpus", given.workers),
        ("num_nodes", given.num_nodes),
        ("include", given.include),
        ("exclude", given.exclude),
        ("master_addr", given.master_addr),
        ("master_port", given.master_port),
        ("launcher", "" if given.launcher == "deepspeed" else given.launcher),
        ("launcher_args", given.launcher_args),
        ("node_rank", given.node_rank),
        ("ssh_port", given.ssh_port),
        ("venv_script", given.venv_script),
        ("bind_core_list", given.bind_core_list),
    ):
        words += [f"--{name}={value}"] if value not in (None, "") else []
    words += [f"--{name}" for name in ("no_ssh", "no_ssh_check", "bind_cores_to_rank") if getattr(given, name)]
    words += ["--force_multi"] if len(plan.hosts) == 1 else []
    return [*words, "--module", "--no_local_rank", *worker]


def carried(environ: Mapping[str, str]) -> list[str]:
    """The names of the variables that the workers on other hosts get besides DeepSpeed's choice."""
    return [name for name in environ if name.startswith(CARRIED) and not SECRET.search(name)]


def main() -> None:
    """Start the workers as `deepspeed` would."""
    from deepspeed.launcher import runner

    runner.EXPORT_ENVS = [*runner.EXPORT_ENVS, *carried(os.environ)]
    runner.main()


if __name__ == "__main__":
    main()
