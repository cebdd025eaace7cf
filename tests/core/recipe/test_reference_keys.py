"""Every key of the reference system that belongs to core, `sft` or `causal` works, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptrain.catalog import Catalog
from ptrain.errors import RecipeError
from ptrain.recipe import sections
from ptrain.recipe.elsewhere import KEYS, PARTS, Elsewhere
from ptrain.recipe.load import load_recipe

pytestmark = pytest.mark.torch_free

RECIPES = Path(__file__).parents[4] / "shared" / "reference-recipes"

WORKS: dict[str, dict[str, Any]] = {
    "": {
        "epochs": 2,
        "loss_log_interval": 5,
        "train_log_iter_interval": 0,
        "train_log_metrics_path": "m.jsonl",
        "gradient_accumulation_steps": 4,
        "micro_batch_size": 2,
        "seed": 1,
        "train_iters": 9,
        "eval_interval": 3,
        "eval_log_iter_interval": 2,
        "exit_iteration": 4,
        "exit_iteration_this_run": 2,
        "min_iterations": 5,
        "overfit_first_batch": True,
        "kill_switch_path": "/tmp/k",
        "checkpoint": [],
        "deepspeed": {},
        "logger": {"output_dir": "logs", "level": "INFO", "print_output_ranks": [0, 3], "file_output_ranks": "*"},
        "wandb": {"enable": True, "entity": "e", "project": "p", "name": "n"},
    },
    "model": {
        "type": "huggingface",
        "name_or_path": "m",
        "dtype": "torch.bfloat16",
        "attn_implementation": "flash_attention_2",
        "disable_activation_checkpoint": True,
        "hf_config_kwargs": {"num_hidden_layers": 2},
        "save_name": "s",
    },
    "tokenizer": {"type": "huggingface", "name_or_path": "t"},
    "optimizer": {"type": "fused_adam", "weight_decay": 0.1, "betas": [0.9, 0.99], "learning_rate": 1e-5},
    "scheduler": {
        "type": "huggingface",
        "name": "cosine",
        "warmup_ratio": 0.1,
        "scheduler_specific_kwargs": {"num_cycles": 1},
    },
    "data": {
        "type": "sft",
        "eval_sources": ["a/b"],
        "train_eval_split": [0.9, 0.1],
        "max_length": 100,
        "num_proc": 2,
        "dl_num_workers": 1,
        "seed": 3,
        "cache_dir": "/tmp/c",
        "fail_on_missing_cache": True,
        "mask_inputs": False,
        "filter_samples": True,
        "pack_samples": True,
        "ignore_empty_think": True,
        "div_length": 64,
        "pad_to": "max_length",
    },
    "source": {
        "type": "huggingface_instruct",
        "split": "train",
        "sample_ratio": 0.5,
        "sample_seed": 4,
        "process": False,
        "name_or_path": "a/b:train[:10]",
        "kwargs": {"name": "x"},
        "split_mapping": {"train": "t"},
        "role_mapping": {"user": "q"},
        "content_key": "text",
    },
    "checkpoint": {
        "type": "deepspeed",
        "output_dir": "o",
        "enabled": True,
        "auto_resume": True,
        "save_every_n_steps": 3,
        "save_every_n_epochs": 1,
        "save_end_of_training": True,
    },
}

REFUSED: dict[str, dict[str, str]] = {
    "": {
        "skip_validation": "nothing to skip",
        "sequence_parallel_size": "ptrain-sequence-parallel",
        "expert_parallel_size": "mixtures of experts",
        "arctic_moe": "mixtures of experts",
        "enable_arctic_moe_custom_optimization": "mixtures of experts",
        "enable_routing_replay": "mixtures of experts",
        "activation_checkpoint_cpu_offload": "recomputes",
        "tiled_mlp_compute": "does not patch",
        "mem_profiler": "pickled",
        "mem_profiler_dir": "pickled",
        "mem_profiler_max_entries": "pickled",
        "ref_model": "ptrain-dpo",
        "label_smoothing": "ptrain-dpo",
        "logits_loss_temp": "ptrain-swiftkv",
        "gen_train": "ptrain-spec-decode",
        "mrl_dim": "ptrain-embed",
        "world_size": "launcher",
    },
    "model": {
        "num_key_value_layers": "ptrain-swiftkv",
        "gen_seq_length": "ptrain-spec-decode",
        "moba_topk": "MoBA",
        "n_speculator_heads": "ptrain-spec-decode",
        "pooling": "ptrain-embed",
        "peft_config": "adapters",
    },
    "tokenizer": {"tokenize_kwargs": "whole"},
    "scheduler": {"learning_rate": "`lr` in `optimizer`"},
    "data": {
        "use_data_cache": "always cached",
        "cache_processed_data": "always cached",
        "cache_fs_type": "file system",
        "always_max_length": "overlength",
        "drop_last": "once an epoch",
        "fuse_positions_prob": "never see each other",
        "repeat_to_pack_max_length": "counts once",
        "max_prompt_length": "ptrain-dpo",
        "root_directory": "ptrain-embed",
    },
    "source": {"sql": "Snowflake"},
}


def recipe(section: str, keys: dict[str, Any], trainer: str = "sft") -> dict[str, Any]:
    base: dict[str, Any] = {"type": trainer, "model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    if section == "":
        return {**base, **keys}
    if section in ("source", "checkpoint"):
        entry = {"name_or_path": "a/b", **keys} if section == "source" else {"type": "huggingface", **keys}
        return {**base, "data": {"sources": [entry]}} if section == "source" else {**base, "checkpoint": [entry]}
    return {**base, section: {**base.get(section, {}), **keys}}


@pytest.fixture(scope="module")
def installed() -> Catalog:
    return Catalog.installed()


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in WORKS.items() for key in keys])
def test_works(installed: Catalog, section: str, key: str) -> None:
    assert load_recipe(recipe(section, {key: WORKS[section][key]}), catalog=installed)


def test_all_of_a_section_together(installed: Catalog) -> None:
    for section, keys in WORKS.items():
        assert load_recipe(recipe(section, keys), catalog=installed)


@pytest.mark.parametrize("column", ["text", "story"])
def test_works_for_causal(installed: Catalog, column: str) -> None:
    given = recipe("source", {"type": "huggingface_causal", "column": column}, "causal")
    assert load_recipe(given, catalog=installed).recipe.data.sources[0].model_dump()["column"] == column


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_schedules(installed: Catalog, name: str) -> None:
    assert load_recipe(recipe("scheduler", {"name": name}), catalog=installed)


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in REFUSED.items() for key in keys])
def test_refused_by_name(installed: Catalog, section: str, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(section, {key: 1}), catalog=installed)
    (problem,) = caught.value.problems
    assert f"`{key}`" in problem.message
    assert REFUSED[section][key] in str(problem)
    assert problem.fix


@pytest.mark.parametrize(
    ("kind", "name"), [("model", "liger"), ("optimizer", "fused_adam_moe"), ("optimizer", "cpu_adam_moe")]
)
def test_refused_types(installed: Catalog, kind: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"there is no {kind} `{name}` here: "):
        load_recipe(recipe(kind, {"type": name}), catalog=installed)


def test_a_name_that_the_reference_system_misspelt(installed: Catalog) -> None:
    with pytest.raises(RecipeError, match="there is no scheduler `wds`") as caught:
        load_recipe(recipe("scheduler", {"type": "wds"}), catalog=installed)
    assert caught.value.problems[0].fix == "write `wsd`"


def advice() -> list[tuple[str, str, Elsewhere]]:
    return [
        (table, name, row) for tables in (KEYS, PARTS) for table, rows in tables.items() for name, row in rows.items()
    ]


@pytest.mark.parametrize(("table", "name", "row"), advice(), ids=lambda one: one if isinstance(one, str) else "")
def test_advice_has_a_reason_and_a_remedy(table: str, name: str, row: Elsewhere) -> None:
    assert row.reason
    assert row.fix
    assert not row.reason.endswith(".")


def test_no_advice_on_what_core_itself_has(installed: Catalog) -> None:
    core = {"": sections.CoreConfig, "data": installed.load(installed.find("trainer", "sft")).Data}
    core |= {
        kind: installed.load(installed.find(kind, "huggingface")).Config for kind in ("model", "tokenizer", "scheduler")
    }
    for section, config in core.items():
        assert set(KEYS[section]) & set(config.model_fields) == set()
    for kind, rows in PARTS.items():
        ours = {offer.name for offer in installed.offers(kind) if offer.distribution == "ptrain-core"}
        assert set(rows) & ours == set()


@pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes of the reference system are not there")
@pytest.mark.parametrize("name", ["sft-quickstart", "sft-llama-8b", "causal"])
def test_published_recipes_are_right(installed: Catalog, name: str) -> None:
    loaded = load_recipe(RECIPES / f"{name}.yaml", catalog=installed)
    assert loaded.warnings == []
    assert loaded.recipe.type == name.split("-")[0]


@pytest.mark.skipif(not RECIPES.is_dir(), reason="the recipes of the reference system are not there")
@pytest.mark.parametrize(
    ("name", "place", "told"),
    [
        ("swiftkv", "1:7", "pip install ptrain-swiftkv"),
        ("spec-decode", "1:7", "pip install ptrain-spec-decode"),
        ("custom-trainer", "2:7", "add `--allow-code`"),
    ],
)
def test_published_recipes_that_need_more(name: str, place: str, told: str) -> None:
    # As where ptrain-core and ptrain-sft alone are installed.
    catalog = Catalog(tuple(o for o in Catalog.installed().all if o.distribution in ("ptrain-core", "ptrain-sft")))
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPES / f"{name}.yaml", catalog=catalog)
    (problem,) = caught.value.problems
    assert str(problem.where) == f"{RECIPES / name}.yaml:{place}"
    assert told in str(problem)
