"""`deepspeed` checkpoints: what they hold, and what is not resumed from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RECIPE: dict[str, Any] = {
    "type": "tiny",
    "data": {"sources": [{"type": "jsonl", "path": "unused.jsonl"}]},
    "optimizer": {"lr": 1e-2},
    "tokenizer": {"chat_template": "chatml"},
    "checkpoint": [{"type": "deepspeed"}],
}
"""Without a model."""


def recipe(model: str, stage: int = 0) -> dict[str, Any]:
    """A recipe that trains `model` in fp32."""
    zero = {"zero_optimization": {"stage": stage}}
    return {**RECIPE, "model": {"name_or_path": model, "dtype": "fp32"}, "deepspeed": zero}


@pytest.fixture(scope="module")
def saved(models: dict[str, str], workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of the tied model, made by one worker; its run went on to the end."""
    folder = tmp_path_factory.mktemp("saved")
    workers([{"do": "go_on", "recipe": recipe(models["tied"])}], 1, folder)
    return folder / "0"


def test_two_workers_go_on_from_what_one_saved(
    models: dict[str, str], workers: Any, saved: Path, tmp_path: Path
) -> None:
    """Losses, weights, schedule and the state of plugins, at ZeRO 2 and 3, as if nothing had happened."""
    cases = [{"do": "go_on", "recipe": recipe(models["tied"], stage), "load": str(saved / "state")} for stage in (2, 3)]
    expected = json.loads((saved / "result.json").read_text())
    for number, result in enumerate(workers(cases, 2, tmp_path)):
        assert "error" not in result, result
        torch.testing.assert_close(result["losses"], expected["losses"], atol=1e-5, rtol=0)
        assert result["probe"] == pytest.approx(expected["probe"], abs=1e-3)
        assert {key: result[key] for key in ("step", "lr", "notes", "sum")} == {
            key: expected[key] for key in ("step", "lr", "notes", "sum")
        }
        old = load_file(saved / "weights.safetensors")
        for name, value in load_file(tmp_path / str(number) / "weights.safetensors").items():
            torch.testing.assert_close(value, old[name], atol=1e-5, rtol=0)


def test_only_data_is_in_it(saved: Path) -> None:
    """JSON and safetensors; nothing that runs code when it is read."""
    assert {path.suffix for path in (saved / "state").iterdir()} == {".json", ".safetensors"}


def _change(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "another format": (_change("state.json", format=99), {}, r"has the format 99\n  expected: format 2"),
    "no JSON": (_cut("state.json"), {}, r"state.json` can't be read"),
    "other data": (lambda folder: None, {"rows": 8}, r"made with 7 training samples, and there are 8 now"),
    "damaged weights": (_cut("state-00000.safetensors"), {}, r"does not hold .* as its index says"),
    "a damaged state of a plugin": (_cut("plugins.safetensors"), {}, r"plugins.safetensors` can't be read"),
    "another model": (lambda folder: None, {"model": "untied"}, r"a checkpoint of another model: `lm_head.weight` is"),
}


def test_what_does_not_fit_is_refused(models: dict[str, str], workers: Any, saved: Path, tmp_path: Path) -> None:
    """With one message that names it."""
    cases = []
    for number, (change, other, _) in enumerate(REFUSED.values()):
        folder = tmp_path / f"copy-{number}"
        shutil.copytree(saved / "state", folder)
        change(folder)
        found = recipe(models[other.get("model", "tied")])
        cases.append({"do": "refuse", "recipe": found, "load": str(folder), "rows": other.get("rows", 7)})
    for (name, (_, _, message)), result in zip(REFUSED.items(), workers(cases, 1, tmp_path / "runs"), strict=True):
        assert re.search(message, result.get("error", "")), f"{name}: {result}"
