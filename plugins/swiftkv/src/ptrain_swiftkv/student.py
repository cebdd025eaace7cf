"""A SwiftKV model as it begins: its configuration from a plain one, its new weights from those of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ptrain import ModelError
from ptrain.weights import assign, whole
from ptrain_swiftkv.models import FAMILIES
from ptrain_swiftkv.rules import SUFFIX, fault


def student_config(base: Any, kept: int | None, size: int | None) -> Any:
    """The configuration of a student of the model that `base` describes; `base` itself where it is one.

    Args:
        kept: `num_key_value_layers`.
        size: `key_value_group_size`.

    Raises:
        ModelError: the family is not supported, has not these layers, or the student is another one.
    """
    if found := fault(base.to_dict(), kept, size):
        raise ModelError(found.message, expected=found.expected, fix=found.fix)
    if base.model_type.endswith(SUFFIX):
        return base
    family = FAMILIES[base.model_type]
    keys = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")}
    made = family.config_class(**keys, num_key_value_layers=kept, key_value_group_size=size or 1)
    made.architectures = [family.__name__]
    made._commit_hash = getattr(base, "_commit_hash", None)
    return made


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
