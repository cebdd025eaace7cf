"""Every key of the reference system works, or is refused by name with what to do instead."""

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
        "peft_config": {"peft_type": "LORA", "r": 8},
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

DPO = ("ref_model", "beta", "ignore_label_index", "label_smoothing", "reference_model_deepspeed")
SWIFTKV = ("logits_loss_temp", "hidden_loss_mult", "hidden_loss_layer")
SPECULATOR = (
    "speculator_path", "gen_train", "gen_train_simple", "gen_micro_batch_size", "gen_train_global_batch_size",
    "gen_train_micro_batch_size", "gen_prompt_length", "gen_seq_length",
)  # fmt: skip
SPECULATOR_MODEL = (
    "n_speculator_heads", "speculator_width", "speculator_tie_weights", "speculator_scale_input", "proj_dim",
    "emb_dim", "method", "tie_lstm_embs",
)  # fmt: skip
LONG = ("sequence_parallel_size", "tiled_mlp_compute", "activation_checkpoint_cpu_offload")
CONTRASTIVE = (
    "filesystem", "root_directory", "split_factor", "max_seq_length_query", "max_seq_length_doc",
    "eval_root_directories", "eval_split_factor", "eval_max_seq_length_query", "eval_max_seq_length_doc",
)  # fmt: skip

REFUSED: dict[str, dict[str, str]] = {
    "": {
        "skip_validation": "nothing to skip",
        **dict.fromkeys(LONG, "pip install ptrain-sequence-parallel, or leave it out"),
        "expert_parallel_size": "mixtures of experts",
        "arctic_moe": "mixtures of experts",
        "enable_arctic_moe_custom_optimization": "mixtures of experts",
        "enable_routing_replay": "mixtures of experts",
        "mem_profiler": "pickled",
        "mem_profiler_dir": "pickled",
        "mem_profiler_max_entries": "pickled",
        **dict.fromkeys(DPO, "ptrain-dpo"),
        **dict.fromkeys(SWIFTKV, "ptrain-swiftkv"),
        **dict.fromkeys(SPECULATOR, "ptrain-spec-decode"),
        **dict.fromkeys(("use_in_batch_negatives", "loss_temperature", "mrl_dim"), "ptrain-embed"),
        **dict.fromkeys(("local_rank", "global_rank", "world_size"), "launcher"),
    },
    "model": {
        **dict.fromkeys(("num_key_value_layers", "key_value_group_size"), "ptrain-swiftkv"),
        **dict.fromkeys((*SPECULATOR, *SPECULATOR_MODEL), "ptrain-spec-decode"),
        **dict.fromkeys(("moba_chunk_size", "moba_topk"), "MoBA"),
        **dict.fromkeys(("pooling", "kwargs"), "ptrain-embed"),
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
        **dict.fromkeys(("max_prompt_length", "dpo_prompt_truncation_mode"), "ptrain-dpo"),
        **dict.fromkeys(CONTRASTIVE, "ptrain-embed"),
    },
    "source": dict.fromkeys(("sql", "table_name", "dataset_uri", "column_mapping", "limit", "batch_size"), "Snowflake"),
}

REFUSED_TYPES: dict[str, dict[str, str]] = {
    "type": {
        "dpo": "pip install ptrain-dpo",
        "swiftkv": "pip install ptrain-swiftkv",
        "spec-decode": "pip install ptrain-spec-decode",
        "arctic-lstm-speculator": "pip install ptrain-spec-decode",
        "biencoder": "pip install ptrain-embed",
    },
    "model": {
        "liger": "write `huggingface`",
        "moba": "write `huggingface`",
        "swiftkv": "pip install ptrain-swiftkv",
        "biencoder": "pip install ptrain-embed",
    },
    "optimizer": {"fused_adam_moe": "write `fused_adam`", "cpu_adam_moe": "write `cpu_adam`"},
    "scheduler": {"wds": "write `wsd`"},
    "checkpoint": {
        "biencoder": "pip install ptrain-embed",
        "spec-decode": "pip install ptrain-spec-decode",
        "arctic-lstm-speculator": "pip install ptrain-spec-decode",
    },
    "source": {
        "snowflake": "`type: jsonl`",
        "ProjectGutenbergSFT": "`type: jsonl`",
        "HuggingFaceH4/ultrafeedback_binarized": "pip install ptrain-dpo",
    },
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
    """As where ptrain-core and ptrain-sft alone are installed."""
    return Catalog(tuple(o for o in Catalog.installed().all if o.distribution in ("ptrain-core", "ptrain-sft")))


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


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REFUSED_TYPES.items() for name in names])
def test_refused_types(installed: Catalog, kind: str, name: str) -> None:
    given = {**recipe("", {}), "type": name} if kind == "type" else recipe(kind, {"type": name})
    what = "trainer" if kind == "type" else kind
    with pytest.raises(RecipeError, match=f"there is no {what} `{name}`") as caught:
        load_recipe(given, catalog=installed)
    (problem,) = caught.value.problems
    assert REFUSED_TYPES[kind][name] in str(problem.fix)


@pytest.mark.parametrize("name", ["snowflake", "ProjectGutenbergSFT"])
def test_refused_names_of_sources(installed: Catalog, name: str) -> None:
    """Where a list of names holds one that is a type there."""
    with pytest.raises(RecipeError, match=f"there is no source `{name}` here: "):
        load_recipe({**recipe("", {}), "data": {"sources": ["a/b", name]}}, catalog=installed)


def test_a_number_of_rows(installed: Catalog) -> None:
    assert load_recipe(recipe("source", {"sample_count": 5}), catalog=installed)


def test_a_schedule_of_three_parts(installed: Catalog) -> None:
    keys = {"type": "wsd", "num_warmup_steps": 1, "num_decay_steps": 2, "min_lr_ratio": 0.1}
    assert load_recipe(recipe("scheduler", keys), catalog=installed)


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
def test_published_recipes_that_need_more(installed: Catalog, name: str, place: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPES / f"{name}.yaml", catalog=installed)
    (problem,) = caught.value.problems
    assert str(problem.where) == f"{RECIPES / name}.yaml:{place}"
    assert told in str(problem)
