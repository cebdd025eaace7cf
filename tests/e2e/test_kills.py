"""Runs that die: whatever is killed, whenever, nothing is left running or half-written, and going on is exact."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import (
    children,
    differences,
    finish,
    left,
    losses,
    run,
    run_workers,
    start,
    uninterrupted,
    wait_for_steps,
    wait_until_gone,
)

from ptrain.checkpoint import store
from ptrain.job import prepare_run
from ptrain.launch.supervisor import free_port
from ptrain.recipe.load import load_recipe

FAULTS = """
import os, signal, time
from pathlib import Path
from ptrain.checkpoint import store

here, kill_at, points, saves = Path(__file__).parent, int(os.environ.get("KILL_AT", "0")), [], 0


def fault(point):
    global saves
    saves += point == "make staging folder"
    if saves == 2:
        points.append(point)
        if len(points) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not kill_at:
            (here / "points").write_text("\\n".join(points))
    if point == "write manifest" and (here / "slow").exists():
        (here / "saving").touch()
        time.sleep(600)


store.fault = fault
"""
SAVES = [
    {"type": "deepspeed", "save_every_n_steps": 2, "keep_last": 1},
    {"type": "huggingface", "save_end_of_training": True, "verify": False},
]


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A file of user code that counts the writes, fsyncs and renames of the second save, and dies at one of them."""
    path = tmp_path / "faults.py"
    path.write_text(FAULTS)
    return path


@pytest.fixture
def recipe(recipe_file: Any) -> Callable[..., Path]:
    """Makes a recipe with dropout and frequent checkpoints."""

    def make(name: str, **changes: Any) -> Path:
        given = {"checkpoint": SAVES, "model": {"hf_config_kwargs": {"attention_dropout": 0.1}}, **changes}
        return recipe_file(name, **given)

    return make


def spec_of(recipe: Path) -> Path:
    """The file in the run directory of a recipe that its workers start from."""
    return Path(yaml.safe_load(recipe.read_text())["output_dir"]) / "run.json"


def some(points: list[str], workers: int) -> list[int]:
    """The places of a few points on the way."""
    few = ("write state.json", "rename pointer", "delete old")
    more = ("write manifest", "rename") if workers == 1 else ()
    return sorted(points.index(one) + 1 for one in (*few, *more))


def check_whole(root: Path, before: str, after: str) -> None:
    """What `latest` names is the checkpoint before, or the one that was being written, and all of it is there."""
    latest = store.latest(root)
    assert latest is not None and latest.name in (before, after)
    assert store.verify(latest) == []


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["some", "every"])
def test_killed_at_each_point_of_a_save(workers: int, every: bool, recipe: Any, faults: Path) -> None:
    """SIGKILL of the worker that writes: the old or the new checkpoint is whole, and the run goes on as if nothing was."""
    command = ("--code", faults, "--workers", workers)
    whole = recipe("whole", train_iters=6)
    code, _, err = run("run", whole, *command)
    assert code == 0, err
    points = (faults.parent / "points").read_text().splitlines()
    assert [points[0], points[-1]] == ["make staging folder", "delete old"] and len(points) > 12
    chosen = range(1, len(points) + 1) if every else some(points, workers)

    def killed(at: int) -> Path:
        one = recipe(f"killed-{at:02d}-before-{points[at - 1].replace(' ', '-')}", train_iters=6)
        env = {"KILL_AT": str(at)}
        code, _, err = finish(start("run", one, *command, env=env))
        # A single worker is the process of the command itself.
        assert code == (-signal.SIGKILL if workers == 1 else 128 + signal.SIGKILL), (code, err)
        check_whole(spec_of(one).parent / "checkpoints", "step-00000002", "step-00000004")
        return one

    with ThreadPoolExecutor(3 - workers) as pool:
        recipes = list(pool.map(killed, chosen))
    specs = [prepare_run(load_recipe(one, code=faults), one, resume=True) for one in recipes]
    steps = {json.loads(spec.read_text())["resume_from"][-1] for spec in specs}
    assert steps == {"2", "4"}, "some kills came before the new checkpoint counted, and some after"
    run_workers(specs, workers, timeout=1800)
    expected = left(spec_of(whole))
    for spec in specs:
        assert not differences(left(spec), expected), spec.parent.name
        assert not list((spec.parent / "checkpoints").glob(".tmp-*"))


