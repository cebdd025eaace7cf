"""What doesn't go together is refused with one message, before any weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sequence_workers
import yaml
from harness import run

from ptrain.errors import PtrainError
from ptrain.testing.recipes import Material
from ptrain.testing.runs import prepare
from ptrain.testing.workers import run_workers

KEYS = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "workers": (3, {"size": 2}, r"`size` is 2, and the run has 3 workers.*one of 1, 3.*start 2 `--workers`"),
    "one worker": (1, {"size": 2}, r"`size` is 2, and the run has 1 worker, which.*one of 1\b"),
    "heads": (3, {"size": 3}, r"the model has 4 heads, which 3 workers \(`size`\) can't share.*one of 1, 2, 4"),
    "rows": (
        8, {"size": 2, "micro_batch_size": 5}, r"17 training samples for 4 groups of 2 workers: fewer than one batch of 20",
    ),
    "eager": (2, {"size": 2, "model": {"attn_implementation": "eager"}}, r"`attn_implementation: eager`.*fix: .*auto`"),
    "heads of a configuration": (
        4, {"size": 4, "model": {"name_or_path": "", "config": {"model_type": "llama", **KEYS}}}, r"the model has 6 heads",
    ),
    "layers of another kind": (
        2, {"size": 2, "model": {"name_or_path": "", "config": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], **KEYS}}},
        r"models of the type lfm2 have layers or an attention that can't be cut up.*fix: .*`size: 1`",
    ),
    "an attention of its own": (
        2, {"size": 2, "model": {"name_or_path": "", "config": {"model_type": "bloom", "hidden_size": 64, "n_head": 4, "n_layer": 2}}},
        r"models of the type bloom have layers or an attention that can't be cut up",
    ),
    "no attention": (
        2, {"size": 2, "model": {"name_or_path": "", "config": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}}},
        r"models of the type mamba have layers or an attention that can't be cut up",
    ),
    "experts": (
        1, {"size": 1, "tiled_mlp": True, "model": {"name_or_path": "", "config": {"model_type": "mixtral", **KEYS}}},
        r"MixtralForCausalLM can't compute its MLPs in tiles: layer 0 .*fix: write `tiled_mlp: auto`",
    ),
    "activations that are kept": (
        1, {"size": 1, "offload_activations": True, "model": {"disable_activation_checkpoint": True}},
        r"`offload_activations: true` has nothing to offload where `model.disable_activation_checkpoint` is true",
    ),
    "tiles of nothing": (1, {"size": 1, "tiled_mlp": 0}, r"plugins.sequence-parallel.tiled_mlp`.*at least 1"),
    "no worker": (1, {"size": 0}, r"plugins.sequence-parallel.size`.*at least 1"),
}  # fmt: skip


def recipe_of(
    material: Material, size: int, model: dict[str, Any] | None = None, micro_batch_size: int = 1, **keys: Any
) -> dict[str, Any]:
    """A tiny recipe."""
    return material.recipe(
        model=model or {}, tokenizer={"name_or_path": str(material.model)}, micro_batch_size=micro_batch_size,
        plugins={"sequence-parallel": {"size": size, **keys}},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_message(case: str, ptrain_material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what, where, and what would be right; nothing is left behind."""
    from transformers import PreTrainedModel

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)
    workers, changes, message = CASES[case]
    with pytest.raises(PtrainError) as raised:
        prepare(recipe_of(ptrain_material, **changes), tmp_path / "run", workers=workers)
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)
    assert raised.value.exit_code == 2 and len(raised.value.problems) == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def file(ptrain_material: Material, tmp_path: Path) -> Callable[[int], Path]:
    """Writes a recipe with a size."""

    def write(size: int) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe_of(ptrain_material, size), "output_dir": str(tmp_path / "run")}))
        return path

    return write


def test_check_and_run_say_where(file: Callable[[int], Path]) -> None:
    """`check` knows the heads of a model in a folder, but not the workers, and needs no torch; `run` knows both."""
    code, _, errors = run("check", file(3))
    assert code == 2 and re.search(r"recipe.yaml:\d+:\d+: the model has 4 heads, which 3 workers", errors)
    assert run("check", file(2))[0] == 0
    code, _, errors = run("run", file(4), "--workers", "2")
    assert code == 2 and re.search(r"recipe.yaml:\d+:\d+: `size` is 4, and the run has 2 workers", errors)


def test_what_workers_refuse(ptrain_material: Material, tmp_path: Path) -> None:
    """Groups that span machines, and a layer that mixes positions where nobody looks for it."""
    recipes = [
        {**recipe_of(ptrain_material, 2), "output_dir": str(tmp_path / name)} for name in ("apart", "together", "mixed")
    ]
    run_workers(sequence_workers.refused, recipes, log=tmp_path / "log", workers=2)
