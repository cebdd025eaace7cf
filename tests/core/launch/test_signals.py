"""Requests to stop: the first sets a flag, the second ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ptrain.launch.signals import listening, requests

pytestmark = pytest.mark.torch_free

LOOP = """
import sys, time
from ptrain.launch.signals import STOPPED, listening
with listening(settle=float(sys.argv[1])) as stop:
    print("ready", flush=True)
    asked, end = False, time.time() + 20
    while time.time() < end and not (asked and sys.argv[2] == "leave"):
        if stop.requested and not asked:
            asked = print("asked", stop.signal, flush=True) is None
        time.sleep(0.01)
    sys.exit(STOPPED)
"""


def start(settle: float = 0, then: str = "leave") -> subprocess.Popen[str]:
    """A process that listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(settle), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_one_signal_sets_the_flag(number: int) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (75, f"asked {int(number)}\n", "")


@pytest.mark.parametrize(("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_a_second_signal_ends_at_once(first: int, second: int) -> None:
    process = start(then="stay")
    process.send_signal(first)
    assert process.stdout is not None and process.stdout.readline().startswith("asked")
    process.send_signal(second)
    process.communicate(timeout=5)
    assert process.returncode == 128 + second


def test_the_same_request_twice_is_one() -> None:
    """A batch system signals all processes, and the launcher passes its own signal on."""
    process = start(settle=1.0, then="stay")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline().startswith("asked")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143


def test_the_former_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in requests()}
    with listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.signal == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before
    with listening() as again:
        assert not again.requested


def test_a_thread_may_listen_without_handlers() -> None:
    found: list[bool] = []

    def listen() -> None:
        with listening() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [False]


def test_nohup_is_respected() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in requests()
    finally:
        signal.signal(signal.SIGHUP, former)
