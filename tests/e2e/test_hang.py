"""One of two workers hangs: the run ends, and says which worker, at what, and where in its code."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from harness import children, finish, start, wait_for_steps, wait_until_gone

CODE = """
import time
import ptrain

@ptrain.callback("pre-step")
def sleeps(run, batches):
    if run.rank == 1 and run.progress.step == 3:
        time.sleep(600)
"""


def test_a_worker_that_sleeps(recipe_file: Any, tmp_path: Path) -> None:
    """While the other one is in a collective."""
    (tmp_path / "sleeps.py").write_text(CODE)
    recipe = recipe_file("hangs", train_iters=20, hang_timeout=5)
    process = start("run", recipe, "--workers", 2, "--code", tmp_path / "sleeps.py")
    wait_for_steps(tmp_path / "hangs" / "metrics.jsonl", 2, process)
    pids = children(process.pid)
    code, _, err = finish(process, timeout=120)
    assert code == 1 and "error: rank 1: Hang: no progress for 5 s, since `step` of step 4" in err, err
    assert "sleeps.py:8, in sleeps" in err and "rank 0: it has waited for the others" in err, err
    wait_until_gone(pids)


def test_a_worker_that_is_stopped(recipe_file: Any, tmp_path: Path) -> None:
    """It can't tell anything itself."""
    recipe = recipe_file("stopped", train_iters=2000, hang_timeout=5, loss_log_interval=0)
    process = start("run", recipe, "--workers", 2)
    wait_for_steps(tmp_path / "stopped" / "metrics.jsonl", 2, process)
    pids = children(process.pid)
    ranks = {rank: pid for pid in pids if (rank := _rank(pid)) is not None}
    os.kill(ranks["1"], signal.SIGSTOP)
    code, _, err = finish(process, timeout=120)
    assert code == 1 and "error: rank 0: Hang: it has waited for the others for 5 s" in err, err
    assert "rank 1: told nothing" in err, err
    wait_until_gone(pids)


def _rank(pid: int) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((one[5:].decode() for one in environment if one.startswith(b"RANK=")), None)
