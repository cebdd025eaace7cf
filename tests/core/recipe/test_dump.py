"""A recipe as plain data and back, and the hash of what decides its results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptrain.recipe.dump import WITHOUT_EFFECT, dump, result_hash
from ptrain.recipe.load import Loaded
from ptrain.recipe.sections import CoreConfig, DataConfig, Recipe
from ptrain.recipe.tree import read
from ptrain.recipe.yaml12 import write

pytestmark = pytest.mark.torch_free

Load = Callable[..., Loaded]

count = st.integers(0, 10**9)
share = st.floats(0, 1)
text = st.text(max_size=20)
free = st.dictionaries(text, st.none() | st.booleans() | count | text | st.lists(text, max_size=2), max_size=3)


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


sources = st.lists(
    st.just("a/b")
    | some(name_or_path=st.just("x"), sample_count=st.integers(1, 9), role_mapping=st.just({"a": "b"})).filter(
        lambda one: "name_or_path" in one
    ),
    min_size=1,
    max_size=3,
)
recipes = st.fixed_dictionaries(
    {
        "type": st.just("tiny"),
        "model": some(name_or_path=text, dtype=st.sampled_from(["fp32", "half", "torch.bfloat16"]), config=free),
        "data": sources.flatmap(
            lambda made: st.fixed_dictionaries(
                {"sources": st.just(made)}, optional={"max_length": st.integers(1, 99), "pack": st.booleans()}
            )
        ),
    },
    optional={
        "seed": count,
        "epochs": st.floats(0, 100),
        "temperature": share,
        "metadata": free,
        "output_dir": st.just("out/x"),
        "optimizer": some(lr=share, betas=st.just([0.5, 0.9])),
        "tokenizer": some(chat_template=text),
        "scheduler": st.just({"type": "wsd", "num_decay_steps": 3}),
        "logger": some(print_output_ranks=st.just([0, 1])),
        "checkpoint": st.just([{"type": "huggingface", "output_dir": "o"}]),
        "trackers": st.just(["shout"]),
        "plugins": some(splitter=some(size=st.integers(1, 9), halves=some(left=count))),
        "deepspeed": some(
            zero_optimization=some(stage=st.integers(1, 3), reduce_bucket_size=count), steps_per_print=count
        ),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(recipes, st.booleans())
def test_round_trip(load: Load, data: dict[str, Any], defaults: bool) -> None:
    recipe = load(data).recipe
    plain = dump(recipe, defaults=defaults)
    assert json.loads(json.dumps(plain)) == plain
    again = load(plain).recipe
    assert again == recipe
    assert dump(again, defaults=defaults) == plain
    assert result_hash(again) == result_hash(recipe)
    assert load(read(write(plain)).data).recipe == recipe


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(recipes)
def test_what_was_given_stays_what_was_given(load: Load, data: dict[str, Any]) -> None:
    recipe = load(data).recipe
    again = load(dump(recipe)).recipe
    assert again.model_fields_set == recipe.model_fields_set
    assert again.model.model_fields_set | {"type"} == recipe.model.model_fields_set | {"type"}
    assert again.trainer.model_fields_set == recipe.trainer.model_fields_set


def test_form(load: Load) -> None:
    recipe = load("type: tiny\ntemp: 2\nmodel: {gen_length: 3}\ndata: {sources: [a]}\noptimizer: {lr: 1}\n").recipe
    assert dump(recipe) == {
        "type": "tiny",
        "temperature": 2.0,
        "gen_length": 3,
        "model": {"type": "huggingface"},
        "data": {"type": "tiny", "sources": [{"type": "named", "name_or_path": "a"}]},
        "optimizer": {"type": "adamw", "learning_rate": 1.0},
        "tokenizer": {"type": "huggingface"},
        "scheduler": {"type": "huggingface"},
    }
    assert dump(recipe, defaults=True)["micro_batch_size"] == 1


MINIMAL = "type: tiny\nmodel: {}\ndata: {sources: [a]}\n"


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=x",
        "wandb.enable=true",
        "logger.level=INFO",
        "data.num_proc=3",
        "data.cache_dir=/c",
        "eval_interval=7",
        "data.eval_sources=[b]",
        "trackers=[shout]",
        "metadata={a: 1}",
        "loss_log_interval=3",
        "exit_iteration=3",
        "seed=42",
        "checkpoint=[huggingface]",
    ],
)
def test_hash_stays(load: Load, override: str) -> None:
    assert result_hash(load(MINIMAL, override).recipe) == result_hash(load(MINIMAL).recipe)


@pytest.mark.parametrize(
    "override",
    [
        "seed=43",
        "optimizer.lr=1",
        "data.sources=[b]",
        "data.max_length=3",
        "data.seed=1",
        "data.pack=true",
        "temperature=3",
        "plugins.splitter.size=2",
        "deepspeed.zero_optimization.stage=1",
        "epochs=2",
        "micro_batch_size=2",
        "model.dtype=fp32",
        "data.train_eval_split=[0.5,0.5]",
        "scheduler.name=cosine",
        "train_iters=5",
        "tokenizer.chat_template=x",
    ],
)
def test_hash_changes(load: Load, override: str) -> None:
    assert result_hash(load(MINIMAL, override).recipe) != result_hash(load(MINIMAL).recipe)


def test_hash_without_a_feature_without_effect(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a feature may be added, changed and left out."""
    with_it = load(MINIMAL, "plugins.splitter.size=2").recipe
    before = result_hash(with_it)
    monkeypatch.setattr(type(with_it.plugins["splitter"]), "without_effect", True)
    assert result_hash(with_it) == result_hash(load(MINIMAL).recipe) != before


def test_hash_of_code(load: Load) -> None:
    recipe = load(MINIMAL).recipe
    assert result_hash(recipe, "a") != result_hash(recipe, "b")


def test_what_has_no_effect_exists() -> None:
    known = (
        set(CoreConfig.model_fields) | set(Recipe.model_fields) | {f"data.{name}" for name in DataConfig.model_fields}
    )
    assert known >= WITHOUT_EFFECT
