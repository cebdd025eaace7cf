"""Runs `supervise` in a process of its own, with workers that are small scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

DRIVER = """
import json, os, sys
from pathlib import Path
from ptrain.launch.output import Output
from ptrain.launch.supervisor import Job, supervise

given = json.loads(sys.argv[1])
folder = Path(given["folder"])
output = Output(folder / "logs", given["console"], given["files"])
job = Job(
    [sys.executable, given["script"]], given["workers"], output, folder / "errors", os.environ,
    port=given["port"], cores=given["cores"], grace=given["grace"], debug=given["debug"],
)
sys.exit(supervise(job))
"""

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
here = Path(os.environ["FOLDER"])
def note(name, value="yes"):
    staged = here / f".{name}.{os.getpid()}"
    staged.write_text(str(value))
    staged.rename(here / name)
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
def fail(error):
    from ptrain.launch.failure import Failure, folders
    try:
        raise error
    except Exception as raised:
        Failure.of(raised, rank).leave(folders())
note(f"pid-{rank}", os.getpid())
"""


@dataclass
class Supervised:
    """A supervisor at work in `folder`."""

    folder: Path
    process: subprocess.Popen[str]

    def finish(self, timeout: float = 30) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def read(self, name: str, timeout: float = 20) -> str:
        """What a worker noted under `name`, waited for."""
        return wait_until(lambda: (self.folder / name).read_text() if (self.folder / name).exists() else None, timeout)

    def pid(self, name: str) -> int:
        """The process that a worker noted under `name`."""
        return int(self.read(name))

    def alive(self, *names: str) -> bool:
        """Whether all processes that workers noted under these names run."""
        return all(alive(self.pid(name)) for name in names)

    def gone(self, *names: str, timeout: float = 1) -> bool:
        """Whether all processes that workers noted under these names end within `timeout` seconds."""
        return gone(*[self.pid(name) for name in names], timeout=timeout)

    def log(self, rank: int) -> str:
        """The log file of a worker."""
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()


def wait_until(probe: Callable[[], object], timeout: float = 20) -> str:
    """The first true value of `probe`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := probe():
            return str(found)
        time.sleep(0.01)
    raise AssertionError(f"nothing within {timeout} s")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(*pids: int, timeout: float = 10) -> bool:
    """Whether all these processes end within `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Starts a supervisor over workers that run a script; see PRELUDE for what the script finds."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str, workers: int = 2, env: dict[str, str | None] | None = None, **options: object) -> Supervised:
        path = tmp_path / "worker.py"
        path.write_text(PRELUDE + textwrap.dedent(script))
        given = {
            "folder": str(tmp_path),
            "script": str(path),
            "workers": workers,
            "console": [0],
            "files": "*",
        }
        given |= {"port": None, "cores": [], "grace": 5.0, "debug": False, **options}
        changed = {**os.environ, "FOLDER": str(tmp_path), **(env or {})}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(given)],
            env={name: value for name, value in changed.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return Supervised(tmp_path, process)

    yield start
    for process in running:
        process.kill()
        process.communicate()
