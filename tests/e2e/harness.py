"""Real runs for the tests: rows, recipes, and real workers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from ptrain.directory import release
from ptrain.job import prepare_run
from ptrain.recipe.load import load_recipe
from ptrain.testing import workers as workers_of_the_kit


def run_workers(specs: list[Path], workers: int, timeout: float = 600) -> None:
    """Train the prepared runs, one after another, in `workers` real processes."""
    import many_runs

    log, paths = specs[0].parent / "worker.log", list(map(str, specs))
    try:
        workers_of_the_kit.run_workers(many_runs.main, paths, log=log, workers=workers, timeout=timeout)
    finally:
        for spec in specs:
            release(spec.parent)


def uninterrupted(recipe: Path, workers: int = 1) -> None:
    """Train a recipe to its end, for others to be compared with: the workers are real ones, the command is left out."""
    run_workers([prepare_run(load_recipe(recipe), recipe)], workers)


def metrics(spec: Path) -> list[dict[str, Any]]:
    """The training metrics of a run, one object a step."""
    lines = (spec.parent / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def losses(spec: Path) -> list[float]:
    """The losses of a run, by step."""
    return [record["loss"] for record in metrics(spec)]


TIMES = ("seconds", "tokens_per_second", "memory_gib")
"""Of a line of the metrics, what is another each time."""


def left(spec: Path) -> dict[str, Any]:
    """What a run has left: its metrics without times, and the weights that it exported."""
    lines = [json.loads(line) for line in (spec.parent / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    files = sorted((spec.parent / "model" / "latest").glob("*.safetensors"))
    weights = {name: value for file in files for name, value in load_file(file).items()}
    assert weights
    return {"metrics": metrics, "weights": weights}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Which of what two runs have left is not the same, bit for bit."""
    wrong = []
    if found["metrics"] != expected["metrics"]:
        pairs = itertools.zip_longest(found["metrics"], expected["metrics"])
        wrong.append("metrics: {} instead of {}".format(*next(pair for pair in pairs if pair[0] != pair[1])))
    if found.get("ids") != expected.get("ids"):
        wrong.append("ids")
    old = expected["weights"]
    return wrong + [name for name, value in found["weights"].items() if not (value == old[name]).all()]


# The real command


def start(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[str]:  # fmt: skip
    """The command `ptrain` in a process of its own."""
    quiet = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ptrain_cli", *map(str, arguments)]
    whole = {**os.environ, **quiet, **(env or {})}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=whole, cwd=cwd, **pipes)


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(*arguments: object, cwd: Path | None = None) -> tuple[int, str, str]:
    """The command, run to its end."""
    return finish(start(*arguments, cwd=cwd))


def wait_for_steps(path: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has done so many steps."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count('"loss"') < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes that descend from `pid`."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def wait_until_gone(pids: list[int]) -> None:
    """Wait for the end of processes."""
    deadline = time.monotonic() + 30
    while left_over := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {left_over}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
