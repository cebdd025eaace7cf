"""The keys of `embed`: their spellings, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptrain.errors import DataError, RecipeError
from ptrain.recipe.load import load_recipe
from ptrain.testing.recipes import merged
from ptrain_embed.plugin import Embed


@pytest.mark.torch_free
@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"loss_temperature": 0.1}, {"temperature": 0.1}),
        ({"use_in_batch_negatives": False}, {"in_batch_negatives": False}),
        ({"mrl_dim": 256}, {"matryoshka": {256: 1.0}}),
        ({"matryoshka": [256, 64]}, {"matryoshka": {256: 1.0, 64: 1.0}}),
        ({"matryoshka": {"256": 0.5}}, {"matryoshka": {256: 0.5}}),
    ],
)
def test_spellings(given: dict[str, Any], read: dict[str, Any]) -> None:
    config = Embed.Config.model_validate(given)
    assert {name: getattr(config, name) for name in read} == read


@pytest.mark.torch_free
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "kl", "symmetric": True}, "`symmetric` belongs to `loss: infonce`, not to `kl`"),
        ({"loss": "cosent", "in_batch_negatives": False}, "`in_batch_negatives` belongs to `loss: infonce`"),
        ({"teacher_temperature": 2}, "`teacher_temperature` belongs to `loss: margin_mse` and `kl`"),
        ({"symmetric": True, "in_batch_negatives": False}, "`symmetric` tells queries of a batch apart"),
        ({"temperature": 0}, "temperature"),
        ({"matryoshka": {0: 1}}, "matryoshka"),
        ({"matryoshka": {8: -1}}, "matryoshka"),
        ({"loss": "triplet"}, "loss"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "positive": "b"}\n')
    recipe = {
        "type": "embed",
        "model": {"name_or_path": "x"},
        "data": {"sources": [{"type": "jsonl", "path": str(rows)}]},
    }
    with pytest.raises(RecipeError, match=message):
        load_recipe(merged(recipe, keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"matryoshka": [32, 128]}, "`matryoshka` has the size 128, and embeddings of this model have 64 dimensions"),
        ({"matryoshka": [32], "model": {"projection": 16}}, "has the size 32, .* have 16 dimensions"),
        ({"matryoshka": {64: 0, 32: 0}}, "gives every size the weight 0"),
    ],
)
def test_sizes_that_do_not_fit_the_model(
    keys: dict[str, Any], message: str, ptrain_recipe: Any, tmp_path: Path
) -> None:
    from ptrain.job import prepare_run

    recipe = merged(ptrain_recipe("embed"), {**keys, "output_dir": str(tmp_path / "run")})
    with pytest.raises(RecipeError, match=message):
        prepare_run(load_recipe(recipe), None)


LOSSES = ("infonce", "cosent", "margin_mse", "kl")


@pytest.mark.parametrize(
    ("columns", "taught", "message"),
    [
        ({"relations": [[0], [-1, 0]], "scores": [[0.5], []]}, {"cosent"}, "a positive"),
        ({"relations": [[1], [1, -1]], "scores": [[0.5], []]}, {"infonce", "cosent"}, "both with scores"),
        ({"relations": [[-1, 0]], "scores": [[0.5, 0.1]]}, {"cosent", "kl"}, "both with scores"),
        ({"relations": [[1, -1]], "scores": [[]]}, {"infonce"}, "two documents with scores"),
        ({"relations": [[1, -1]], "scores": [[0.5, 0.1]]}, set(LOSSES), ""),
    ],
)
def test_rows_with_nothing_to_learn(columns: dict[str, Any], taught: set[str], message: str) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Sequence as ListOf

    from ptrain_embed.fits import check_rows

    features = Features({"relations": ListOf(Value("int8")), "scores": ListOf(Value("float32"))})
    rows = Dataset.from_dict(columns, features=features)
    told = []
    for loss in LOSSES:
        count = Embed(Embed.Config.model_validate({"loss": loss})).objective.count
        if loss in taught:
            check_rows(rows, loss, count)
        else:
            with pytest.raises(DataError, match=f"nothing for `loss: {loss}` to learn") as error:
                check_rows(rows, loss, count)
            told.append(str(error.value))
    assert not message or any(message in one for one in told)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plan_follows_a_body_without_an_output_layer(kind: str, ptrain_recipe: Any, tmp_path: Path) -> None:
    from embed_folders import make_folder

    from ptrain.plan.devices import Device
    from ptrain.plan.forecast import forecast

    keys = {"model": {"name_or_path": str(make_folder(tmp_path / "model", kind))}, "data": {"max_length": 32}}
    made = forecast(
        load_recipe(merged(ptrain_recipe("embed"), keys)), tmp_path / "run", 1, Device("a GPU", "cuda", 10**9)
    )
    assert made.memory is not None and made.memory.activations and made.memory.logits == 0 and made.longest
