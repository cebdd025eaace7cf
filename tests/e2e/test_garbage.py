"""When Python looks for garbage: seldom while a process of ptrain starts, as usual while it trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import run

CODE = """
import gc
from ptrain import garbage

before = gc.get_threshold()
garbage.look_as_usual()
assert gc.get_threshold() == before and not gc.get_freeze_count(), "nothing was asked for"
garbage.look_seldom()
assert gc.get_threshold()[0] > 10 * before[0]
garbage.look_as_usual()
assert gc.get_threshold() == before and gc.isenabled() and gc.get_freeze_count() > 1000
print(before)
"""
HOOK = """
import gc
from pathlib import Path
import ptrain

@ptrain.callback("post-step")
def note(run, result):
    (Path(__file__).parent / f"seen-{run.rank}").write_text(f"{gc.get_threshold()} {gc.get_freeze_count() > 1000}")
"""


def usual() -> str:
    """What a process of Python has from the start."""
    return subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_runs_train_as_usual(recipe_file: Any, tmp_path: Path) -> None:
    (tmp_path / "note.py").write_text(HOOK)
    for workers in (1, 2):
        recipe = recipe_file(f"run-{workers}", train_iters=1, checkpoint=[])
        code, _, err = run("run", recipe, "--code", tmp_path / "note.py", "--workers", workers)
        assert code == 0, err
        assert (tmp_path / f"seen-{workers - 1}").read_text() == f"{usual()} True"
