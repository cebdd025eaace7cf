"""What is wrong is said in one message, with an exit code and without a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch_free

Ptrain = Callable[..., tuple[int, str, str]]


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    """Assert that an outcome is that of bad input, told in one message with these parts."""
    code, out, err = outcome
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rnu"], ["No such command 'rnu'", "'run'", "see: ptrain --help"]),
        (["plugins", "lits"], ["No such command 'lits'", "'list'"]),
        (["run", "x.yaml", "--worker", "2"], ["No such option: --worker", "--workers", "see: ptrain run --help"]),
        (["run", "x.yaml", "--mastr_port", "2"], ["No such option: --mastr_port", "--master_port"]),
        (["run"], ["Missing argument 'RECIPE'"]),
        (["run", "x.yaml", "y.yaml"], ["unexpected extra argument", "y.yaml"]),
        (["run", "x.yaml", "--workers", "two"], ["--workers", "valid integer"]),
        (["run", "x.yaml", "--python_profile", "time"], ["--python_profile", "tottime"]),
        (["check", "missing.yaml"], ["missing.yaml"]),
        (["prepare", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_mistyped(ptrain: Ptrain, arguments: list[str], parts: list[str]) -> None:
    refused(ptrain(*arguments), *parts)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--workers", "0"], "--workers 0"),
        (["--num_gpus", "-1"], "--workers -1"),
        (["--num_nodes", "2"], "--num_nodes 2: there is only localhost"),
        (["--hostfile", "missing"], "the hostfile missing can't be read"),
        (["--include", "localhost:x"], "'localhost:x' is no host with its slots"),
        (["--include", "elsewhere"], "there is no host elsewhere"),
        (["--launcher", "ray"], "ptrain starts no Ray workers itself"),
        (["--no_ssh"], "--no_ssh: only for several hosts"),
    ],
)
def test_launcher_arguments(ptrain: Ptrain, recipe: Path, arguments: list[str], part: str) -> None:
    refused(ptrain("run", recipe, *arguments), part)
    assert not (recipe.parent / "runs").exists()


def test_a_broken_launcher_environment(ptrain: Ptrain, recipe: Path) -> None:
    refused(ptrain("run", recipe, env={"RANK": "1"}), "the environment has RANK but not WORLD_SIZE")


def test_every_problem_of_a_recipe_is_an_error_of_its_own(ptrain: Ptrain, recipe: Path) -> None:
    outcome = ptrain("check", recipe, "-o", "optimizer.lrr=1", "-o", "modle.dtype=fp32")
    refused(outcome, "lrr", "modle")
    assert len(re.findall(r"^error: ", outcome[2], re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("@ptrain.callback('post-backward')\ndef f(run, result): ...", "there is no event `post-backward`"),
        ("@ptrain.callback('pre-loss')\ndef f(run, rows): ...", "has no argument `rows`"),
        ("@ptrain.hookimpl\ndef losss(run, batch): ...", "there is no stage `losss`"),
        ("@ptrain.hookimpl\ndef loss(run, batch): ...", "can never return a value"),
    ],
)
def test_check_refuses_hooks_that_cannot_be(ptrain: Ptrain, recipe: Path, code: str, told: str) -> None:
    (recipe.parent / "mine.py").write_text(f"import ptrain\n\n{code}\n")
    refused(ptrain("check", recipe, "--code", recipe.parent / "mine.py"), "mine.py:", told)


def test_check_says_ok_in_one_line(ptrain: Ptrain, recipe: Path) -> None:
    code, out, _ = ptrain("check", recipe)
    assert (code, out) == (0, f"ok: {recipe} (sft)\n")


@pytest.mark.parametrize("place", [["--debug", "check"], ["check", "--debug"]])
def test_debug_shows_the_traceback(ptrain: Ptrain, place: list[str]) -> None:
    code, _, err = ptrain(*place, "missing.yaml")
    assert code == 2
    assert err.startswith("Traceback (most recent call last)") and "error: " in err


def test_an_unexpected_error_is_short(ptrain: Ptrain, recipe: Path) -> None:
    """A file in place of a module of ours stands for a bug of ours."""
    (recipe.parent / "sitecustomize.py").write_text(
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ptrain.recipe.load':\n"
        "            raise RuntimeError('a bug')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    path = os.pathsep.join([str(recipe.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    code, out, err = ptrain("check", recipe, env={"PYTHONPATH": path})
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: RuntimeError: a bug\n  at \S+:\d+, in \w+\n  `ptrain --debug \.\.\.` .*\n", err)
    code, _, err = ptrain("--debug", "check", recipe, env={"PYTHONPATH": path})
    assert code == 1 and "Traceback" in err


def test_ctrl_c_while_preparing(recipe: Path, environ: dict[str, str]) -> None:
    """A named pipe in place of the recipe keeps the command waiting."""
    pipe = recipe.parent / "pipe.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "ptrain_cli", "check", str(pipe)], env=environ, stderr=subprocess.PIPE, text=True,
        # What a shell starts in the background ignores it, and so would all that it starts in turn.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with pipe.open("w"):  # returns as soon as the command reads
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            # Python does not see a signal that comes a moment before it begins to wait.
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, err = process.communicate(timeout=2)
                break
        else:
            process.kill()
            pytest.fail("the command goes on")
    assert (process.returncode, err) == (130, "")


def test_a_closed_pipe_is_no_error(recipe: Path, environ: dict[str, str]) -> None:
    command = f"{sys.executable} -m ptrain_cli schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
