"""Fixtures of real runs: a tiny model on disk, recipes, prepared run directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptrain.testing.recipes import merged
from ptrain.testing.rows import conversations, write_rows


@pytest.fixture(scope="session")
def tiny_model(ptrain_model: Path) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return ptrain_model


Recipes = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def recipes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """Makes a recipe as a mapping: a tiny run on ragged rows, with nested changes."""
    shared = tmp_path_factory.mktemp("shared")
    chats = write_rows(shared / "chats.jsonl", conversations(29))
    texts = write_rows(
        shared / "texts.jsonl", ({"text": row["messages"][1]["content"]} for row in conversations(60, seed=3))
    )

    def make(kind: str = "sft", **changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "type": kind,
            "model": {"name_or_path": str(tiny_model), "dtype": "fp32"},
            "data": {
                "sources": [{"type": "jsonl", "path": str(chats if kind == "sft" else texts)}],
                "cache_dir": str(shared / "cache"),
                "max_length": 256 if kind == "sft" else 48,
            },
            "optimizer": {"lr": 1e-3},
            "epochs": 2,
            "loss_log_interval": 0,
        }
        if kind == "sft":
            base["tokenizer"] = {"chat_template": "chatml"}
        return merged(base, changes)

    return make


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Path]:
    """Prepares a recipe given as a mapping and returns the file that workers start from."""
    from ptrain.job import prepare_run
    from ptrain.recipe.load import load_recipe

    number = iter(range(10_000))

    def prepare(recipe: Mapping[str, Any], name: str | None = None, resume: bool = False) -> Path:
        folder = tmp_path / (name or f"run-{next(number)}")
        return prepare_run(load_recipe(merged(recipe, {"output_dir": str(folder)})), None, resume=resume)

    return prepare


SAVES = [
    {"type": "deepspeed", "save_every_n_steps": 50},
    {"type": "huggingface", "save_end_of_training": True},
]


@pytest.fixture
def recipe_file(recipes: Any, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe as YAML."""

    def write(name: str = "run", **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        recipe = merged(recipes(micro_batch_size=2, checkpoint=SAVES, epochs=3), changes)
        path.write_text(yaml.safe_dump(merged({"output_dir": str(tmp_path / name)}, recipe)))
        return path

    return write
