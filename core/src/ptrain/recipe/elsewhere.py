"""Keys and names of the reference system that are not here: where they went, or why they are gone.

A row is looked at only where a recipe uses a name that nobody who is installed knows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Elsewhere:
    """Why a name is not known here, and what to do."""

    reason: str
    fix: str


def _package(distribution: str, then: str = "") -> Elsewhere:
    return Elsewhere(f"it comes with the package {distribution}", f"pip install {distribution}{then}")


_SWIFTKV = _package("ptrain-swiftkv")
_DPO = _package("ptrain-dpo")
_SPEC = _package("ptrain-spec-decode")
_SPEC_MLP = _package("ptrain-spec-decode", ", then write `type: spec-decode` (and no type of the model)")
_SPEC_LSTM = _package(
    "ptrain-spec-decode", ", then write `type: spec-decode` with `model: {speculator: lstm}` (and no type of the model)"
)
_SPEC_SAVED = _package("ptrain-spec-decode", ", then write `speculator`")
_SPEC_SIMPLE = Elsewhere("ptrain-spec-decode generates in one way alone", "write `gen_train: true`")
_EMBED = _package("ptrain-embed")
_LONG = _package("ptrain-sequence-parallel", ", or leave it out where it is `false`")
_MOE = Elsewhere("no package of ptrain trains mixtures of experts in parallel yet", "leave it out")
_MOBA = "no package of ptrain has MoBA attention yet"
_MOBA_KEY = Elsewhere(_MOBA, "leave it out")
_SNOWFLAKE = Elsewhere(
    "no package of ptrain reads from Snowflake yet", "export the rows to a JSONL file and use `type: jsonl`"
)
_MEMORY = Elsewhere(
    "ptrain writes no pickled memory profiles",
    "record one in your own code: `torch.cuda.memory._record_memory_history()` in a `pre-step` callback",
)
_CACHED = Elsewhere("prepared data is always cached, keyed by its content", "leave it out")
_LAUNCHER = Elsewhere("the launcher sets it", "leave it out")

_DPO_KEYS = ("ref_model", "beta", "ignore_label_index", "label_smoothing", "reference_model_deepspeed")
_SWIFTKV_KEYS = ("logits_loss_temp", "hidden_loss_mult", "hidden_loss_layer")
_SPEC_KEYS = (
    "speculator_path", "gen_train", "gen_micro_batch_size", "gen_train_global_batch_size",
    "gen_train_micro_batch_size", "gen_prompt_length", "gen_seq_length",
)  # fmt: skip
_SPEC_MODEL_KEYS = (
    "n_speculator_heads", "speculator_width", "speculator_tie_weights", "speculator_scale_input", "proj_dim",
    "emb_dim", "method", "tie_lstm_embs",
)  # fmt: skip
_EMBED_DATA_KEYS = (
    "filesystem", "root_directory", "split_factor", "max_seq_length_query", "max_seq_length_doc",
    "eval_root_directories", "eval_split_factor", "eval_max_seq_length_query", "eval_max_seq_length_doc",
)  # fmt: skip

KEYS: Mapping[str, Mapping[str, Elsewhere]] = {
    "": {
        "sequence_parallel_size": _package("ptrain-sequence-parallel", ", or leave it out where it is 1"),
        "tiled_mlp_compute": _LONG,
        "activation_checkpoint_cpu_offload": _LONG,
        "expert_parallel_size": _MOE,
        "arctic_moe": _MOE,
        "enable_arctic_moe_custom_optimization": _MOE,
        "enable_routing_replay": _MOE,
        "mem_profiler": _MEMORY,
        "mem_profiler_dir": _MEMORY,
        "mem_profiler_max_entries": _MEMORY,
        "skip_validation": Elsewhere(
            "a part is validated by its own `type`, so there is nothing to skip", "leave it out"
        ),
        "local_rank": _LAUNCHER,
        "global_rank": _LAUNCHER,
        "world_size": _LAUNCHER,
        **dict.fromkeys(_DPO_KEYS, _DPO),
        **dict.fromkeys(_SWIFTKV_KEYS, _SWIFTKV),
        **dict.fromkeys(_SPEC_KEYS, _SPEC),
        "gen_train_simple": _SPEC_SIMPLE,
        "use_in_batch_negatives": _EMBED,
        "loss_temperature": _EMBED,
        "mrl_dim": _EMBED,
    },
    "model": {
        "num_key_value_layers": _SWIFTKV,
        "key_value_group_size": _SWIFTKV,
        "moba_chunk_size": _MOBA_KEY,
        "moba_topk": _MOBA_KEY,
        **dict.fromkeys(_SPEC_KEYS, _SPEC),
        "gen_train_simple": _SPEC_SIMPLE,
        **dict.fromkeys(_SPEC_MODEL_KEYS, _SPEC),
        "pooling": _EMBED,
        "kwargs": _EMBED,
    },
    "tokenizer": {
        "tokenize_kwargs": Elsewhere(
            "text is tokenised whole and without added tokens, so that nothing is cut or doubled unseen",
            "leave it out; `data.max_length` bounds the length",
        ),
    },
    "scheduler": {
        "learning_rate": Elsewhere("the learning rate belongs to the optimizer", "write `lr` in `optimizer`"),
        "lr": Elsewhere("the learning rate belongs to the optimizer", "write `lr` in `optimizer`"),
    },
    "data": {
        "use_data_cache": _CACHED,
        "cache_processed_data": _CACHED,
        "cache_fs_type": Elsewhere(
            "each machine prepares its data once, on whatever file system `data.cache_dir` is", "leave it out"
        ),
        "always_max_length": Elsewhere(
            "no row is filled up beyond its own text", "use `overlength: split` and `pack_samples: true`"
        ),
        "drop_last": Elsewhere("every row is trained on once an epoch", "leave it out"),
        "fuse_positions_prob": Elsewhere("packed documents never see each other", "leave it out"),
        "repeat_to_pack_max_length": Elsewhere("a row counts once, however short it is", "leave it out"),
        "max_prompt_length": _DPO,
        "dpo_prompt_truncation_mode": _DPO,
        **dict.fromkeys(_EMBED_DATA_KEYS, _EMBED),
    },
    "source": {
        **dict.fromkeys(("sql", "table_name", "dataset_uri", "column_mapping", "limit", "batch_size"), _SNOWFLAKE),
    },
}  # fmt: skip
"""By section ("" is the top level), then by key."""

FEATURES: Mapping[str, str] = dict.fromkeys(
    ("sequence_parallel_size", "tiled_mlp_compute", "activation_checkpoint_cpu_offload"), "sequence-parallel"
)
"""Top-level keys that mean keys of a feature, as its `Config.aliases` say; where it is installed, a recipe with one of
them need not name it."""

PARTS: Mapping[str, Mapping[str, Elsewhere]] = {
    "trainer": {
        "swiftkv": _SWIFTKV,
        "dpo": _DPO,
        "spec-decode": _SPEC,
        "mlp_speculator": _SPEC_MLP,
        "mlp-speculator": _SPEC_MLP,
        "arctic-lstm-speculator": _SPEC_LSTM,
        "lstm_speculator": _SPEC_LSTM,
        "biencoder": _EMBED,
        "embed": _EMBED,
        "moba": Elsewhere(_MOBA, "write `sft`"),
        "sft": _package("ptrain-sft"),
        "causal": _package("ptrain-sft"),
    },
    "plugin": {"sequence-parallel": _package("ptrain-sequence-parallel")},
    "model": {
        "swiftkv": _SWIFTKV,
        "moba": Elsewhere(_MOBA, "write `huggingface`"),
        "spec-decode": _SPEC_MLP,
        "mlp-speculator": _SPEC_MLP,
        "mlp_speculator": _SPEC_MLP,
        "arctic-lstm-speculator": _SPEC_LSTM,
        "biencoder": _EMBED,
        "embed": _EMBED,
        "liger": Elsewhere(
            "fused kernels are no other kind of model here, and Liger's are not used yet",
            "write `huggingface`",
        ),
    },
    "checkpoint": {"biencoder": _EMBED, "spec-decode": _SPEC_SAVED, "arctic-lstm-speculator": _SPEC_SAVED},
    "optimizer": {
        "fused_adam_moe": Elsewhere(_MOE.reason, "write `fused_adam`"),
        "cpu_adam_moe": Elsewhere(_MOE.reason, "write `cpu_adam`"),
    },
    "source": {
        "snowflake": _SNOWFLAKE,
        "HuggingFaceH4/ultrafeedback_binarized": _DPO,
        "contrastive_pretokenized": _EMBED,
        "ProjectGutenbergSFT": Elsewhere(
            "no package of ptrain offers it", "write the books as rows of a JSONL file, `type: jsonl`"
        ),
    },
    "data": {"dpo": _DPO, "contrastive_pretokenized": _EMBED},
}
"""By kind, then by the name that a recipe gives as `type`."""


def keys_of(features: Container[str]) -> set[str]:
    """The top-level keys that mean one of these features."""
    return {key for key, feature in FEATURES.items() if feature in features}


def key_elsewhere(section: str, key: str) -> Elsewhere | None:
    """What became of `key` of `section` ("" is the top level, "source" an entry of `data.sources`)."""
    return KEYS.get(section, {}).get(key)


def part_elsewhere(kind: str, name: str) -> Elsewhere | None:
    """Where the part `name` of `kind` comes from, if ptrain knows."""
    return PARTS.get(kind, {}).get(name)
