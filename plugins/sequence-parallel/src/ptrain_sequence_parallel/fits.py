"""Whether a model's attention can be cut up over workers; told before any weight is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptrain import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def known_heads(model: Any) -> int | None:
    """The query heads of the recipe's model, where its configuration is in the recipe or in a folder.

    Args:
        model: the section `model` of the recipe.
    """
    keys: Mapping[str, Any] = getattr(model, "config", None) or {}
    if not keys and model.name_or_path:
        try:
            keys = json.loads(Path(model.name_or_path, "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    keys = {**keys, **keys.get("text_config", {}), **getattr(model, "hf_config_kwargs", {})}
    heads = keys.get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def divisors(number: int) -> str:
    """What divides `number`, in words."""
    return "one of " + ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def heads_fault(heads: int, size: int) -> str | None:
    """What is wrong with `size` workers for so many query heads."""
    return f"the model has {heads} heads, which {size} workers (`size`) can't share equally" if heads % size else None


def check_attention(config: PretrainedConfig, size: int) -> None:
    """Raise ModelError where the attention of a model can't be cut up over `size` workers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from ptrain.attention import by_documents

    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    if fault := heads_fault(heads, size):
        raise ModelError(fault, expected=f"`size` to be {divisors(heads)}")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if known else None
    if not heads or not by_documents(text) or (known and not model._supports_attention_backend):
        raise ModelError(
            f"models of the type {config.model_type} have layers or an attention that can't be cut up over workers",
            expected="layers with attention to the tokens before, through transformers' attention interface",
            fix="train it without `sequence-parallel`, or with `size: 1`",
        )


def check_mlps(config: PretrainedConfig) -> None:
    """Raise ModelError where a model has an MLP that can't be cut; of models of others it is said later."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    from ptrain_sequence_parallel import mlp

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        with torch.device("meta"):
            mlp.check(AutoModelForCausalLM.from_config(copy.deepcopy(config)))