def test_killed_again_and_again(recipe: Any, tmp_path: Path) -> None:
    """SIGKILL of a worker, of the command, of all at once: nothing runs on, the port is free, the result is the same."""
    whole, cut = recipe("whole", train_iters=60), recipe("cut", train_iters=60)
    command = ("--workers", "2", "--master_port", str(free_port()))
    uninterrupted(whole, 2)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    for time_, kill in enumerate([kill_worker, kill_command, kill_all]):
        process = start("run", cut, *command, *(["--resume"] if time_ else []))
        wait_for_steps(metrics, 8 + 12 * time_, process)
        workers = children(process.pid)
        assert len(workers) >= 2
        code, err = kill(process, workers)
        assert code not in (0, 75), err
        if kill is kill_worker:
            assert "SIGKILL" in err and "Traceback" not in err
        wait_until_gone(workers)
        assert all(json.loads(line) for line in metrics.read_text().splitlines()[:-1])
        json.loads((tmp_path / "cut" / "run.json").read_text())
    code, _, err = run("run", cut, *command, "--resume")
    assert code == 0, err
    assert not differences(left(spec_of(cut)), left(spec_of(whole)))
    assert not [path for path in (tmp_path / "cut").rglob("*") if ".tmp" in path.name]


def kill_worker(process: Any, workers: list[int]) -> tuple[int, str]:
    """The last one; the exit code of the command, and what it says."""
    os.kill(workers[-1], signal.SIGKILL)
    code, _, err = finish(process)
    return code, err


def kill_command(process: Any, workers: list[int]) -> tuple[int, str]:
    """The process that the user started."""
    process.kill()
    code, _, err = finish(process)
    return code, err


def kill_all(process: Any, workers: list[int]) -> tuple[int, str]:
    """As the kernel does when memory is short, or a batch system when the time is up."""
    for pid in [process.pid, *workers]:
        with contextlib.suppress(ProcessLookupError):  # without the command, the others die by themselves
            os.kill(pid, signal.SIGKILL)
    code, _, err = finish(process)
    return code, err


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_twice(workers: int, recipe: Any, faults: Path, tmp_path: Path) -> None:
    """The second one ends the run in the middle of its save; the checkpoint before is what is gone on from."""
    whole, cut = recipe("whole", train_iters=30), recipe("cut", train_iters=30)
    command = ("--code", faults, "--workers", workers)
    uninterrupted(whole, workers)
    process = start("run", cut, *command)
    wait_for_steps(tmp_path / "cut" / "metrics.jsonl", 5, process)
    pids = children(process.pid)
    (tmp_path / "slow").touch()
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "saving").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, timeout=60)
    assert code == 130 and "Traceback" not in err, (code, err)
    wait_until_gone(pids)
    (tmp_path / "slow").unlink()
    latest = store.latest(tmp_path / "cut" / "checkpoints")
    assert latest is not None and store.verify(latest) == []
    code, out, err = run("run", cut, *command, "--resume")
    assert code == 0 and f"(step {int(latest.name[5:])})" in out, err
    assert not differences(left(spec_of(cut)), left(spec_of(whole)))


