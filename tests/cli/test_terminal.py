"""What is drawn on a terminal, wide or narrow, with colours and without, and what is printed where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

CODE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9])")
COLOUR = re.compile(r"\x1b\[([0-9]+;)*([34][0-9]|9[0-7]|10[0-7])(;[0-9]+)*m")
FIRST = "this takes longer than a narrow terminal is wide, so that a word of it has to"
REST = "begin a line of its own"
NOISY = f"""
import sys, time
import ptrain

@ptrain.hookimpl(wrapper=True)
def step(run, batches):
    time.sleep(0.3)  # so that the bar is drawn
    if run.progress.step == 1:
        run.warn("something is odd")
        print("printed by user code")
        run.say("{FIRST} {REST}")
    return (yield)
"""
EXPORT = ["-o", "checkpoint=[{type: huggingface, save_end_of_training: true}]"]


def on_terminal(command: list[str], folder: Path, environ: dict[str, str], width: int) -> str:
    """What a command sends to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environ = {**{k: v for k, v in environ.items() if k != "COLUMNS"}, "TERM": "xterm-256color"}
    with subprocess.Popen(command, cwd=folder, env=environ, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        sent = b""
        try:
            while got := os.read(ours, 65536):
                sent += got
        except OSError:  # Linux says so that the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, sent.decode()
    return sent.decode()


def lines(sent: str) -> list[str]:
    """The lines that were drawn one after another, without codes; one that was drawn again counts again."""
    return [line for line in re.split(r"[\r\n]+", CODE.sub("", sent)) if line.strip()]


@pytest.fixture
def command(recipe: Path) -> list[str]:
    """A run that also warns and prints in the middle of training."""
    (recipe.parent / "noisy.py").write_text(NOISY)
    return [sys.executable, "-m", "ptrain_cli", "run", recipe.name, "--code", "noisy.py", *EXPORT]


@pytest.mark.parametrize(("width", "colour"), [(80, True), (200, False)])
def test_on_a_terminal(command: list[str], recipe: Path, environ: dict[str, str], width: int, colour: bool) -> None:
    sent = on_terminal(command, recipe.parent, {**environ, **({} if colour else {"NO_COLOR": "1"})}, width)
    drawn = lines(sent)
    bars = [line for line in drawn if line.startswith("training ")]
    assert all(len(bar) <= width for bar in bars)
    assert re.fullmatch(r"training ━+ 3/3 .*loss \d.* tok/s .*\d:\d\d:\d\d *", bars[-1]), bars
    assert len({len(bar.rstrip()) for bar in bars[-2:]}) == 1, "it takes the whole line, each time"
    # Nothing is mixed with the bar, nor lost.
    assert "warning: something is odd" in [line.rstrip() for line in drawn]
    assert "printed by user code" in [line.rstrip() for line in drawn]
    at = next(at for at, line in enumerate(drawn) if line.startswith(FIRST))
    assert (drawn[at : at + 2] == [FIRST, REST]) if width == 80 else (drawn[at] == f"{FIRST} {REST}")
    assert bool(COLOUR.search(sent)) == colour
    (last,) = [line for line in drawn if line.startswith("done: ")]
    assert last == drawn[-1]
    run = (recipe.parent / "runs" / "tiny" / "latest").resolve()
    assert last.startswith("done: 3/3 steps in ") and f"everything is in {run}; model: {run}/model/step-" in last
    again = "ptrain run tiny.yaml --code noisy.py"
    assert f"next: to train on rows of your own, {again} -o" in last and last.endswith("rows.jsonl}]'")


def test_piped(command: list[str], recipe: Path, environ: dict[str, str]) -> None:
    """Plain lines, none of them broken, whatever the width of the terminal would be."""
    done = subprocess.run(
        command, cwd=recipe.parent, env={**environ, "COLUMNS": "40"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout
    assert done.stderr == "warning: something is odd\n"
    printed = done.stdout.splitlines()
    assert f"{FIRST} {REST}" in printed and "printed by user code" in printed
    assert [line.split()[1] for line in printed if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert printed[-1].startswith("done: 3/3 steps in ") and "next: " in printed[-1]
