"""A SwiftKV model as it begins: its configuration from a plain one, its new weights from those of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ptrain import ModelError
from ptrain.weights import assign, whole
from ptrain_swiftkv.models import FAMILIES

SUFFIX = "_swiftkv"
"""What is trained has the name of what it stands for, and this."""


def student_config(base: Any, kept: int, size: int) -> Any:
    """The configuration of a student of the model that `base` describes.

    Args:
        kept: `num_key_value_layers`.
        size: `key_value_group_size`.

    Raises:
        ModelError: the family is not supported, or has not these layers.
    """
    family = FAMILIES.get(base.model_type)
    if family is None:
        known = ", ".join(f"`{name}`" for name in FAMILIES)
        raise ModelError(f"models of the type `{base.model_type}` have no SwiftKV", expected=f"one of {known}")
    _check_layers(base, kept, size)
    keys = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    made = family.config_class(**keys, num_key_value_layers=kept, key_value_group_size=size)
    made.architectures = [family.__name__]
    made._commit_hash = getattr(base, "_commit_hash", None)
    return made


def _check_layers(base: Any, kept: int, size: int) -> None:
    layers = base.num_hidden_layers
    if not 1 <= kept <= layers:
        raise ModelError(
            f"`model.num_key_value_layers` is {kept}, and the model has {layers} layers", expected=f"1 to {layers}",
            fix=f"keep half of them: `num_key_value_layers: {max(1, layers // 2)}`",
        )  # fmt: skip
    if (layers - kept) % size:
        fitting = [n for n in range(1, layers - kept + 1) if (layers - kept) % n == 0]
        raise ModelError(
            f"`model.key_value_group_size` is {size}, which does not divide the {layers - kept} layers that share keys "
            "and values",
            expected="one of " + ", ".join(map(str, fitting)),
        )
    kinds = getattr(base, "layer_types", None)
    for first in range(kept, layers, size):
        if kinds and len(set(kinds[first : first + size])) > 1:
            raise ModelError(
                f"layers {first} to {first + size - 1} would share keys and values, and not all of them look equally "
                f"far back ({', '.join(kinds[first : first + size])})",
                fix="choose `num_key_value_layers` and `key_value_group_size` so that groups end where windows begin",
            )


def counterparts(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """`(name, teacher's, student's)` of the projections and norms that `module` has twice."""
    for name, own in module.named_children():
        if name.endswith(SUFFIX):
            yield name.removesuffix(SUFFIX), getattr(module, name.removesuffix(SUFFIX)), own


@torch.no_grad()
def begin(model: Any) -> None:
    """Give a student the weights that it begins with; every worker must ask.

    `norm_swiftkv` is the first norm of the first later layer; queries are those of the teacher; keys and values of a
    group are the mean of those of its layers.
    """
    body, config = model.base_model, model.config
    if config.kept < config.num_hidden_layers:
        _copy([body.layers[config.kept].input_layernorm], body.norm_swiftkv)
    for group in config.groups():
        attentions = [body.layers[at].self_attn for at in group]
        for attention in attentions:
            for name, teacher, own in counterparts(attention):
                queries = name.startswith("q_")
                _copy([teacher] if queries else [getattr(a, name) for a in attentions], own)


def _copy(sources: list[nn.Module], target: nn.Module) -> None:
    """Into each weight of `target` the mean of those of `sources`."""
    for name, parameter in target.named_parameters():
        values = [whole(source.get_parameter(name)) for source in sources]
        value = values[0] if len(values) == 1 else torch.stack([v.float() for v in values]).mean(0)
        assign(parameter, value.to(parameter.dtype))


def freeze(model: Any) -> None:
    """Train the projections and the norm of the student alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part.endswith(SUFFIX) for part in name.split(".")))