def test_a_disk_too_small_for_all_checkpoints(recipe: Any, mount: Any, tmp_path: Path) -> None:
    """One message with what is needed and free; those before are whole, and with more space the run goes on."""
    keep = [{**SAVES[0], "keep_last": None}, SAVES[1]]
    whole, small = recipe("whole", train_iters=12, checkpoint=keep), recipe("small", train_iters=12, checkpoint=keep)
    uninterrupted(whole)
    size = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints" / "step-00000002").iterdir())
    mount(tmp_path / "small", f"size={2 * size + size // 2}")
    code, _, err = run("run", small)
    assert code not in (0, 75) and "Traceback" not in err, err
    assert "the disk is full" in err and "bytes" in err and "earlier checkpoints are intact" in err
    root = tmp_path / "small" / "checkpoints"
    assert [path.name for path in root.iterdir() if path.name.startswith(".tmp")] == []
    check_whole(root, "step-00000002", "step-00000004")
    code, _, err = run("run", small, "--resume")
    assert code == 2 and "bytes" in err, "there is still no space for one"
    mount(tmp_path / "small", f"size={20 * size}")
    code, _, err = run("run", small, "--resume")
    assert code == 0, err
    assert not differences(left(spec_of(small)), left(spec_of(whole)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_while_training(workers: int, recipe: Any, mount: Any, tmp_path: Path) -> None:
    """With no byte left, not even for the metrics: one message, and all goes on when there is space again."""
    whole, full = recipe("whole", train_iters=100), recipe("full", train_iters=100)
    mount(tmp_path / "full", "size=40m")
    process = start("run", full, "--workers", workers)
    wait_for_steps(tmp_path / "full" / "metrics.jsonl", 5, process)
    pids = children(process.pid)
    filler = tmp_path / "full" / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(1 << 12))
    code, _, err = finish(process)
    assert code not in (0, 75) and "Traceback" not in err, err
    assert "disk is full" in err or "No space left" in err
    wait_until_gone(pids)
    filler.unlink()
    uninterrupted(whole, workers)
    code, _, err = run("run", full, "--workers", workers, "--resume")
    assert code == 0, err
    assert not differences(left(spec_of(full)), left(spec_of(whole)))


def test_folders_that_can_not_be_written(recipe: Any, mount: Any, tmp_path: Path) -> None:
    """Before the start nothing happens; from the middle of a run on, the message names the folder."""
    place = mount(tmp_path / "place", "size=64m,ro")
    code, _, err = run("run", recipe("none", output_dir=str(place / "run"), train_iters=20))
    assert code == 2 and str(place) in err and "Traceback" not in err, err
    assert list(place.iterdir()) == []
    checkpoints = mount(tmp_path / "checkpoints", "size=64m")
    apart = [{**SAVES[0], "output_dir": str(checkpoints)}, SAVES[1]]
    whole, cut = recipe("whole", train_iters=100), recipe("cut", train_iters=100, checkpoint=apart)
    uninterrupted(whole)
    process = start("run", cut)
    wait_for_steps(tmp_path / "cut" / "metrics.jsonl", 5, process)
    pids = children(process.pid)
    # While a file in it is being written, it can't be changed.
    deadline = time.monotonic() + 60
    while subprocess.run(["mount", "-o", "remount,ro", str(checkpoints)], capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline
    code, _, err = finish(process)
    assert code not in (0, 75) and "Traceback" not in err, err
    assert "Read-only file system" in err and str(checkpoints) in err and "earlier checkpoints are intact" in err
    wait_until_gone(pids)
    mount(checkpoints, "rw")
    code, _, err = run("run", cut, "--resume")
    assert code == 0, err
    assert not differences(left(spec_of(cut)), left(spec_of(whole)))


def test_damaged_checkpoints_are_named_and_passed_over(recipe: Any, tmp_path: Path) -> None:
    """Truncated, empty, altered by one bit, missing: each newest one in its own way, and the one before is used."""
    keep = [{**SAVES[0], "keep_last": None}, SAVES[1]]
    whole, cut = recipe("whole", train_iters=12, checkpoint=keep), recipe("cut", train_iters=12, checkpoint=keep)
    uninterrupted(whole)
    assert run("run", cut, "-o", "exit_iteration=10")[0] == 0
    root = tmp_path / "cut" / "checkpoints"
    for step, damage in {10: truncate, 8: empty, 6: flip, 4: remove}.items():
        damage(next((root / f"step-{step:08d}").glob("state-*.safetensors")))
    code, out, err = run("run", cut, "--resume")
    assert code == 0 and "(step 2)" in out, (out, err)
    for step, said in {10: "truncated", 8: "empty", 6: "altered", 4: "missing"}.items():
        assert any(f"step-{step:08d}" in line and said in line for line in err.replace("\n", " ").split("damaged")), err
    assert not differences(left(spec_of(cut)), left(spec_of(whole)))
    assert len(losses(spec_of(cut))) == 12


def truncate(file: Path) -> None:
    """By its last byte."""
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    """As a crash before the first sync leaves it."""
    os.truncate(file, 0)


def flip(file: Path) -> None:
    """One bit in its middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    """The file itself."""
    file.unlink()
