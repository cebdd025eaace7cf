"""`ptrain embed mine` and `eval` as users call them: two at once, and what is shown."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import embed_mined
import pytest
import yaml
from harness import finish, run, start

from ptrain.testing.workers import run_workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, a collection, and a recipe that mines."""
    folder = tmp_path_factory.mktemp("commands")
    run_workers(embed_mined.written, folder, log=folder / "log")
    recipe = embed_mined.recipe(folder, negatives=2, threshold=1.0, fewer="keep")
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_two_at_once(data: Path) -> None:
    """The second is refused while the first is there, and the first is none the worse for it."""
    first = start("embed", "mine", "mine.yaml", cwd=data)
    deadline = time.monotonic() + 120
    while not (data / "mined.jsonl.work" / "documents.arrow").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        code, out, err = run("embed", "mine", "mine.yaml", cwd=data)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: another process is mining into") and "fix: wait for its end" in err
    code, _, err = finish(first)
    assert code == 0 and (data / "mined.jsonl").is_file(), err


@pytest.mark.parametrize("arguments", [("mine", "mine.yaml"), ("eval", "model", "beir")])
def test_what_is_shown(data: Path, arguments: tuple[str, ...]) -> None:
    """On a terminal our own bars and nothing of the libraries'; elsewhere nothing at all beside what is printed."""
    shutil.rmtree(data / "mined.jsonl.work", ignore_errors=True)
    code, out, err = run("embed", *arguments, cwd=data)
    assert code == 0 and out and err == "", err
    shutil.rmtree(data / "mined.jsonl.work", ignore_errors=True)
    shown = errors_on_terminal("embed", *arguments, cwd=data)
    assert "embedding" in shown and "Loading" not in shown, shown


def errors_on_terminal(*arguments: str, cwd: Path) -> str:
    """What the command writes to a terminal that has its errors alone."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ptrain_cli", *arguments]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        sent = b""
        # Linux says so that the other end is closed.
        with contextlib.suppress(OSError):
            while got := os.read(ours, 65536):
                sent += got
    os.close(ours)
    assert process.returncode == 0, sent.decode()
    return sent.decode()
