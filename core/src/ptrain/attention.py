"""Attention functions of plugins, for wrappers of the stage `create_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Attention = Callable[..., "tuple[torch.Tensor, Any]"]
"""What transformers computes attention with: `(module, query, key, value, attention_mask, **keywords)`, queries
[b, heads, s, d], to [b, s, heads, d] and weights that may be None."""


def wrap_attention(model: PreTrainedModel, prefix: str, around: Callable[[Attention], Attention]) -> None:
    """Have `model` compute attention with `around(plain)`, where `plain` is what it computes it with now.

    For batches with `attention_arguments` no mask is made: the function is given these arguments, and what core tells
    `plain` of the documents of whole rows (`document_lengths`, or their boundaries). Otherwise it is called as `plain`
    would be, in generation for example. A configuration that is saved knows nothing of it.

    Args:
        prefix: of the name that transformers knows the function by.

    Raises:
        ModelError: the model computes attention in a way of its own.
    """
    from ptrain.errors import ModelError
    from ptrain.model import varlen  # noqa: F401 - registers its function
    from ptrain.model.attention import wrap

    name = wrap(prefix, attention_name(model), around)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} computes attention in a way of its own, which nothing can be put round"
        )


def attention_name(model: PreTrainedModel) -> str:
    """What `model` computes attention with, as transformers calls it; what is wrapped, where it is a wrapped one."""
    from ptrain.model.attention import plain_name

    return str(plain_name(model.config._attn_implementation))


def seen(module: Any, **attributes: Any) -> Any:
    """`module` with other values of some attributes, to give to an attention function in its place."""
    from ptrain.model.attention import Seen

    return Seen(module, **attributes)


def by_documents(config: PretrainedConfig) -> bool:
    """Whether every layer attends to all earlier positions of a document, or to those within a window."""
    from ptrain.model.attention import KNOWN_LAYERS

    return set(getattr(config, "layer_types", None) or ()) <= KNOWN_LAYERS
