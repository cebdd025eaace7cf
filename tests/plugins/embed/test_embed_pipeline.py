"""`ptrain embed pipeline`, stopped in any way, ends as if it had not been, and does nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embed_mined
import pytest
import yaml
from harness import children, finish, start, wait_for_steps, wait_until_gone
from safetensors.torch import load_file

from ptrain.testing.workers import run_workers

SAVES = [
    {"type": "deepspeed", "save_every_n_steps": 2, "keep_last": 1},
    {"type": "sentence-transformers", "save_end_of_training": True},
]
FIRST, SECOND = Path("runs/pairs/latest"), Path("negatives")
"""Where the runs are: the first in a folder by its time, the second in one of its own name."""
COMMAND = ("embed", "pipeline", "pairs.yaml", "negatives.yaml")


def recipes(folder: Path) -> None:
    """Two recipes; the second trains the model of the first on what that has mined."""
    common: dict[str, Any] = {"type": "embed", "micro_batch_size": 4, "temperature": 0.1, "checkpoint": SAVES}
    model: dict[str, Any] = {"dtype": "fp32", "hf_config_kwargs": {"hidden_dropout_prob": 0.1}}
    first = {
        **common, "model": {**model, "name_or_path": "model"}, "train_iters": 2,
        "data": {"sources": [{"type": "jsonl", "path": "rows.jsonl"}], "cache_dir": "cache"},
        "mine": {"output": "mined.jsonl", "negatives": 2, "threshold": 1.0, "fewer": "keep"},
    }  # fmt: skip
    second = {
        **common, "model": {**model, "name_or_path": f"{FIRST}/model/latest"}, "output_dir": "negatives",
        "train_iters": 60,
        "data": {"sources": [{"type": "jsonl", "path": "mined.jsonl"}], "cache_dir": "cache"},
    }  # fmt: skip
    for name, recipe in (("pairs", first), ("negatives", second)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder with the recipes, their rows and a model."""
    data = tmp_path_factory.mktemp("pipeline")
    run_workers(embed_mined.written, data, log=data / "log")

    def make(name: str) -> Path:
        folder = data / name
        folder.mkdir()
        for one in ("model", "rows.jsonl"):
            (folder / one).symlink_to(data / one)
        recipes(folder)
        return folder

    return make


def starts(run: Path) -> list[str]:
    """How a run was begun and gone on with."""
    return [one["command"][-1] for one in json.loads((run / "run.json").read_text())["starts"]]


def stamps(folder: Path) -> list[int]:
    """When the first stage wrote what it has made."""
    files = [folder / "mined.jsonl", *sorted((folder / FIRST / "model" / "latest").iterdir())]
    return [path.stat().st_mtime_ns for path in files]


def in_second_stage(folder: Path, after: Path | None = None) -> subprocess.Popen[str]:
    """A pipeline that trains its second model; the run before that is renamed, where `after` says so."""
    process = start(*COMMAND, cwd=folder)
    if after is not None:
        wait_for_steps(after / "metrics.jsonl", 1, process)
    wait_for_steps(folder / SECOND / "metrics.jsonl", 5, process)
    return process


def killed(process: subprocess.Popen[str]) -> None:
    """SIGKILL of the pipeline and all that it started; what is in a group of its own dies with it too."""
    running = children(process.pid)
    assert running
    process.kill()
    finish(process)
    wait_until_gone(running)


@pytest.mark.timeout(900)
def test_stopped_killed_and_changed_it_goes_on(made: Callable[[str], Path]) -> None:
    """What is finished is not repeated, what an older recipe began is not gone on with, and the result is the same."""
    whole, cut = made("whole"), made("cut")
    code, _, err = finish(start(*COMMAND, cwd=whole))
    assert code == 0, err
    recipe = (cut / "negatives.yaml").read_text()
    (cut / "negatives.yaml").write_text(f"seed: 1\n{recipe}")
    process = in_second_stage(cut)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75 and "goes on from here" in out, (code, out, err)
    first = stamps(cut)
    (cut / "negatives.yaml").write_text(recipe)
    killed(before_a_folder(cut))
    assert not (cut / "negatives.1").exists()
    killed(in_second_stage(cut, after=cut / "negatives.1"))
    code, out, err = finish(start(*COMMAND, cwd=cut))
    assert code == 0 and "pairs.yaml: is done" in out, (out, err)
    assert stamps(cut) == first and len(starts(cut / FIRST)) == 1
    assert starts(cut / SECOND) == ["--restart", "--resume"] and (cut / "negatives.1").is_dir()
    found, expected = (load_file(one / SECOND / "model/latest/model.safetensors") for one in (cut, whole))
    assert found.keys() == expected.keys() and all((found[name] == expected[name]).all() for name in expected)


def before_a_folder(folder: Path) -> subprocess.Popen[str]:
    """A pipeline that has noted that its second recipe is another one, and has not renamed the older run yet."""
    process = start(*COMMAND, cwd=folder)
    deadline = time.monotonic() + 120
    while not note(folder)["flags"] or not children(process.pid):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def note(folder: Path) -> dict[str, Any]:
    """What is noted of the second recipe."""
    return json.loads((folder / "runs" / "pipeline-pairs-negatives.json").read_text())["negatives.yaml"]
