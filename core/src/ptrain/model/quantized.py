"""Weights rounded by bitsandbytes, beside which adapters are trained (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ptrain.errors import ModelError
from ptrain.recipe.suggest import closest

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What torch calls the dtypes of a recipe."""


def rounding(keys: Mapping[str, Any], dtype: str) -> BitsAndBytesConfig:
    """What `model.quantization_config` describes; products are computed in `dtype`, the model's, unless it says so.

    Raises:
        ModelError: a key or a value is wrong, or it says neither 4 nor 8 bits.
    """
    from transformers import BitsAndBytesConfig

    known = sorted(set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"})
    for key in keys:
        if key not in known:
            guess = closest(key, known)
            raise ModelError(
                f"bitsandbytes has no key `{key}` (in `model.quantization_config`)",
                expected="some of " + ", ".join(known), fix=f"write `{guess}`" if guess else None,
            )  # fmt: skip
    if not keys.get("load_in_4bit") and not keys.get("load_in_8bit"):
        raise ModelError(
            "`model.quantization_config` says neither `load_in_4bit: true` nor `load_in_8bit: true`", fix="add one"
        )
    given = {"bnb_4bit_compute_dtype": DTYPES[dtype], "bnb_4bit_quant_storage": "uint8", **keys}
    try:
        return BitsAndBytesConfig(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"`model.quantization_config` is wrong: {error}") from error


def keep_gradients(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from packing the weights of `model` at the first evaluation on a CPU.

    What it then multiplies with has no gradient, and the weights stay packed when training goes on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
