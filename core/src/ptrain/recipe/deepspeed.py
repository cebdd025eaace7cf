"""Keys of DeepSpeed that a recipe may not set: what it derives from its own keys, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptrain.errors import Problem
from ptrain.recipe.document import Document

DERIVED: Mapping[str, str] = {
    "train_batch_size": "micro_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "bf16.enabled": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16.enabled": "model.dtype",
    "amp": "model.dtype",
    "checkpoint": "checkpoint",
    "wandb": "wandb",
}
"""Keys that follow from a key of the recipe."""

_OWN = "core divides the loss and decides when a step is over"
_REMOVED = "DeepSpeed no longer has it"
REFUSED: Mapping[str, str] = {
    "zero_allow_untested_optimizer": "ptrain always sets it",
    "zero_force_ds_cpu_optimizer": "ptrain always sets it",
    "managed_gradient_accumulation": _OWN,
    "gradient_allreduce_op": _OWN,
    "sequence_parallel_size": "sequences are split by the feature `sequence-parallel` of `plugins`",
    "dataloader_drop_last": "ptrain deals out the data itself",
    "data_efficiency": "the order of the data is core's, so that a run can be resumed exactly",
    "curriculum_learning": "the order of the data is core's, so that a run can be resumed exactly",
    "autotuning": "it works in DeepSpeed's own launcher alone",
    "compile": "ptrain does not compile with DeepSpeed",
    "datastates_ckpt": "ptrain writes its checkpoints itself",
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.round_robin_gradients": "DeepSpeed then gives other fp32 weights than it trains to checkpoints",
    "zero_optimization.zenflow": "core decides when a step is over, and ZenFlow delays it",
    "hybrid_engine": "ptrain does not generate with DeepSpeed",
    "weight_quantization": "ptrain does not train quantised weights",
    "pipeline": "ptrain has no pipeline parallelism",
    "tensor_parallel": "ptrain has no tensor parallelism",
    "expert_parallel": "no package of ptrain trains mixtures of experts in parallel yet",
    "use_data_before_expert_parallelism": "no package of ptrain trains mixtures of experts in parallel yet",
}
"""Keys of DeepSpeed that a recipe may not set, with the reason."""


def take_refused(document: Document, block: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """`block` without the keys that a recipe may not set, and a problem for each of those."""
    kept, problems = {key: dict(v) if isinstance(v, Mapping) else v for key, v in block.items()}, []
    for name in [*DERIVED, *REFUSED]:
        outer, _, inner = name.partition(".")
        holder = kept.get(outer) if inner else kept
        if not isinstance(holder, dict) or (inner or outer) not in holder:
            continue
        del holder[inner or outer]
        problems.append(_refusal(document, name))
    return kept, problems


def _refusal(document: Document, name: str) -> Problem:
    where = document.position(("deepspeed", *name.split(".")))
    if name in REFUSED:
        return Problem(f"`deepspeed.{name}` can't be set in a recipe: {REFUSED[name]}", where, fix="leave it out")
    key = DERIVED[name]
    own = document.keys.get(tuple(key.split(".")))
    line = f" ({own})" if own else ""
    return Problem(
        f"`deepspeed.{name}` follows from the recipe's `{key}`{line}", where, "one place that says it",
        f"remove it{'' if own else f' and set `{key}`'}",
    )  # fmt: skip
