"""A worker that hangs: found by itself, named with where it is; what only stood still is not taken for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptrain.launch import failure, hang
from ptrain.launch.failure import Failure

pytestmark = pytest.mark.torch_free

WORKER = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ptrain.launch import hang
from ptrain.launch.worker import recorded

hang.SPREAD = 0.1

def busy():
    for _ in range(20):
        hang.beat("a batch", 3)
        time.sleep(0.1)

def stuck():
    time.sleep(60)

def by_a_thread():
    with ThreadPoolExecutor(2, thread_name_prefix="loader") as pool:
        pool.submit(int)
        pool.submit(stuck).result()

def work(hung):
    with hang.watched(1.0, 0, hung):
        busy()
        print("busy no more", flush=True)
        globals()[sys.argv[2]]()
    return 0

sys.exit(recorded(work, lambda failure: print(failure.message, failure.place), [Path(sys.argv[1])]))
"""


def started(tmp_path: Path, then: str) -> subprocess.Popen[str]:
    """A process that gets on for two seconds, which is twice what it may stand still, and `then` does something."""
    (tmp_path / "mine.py").write_text(WORKER)
    command = [sys.executable, str(tmp_path / "mine.py"), str(tmp_path), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("then", ["stuck", "by_a_thread"])
def test_what_hangs_is_named(then: str, tmp_path: Path) -> None:
    """The place is that of the thread which is waited for."""
    process = started(tmp_path, then)
    out, _ = process.communicate(timeout=60)
    (found,) = failure.read(tmp_path)
    assert process.returncode == found.exit_code == 1 and found.kind == "Hang" and not found.lost_peer
    assert "busy no more" in out and "no progress for 1 s, since a batch of step 4 began" in out
    assert "hang_timeout" in out and "mine.py:16, in stuck" in found.place
    text = "\n".join(found.traceback)
    assert text.startswith("MainThread:") and "time.sleep(60)" in text


def test_what_does_not_hang_is_left_alone(tmp_path: Path) -> None:
    process = started(tmp_path, "busy")
    assert process.wait(timeout=60) == 0 and not failure.read(tmp_path)


def test_what_is_suspended_does_not_hang(tmp_path: Path) -> None:
    """Ctrl-Z, or a machine that sleeps."""
    process = started(tmp_path, "busy")
    assert process.stdout is not None and process.stdout.readline() == "busy no more\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=60) == 0 and not failure.read(tmp_path)


def test_by_default_only_several_workers_are_watched() -> None:
    assert [hang.limit(None, workers) for workers in (1, 2)] == [0, 1800]
    assert [hang.limit(given, 1) for given in (0, 5)] == [0, 5]


def hung(rank: int, at: float, waits: bool) -> Failure:
    """What a worker tells of itself."""
    return Failure(rank, at, "Hang", f"{'waits' if waits else 'stuck'}; hint", place=f"file:{rank}", lost_peer=waits)


def test_the_first_that_waits_for_nobody_is_the_cause_and_the_others_are_told() -> None:
    told = [hung(0, 1.0, True), hung(1, 2.0, False), hung(2, 3.0, True)]
    cause = hang.with_others(failure.first(told), told, range(4))
    assert cause.rank == 1
    assert cause.message.splitlines() == [
        "stuck; hint", "  at file:1", "rank 0: waits", "  at file:0", "rank 2: waits", "  at file:2"
    ]  # fmt: skip


def test_who_tells_nothing_may_be_what_the_others_wait_for() -> None:
    """A process that was stopped, or one in native code that does not let Python run."""
    told = [hung(0, 1.0, True)]
    assert "rank 1, 2: told nothing" in hang.with_others(told[0], told, range(3)).message
    other = Failure(0, 1.0, "ValueError", "other")
    assert hang.with_others(other, [other], range(3)) is other
