"""Folders whose weights are not those that their configuration describes: told, never filled with random numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import run
from safetensors.torch import load_file, save_file

NAME = "model.layers.1.mlp.up_proj.weight"


MISSING = rf"error: `.*base` lacks weights of the model .*\(1\): `{NAME}`"
SMALLER = rf"error: `.*base` does not fit its configuration: .*{NAME}"
MORE = r"warning: `.*base` has weights that the model has no place for \(1\): `another.weight`"


@pytest.mark.parametrize(
    ("damage", "stage", "code", "says"),
    [
        ("missing", 0, 2, MISSING),
        ("missing", 3, 2, MISSING),
        ("smaller", 0, 2, SMALLER),
        ("smaller", 3, 2, SMALLER),
        ("more", 0, 0, MORE),  # transformers does not report them where it loads into ZeRO-3's shards
    ],
)
def test_weights_that_are_not_the_model_s(
    damage: str, stage: int, code: int, says: str, recipes: Any, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    if damage == "more":
        weights["another.weight"] = weights[NAME].clone()
    else:
        weight = weights.pop(NAME)
        weights.update({NAME: weight[:-1].clone()} if damage == "smaller" else {})
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = recipes(
        model={"name_or_path": str(base)}, train_iters=1, output_dir=str(tmp_path / "run"),
        deepspeed={"zero_optimization": {"stage": stage}},
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found, out, err = run("run", tmp_path / "recipe.yaml")
    text = " ".join((out + err).split())
    assert found == code and re.search(says, text), text
    assert "LOAD REPORT" not in text
