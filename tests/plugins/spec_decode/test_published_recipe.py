"""The published recipe of `spec-decode`, whose keys of the trainer stand under `model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptrain.errors import RecipeError
from ptrain.recipe.load import load_recipe

pytestmark = pytest.mark.torch_free

RECIPES = Path(__file__).parents[4] / "shared" / "reference-recipes"


@pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes of the reference system are not there")
def test_it_is_right() -> None:
    recipe: Any = load_recipe(RECIPES / "spec-decode.yaml").recipe
    assert (recipe.trainer.gen_prompt_length, recipe.trainer.gen_seq_length) == (64, 256)
    assert recipe.model.type == "speculator" and recipe.model.n_speculator_heads == 3


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"type": "arctic-lstm-speculator"}, "write `type: spec-decode` with `model: {speculator: lstm}`"),
    ({"checkpoint": [{"type": "arctic-lstm-speculator"}]}, "then write `speculator`"),
    ({"gen_train_simple": True}, "write `gen_train: true`"),
    ({"model": {"name_or_path": "m", "type": "mlp_speculator"}}, "and no type of the model"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES)
def test_names_that_are_others_here(changes: dict[str, Any], said: str) -> None:
    """What to write is told, also where the package is installed."""
    base = {"type": "spec-decode", "model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    with pytest.raises(RecipeError) as caught:
        load_recipe({**base, **changes})
    assert said in str(caught.value)
