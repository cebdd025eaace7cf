"""`ptrain run` with real workers: one and two, failing, stopped, killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ptrain.launch.signals import NOTICE

Ptrain = Callable[..., tuple[int, str, str]]

FAULT = """
import os, signal, subprocess, sys
from pathlib import Path
import ptrain

@ptrain.hookimpl(wrapper=True)
def step(run, batches):
    if run.progress.step == 1:
        Path(f"pid-{run.rank}").write_text(str(os.getpid()))
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(f"child-{run.rank}").write_text(str(child.pid))
        if run.rank == int(os.environ["RANK_OF_FAULT"]):
            FAULT
    return (yield)
"""
ENDLESS = ["-o", "train_iters=100000", "-o", "loss_log_interval=0"]
RESUMABLE = ["-o", "checkpoint=[{type: deepspeed, save_end_of_training: true}]"]


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], timeout: float = 120) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def noted(folder: Path) -> list[int]:
    """The processes that FAULT noted: workers and their children. A file may be there before its text."""
    texts = [path.read_text() for name in ("pid", "child") for path in folder.glob(f"{name}-*")]
    return [int(text) for text in texts if text]


@pytest.fixture
def start(recipe: Path, environ: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `ptrain run` on the tiny recipe and returns when a step was done."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ptrain_cli", "run", recipe.name, *arguments],
            cwd=recipe.parent,
            env={**environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        metrics = recipe.parent / "runs" / "tiny" / "latest" / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0))
        assert process.poll() is None, process.communicate()
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def write_fault(folder: Path, fault: str) -> None:
    (folder / "fault.py").write_text(FAULT.replace("FAULT\n", f"{fault}\n"))


def test_one_worker_and_its_profile(ptrain: Ptrain, recipe: Path) -> None:
    code, out, err = ptrain("run", recipe, "--python_profile", "tottime")
    assert code == 0, err
    assert "Ordered by: internal time" in err
    assert str(recipe.parent / "runs" / "tiny") in out.splitlines()[-1]
    lines = (recipe.parent / "runs" / "tiny" / "latest" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "exit_code", "told"),
    [
        ("raise ValueError('on purpose')", 1, "ValueError: on purpose"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "the process was ended by SIGKILL"),
        ("os._exit(9)", 9, "the process ended with exit code 9"),
    ],
)
def test_one_failing_worker_of_two(ptrain: Ptrain, recipe: Path, fault: str, exit_code: int, told: str) -> None:
    """The other one fails as well, earlier or later, because its peer went away: that is not what is shown."""
    write_fault(recipe.parent, fault)
    env = {"RANK_OF_FAULT": "1"}
    code, out, err = ptrain("run", recipe, "--workers", "2", "--code", "fault.py", env=env)
    assert code == exit_code or (code == 2 and exit_code == 1), err
    assert err.startswith("error: rank 1: ") and told in err and "peer" not in err
    assert "Traceback" not in out + err
    if "raise" in fault:
        assert "fault.py:13" in err
        assert "on purpose" in (recipe.parent / "runs" / "tiny" / "latest" / "logs" / "rank-1.log").read_text()
    assert len(noted(recipe.parent)) == 4
    assert not any(alive(pid) for pid in noted(recipe.parent))


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_request_to_stop_saves_and_can_be_resumed(
    start: Callable[..., subprocess.Popen[str]], ptrain: Ptrain, recipe: Path, workers: int, number: int
) -> None:
    process = start("--workers", str(workers), *ENDLESS, *RESUMABLE)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, f"{NOTICE}\n")
    assert "--resume" in out.splitlines()[-1]
    lines = (recipe.parent / "runs" / "tiny" / "latest" / "metrics.jsonl").read_text().splitlines()
    done = json.loads(lines[-1])["step"]
    more = ["-o", f"exit_iteration={done + 1}", "--resume", "--workers", str(workers)]
    code, _, err = ptrain("run", recipe.name, *ENDLESS, *RESUMABLE, *more)
    assert code == 0, err
    lines = (recipe.parent / "runs" / "tiny" / "latest" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == done + 1


def test_a_second_request_ends_at_once(start: Callable[..., subprocess.Popen[str]], recipe: Path) -> None:
    write_fault(recipe.parent, "import time; time.sleep(600)")
    process = start("--workers", "2", "--code", "fault.py", *ENDLESS, env={"RANK_OF_FAULT": "1"})
    wait_for(lambda: len(noted(recipe.parent)) == 4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not any(alive(pid) for pid in noted(recipe.parent))


def test_nothing_survives_when_it_is_killed(start: Callable[..., subprocess.Popen[str]], recipe: Path) -> None:
    write_fault(recipe.parent, "import time; time.sleep(600)")
    process = start("--workers", "2", "--code", "fault.py", *ENDLESS, env={"RANK_OF_FAULT": "1"})
    wait_for(lambda: len(noted(recipe.parent)) == 4)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in noted(recipe.parent)), timeout=5)


def test_other_ranks_can_be_shown(ptrain: Ptrain, recipe: Path) -> None:
    (recipe.parent / "speak.py").write_text(
        "import ptrain\n\n@ptrain.hookimpl\ndef on_start(run):\n    print('here is', run.rank, flush=True)\n"
    )
    shown = ["-o", "logger.print_output_ranks=[0, 1]"]
    code, out, err = ptrain("run", recipe, "--workers", "2", "--code", "speak.py", *shown)
    assert code == 0, err
    assert {"here is 0", "[rank 1] here is 1"} <= set(out.splitlines())
    assert "here is 1" in (recipe.parent / "runs" / "tiny" / "latest" / "logs" / "rank-1.log").read_text()
