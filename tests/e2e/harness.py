"""Real runs for the tests: rows, recipes, and real workers."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
]


def conversations(count: int, seed: int = 0, longest: int = 30) -> Iterator[dict[str, Any]]:
    """Ragged conversations of one or two turns."""
    rng = random.Random(seed)
    for _ in range(count):
        messages = []
        for _ in range(rng.choice([1, 1, 2])):
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))})
        yield {"messages": messages}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def run_workers(specs: list[Path], workers: int, timeout: float = 600) -> None:
    """Train the prepared runs, one after another, in `workers` real processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "many_runs.py"), *map(str, specs)]
    logs = [specs[0].parent / f"worker-{rank}.log" for rank in range(workers)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * workers, "\n".join(log.read_text()[-4000:] for log in logs)


def metrics(spec: Path) -> list[dict[str, Any]]:
    """The training metrics of a run, one object a step."""
    lines = (spec.parent / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


def losses(spec: Path) -> list[float]:
    """The losses of a run, by step."""
    return [record["loss"] for record in metrics(spec)]
