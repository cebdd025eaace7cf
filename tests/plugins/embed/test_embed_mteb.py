"""Tasks of mteb, by its own function and by the real command, give what we measure ourselves."""

from __future__ import annotations

import json
from pathlib import Path

import embed_tasks
import pytest
from harness import run

from ptrain.testing.workers import run_workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the data of two tasks, and `ours.json` with what we measure on them."""
    folder = tmp_path_factory.mktemp("mteb")
    for work in (embed_tasks.written, embed_tasks.measured):
        run_workers(work, folder, log=folder / "log")
    return folder


@pytest.mark.parametrize("task", embed_tasks.HUB)
def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    name, ours = f"{task}/default", json.loads((data / "ours.json").read_text())
    code, out, err = run("embed", "eval", "model", f"mteb:{task}", "--json", tmp_path / "figures.json", cwd=data)
    assert code == 0, err
    assert json.loads((tmp_path / "figures.json").read_text()) == {name: pytest.approx(ours[name], abs=1e-4)}
    assert out.split() == [name, f"{ours[name]:.4f}"]


def test_what_there_is_not(tmp_path: Path) -> None:
    run_workers(embed_tasks.refused, log=tmp_path / "log")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mteb:NFCorpus", "--dimensions", "8"], "mteb measures the whole vectors"),
        (["mteb:SciFact"], "the data of the task `SciFact` can't be loaded"),  # which is on the hub, out of reach
    ],
)
def test_what_the_command_can_not_measure(data: Path, arguments: list[str], says: str) -> None:
    """Exit code 2 and one error."""
    code, _, err = run("embed", "eval", "model", *arguments, cwd=data)
    assert code == 2 and says in " ".join(err.split()) and "Traceback" not in err, err
