"""What a recipe needs and a machine lacks, found without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ptrain.recipe import machine
from ptrain.recipe.load import Loaded, load_recipe

pytestmark = pytest.mark.torch_free

Load = Callable[..., Loaded]
RECIPE = "type: tiny\nmodel: {attn_implementation: ATTENTION}\ndata: {sources: [a]}\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bool], None]:
    """Let the machine have a GPU's driver, or none."""

    def gpu(there: bool) -> None:
        device = tmp_path / "nvidiactl"
        device.unlink(missing_ok=True)
        if there:
            device.touch()
        monkeypatch.setattr(machine, "GPU_DEVICES", (str(device),))

    return gpu


def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_nothing_is_missing(load: Load, gpu: Callable[[bool], None], attention: str) -> None:
    gpu(False)
    assert machine.machine_problems(load(RECIPE.replace("ATTENTION", attention))) == []


@pytest.mark.parametrize(
    ("attention", "module"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")],
)
def test_flash_attention(
    load: Load,
    gpu: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    attention: str,
    module: str,
) -> None:
    loaded = load(RECIPE.replace("ATTENTION", attention))
    gpu(True)
    if importlib.util.find_spec(module) is None:
        (problem,) = machine.machine_problems(loaded)
        assert "is not installed here" in problem.message
        assert problem.where is not None
        assert (problem.where.line, problem.where.column) == (2, 30)
        assert "`-o model.attn_implementation=sdpa`" in str(problem.fix)
    install(monkeypatch, tmp_path, module)
    assert machine.machine_problems(loaded) == []
    gpu(False)
    (problem,) = machine.machine_problems(loaded)
    assert "there is no GPU here" in problem.message


def test_fp16(load: Load, gpu: Callable[[bool], None]) -> None:
    loaded = load("type: tiny\nmodel: {dtype: half}\ndata: {sources: [a]}\n")
    gpu(True)
    assert machine.machine_problems(loaded) == []
    gpu(False)
    assert "`fp16`" in machine.machine_problems(loaded)[0].message


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_trackers_need_their_package(monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path) -> None:
    wanted = {"tensorboard": "trackers: [tensorboard]", "wandb": "wandb: {enable: true}"}[package]
    (tmp_path / "r.yaml").write_text(f"type: sft\nmodel: {{name_or_path: m}}\ndata: {{sources: [a]}}\n{wanted}\n")
    loaded = load_recipe(tmp_path / "r.yaml")
    found = importlib.util.find_spec

    def absent(name: str, *more: str) -> object:
        return None if name == package else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    (problem,) = machine.machine_problems(loaded)
    assert problem.message == f"metrics are to go to {package}, which is not installed here"
    assert problem.fix == f"pip install {package}"
    assert problem.where is not None and problem.where.line == 4
