"""Runs the command line as users do: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """\
type: sft
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
           num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 256}
  dtype: fp32
tokenizer: {type: train, vocab_size: 320}
data: {sources: [{type: tasks, count: 200, seed: 1}], max_length: 64, cache_dir: cache}
optimizer: {lr: 1.0e-3}
micro_batch_size: 4
train_iters: 3
"""

Outcome = tuple[int, str, str]


@pytest.fixture(scope="session")
def environ() -> dict[str, str]:
    """An environment without what a terminal or a launcher adds, and with small workers."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "NO_COLOR", "FORCE_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "COLUMNS": "120", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def recipe_text() -> str:
    """A recipe that trains for three steps."""
    return RECIPE


@pytest.fixture
def recipe(tmp_path: Path, recipe_text: str) -> Path:
    """The same as a file, in the folder that commands run in."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text)
    return path


@pytest.fixture(scope="session")
def ptrain_in(environ: dict[str, str]) -> Callable[[Path], Callable[..., Outcome]]:
    """Makes a function that runs `ptrain` with arguments in a folder: exit code, stdout, stderr."""

    def within(folder: Path) -> Callable[..., Outcome]:
        def run(*arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 240) -> Outcome:
            done = subprocess.run(
                [sys.executable, "-m", "ptrain_cli", *map(str, arguments)],
                cwd=folder,
                env={**environ, **(env or {})},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            return done.returncode, done.stdout, done.stderr

        return run

    return within


@pytest.fixture
def ptrain(tmp_path: Path, ptrain_in: Callable[[Path], Callable[..., Outcome]]) -> Callable[..., Outcome]:
    """Runs `ptrain` with arguments in an empty folder: exit code, stdout, stderr."""
    return ptrain_in(tmp_path)
