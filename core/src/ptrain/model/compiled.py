"""Layers compiled by torch (`model.compile`): what lies between matrix products becomes few kernels instead of many.

Each layer is compiled by itself, and as all have the same code, that is done once for all. Attention stays outside:
it is cut by where documents begin, which is different in every batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ptrain.errors import ModelError
from ptrain.model.attention import leave_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel, device: torch.device) -> int:
    """Have torch compile the layers of `model` when they are first called; how many there are.

    Weights keep their names. Layers are compiled again where gradients are switched off, and not for other sizes.

    Raises:
        ModelError: torch can't compile here, or transformers doesn't know the layers of this model.
    """
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelError(f"the layers of {type(model).__name__} can't be compiled: transformers doesn't name them")
    if (reason := failure(device)) is not None:
        raise ModelError(
            f"torch can't compile here: {reason}",
            expected="a C++ compiler for models on a CPU, Triton for those on a GPU",
            fix="install it, or leave out `model.compile`",
        )
    leave_alone()
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def failure(device: torch.device) -> str | None:
    """Why torch can't compile for `device`, or None: a small function is tried."""

    def doubled(values: torch.Tensor) -> torch.Tensor:
        return values * 2 if torch.compiler.is_compiling() else values

    try:
        found: Any = torch.compile(doubled)(torch.ones(4, device=device))
    except Exception as error:  # whatever a compiler raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None if found[0] == 2 else "it is switched off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE is set)"
